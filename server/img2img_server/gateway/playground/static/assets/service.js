// Calls the service. The paths are relative to the page, so that it also works below a path of a proxy.
const PATHS = {
  settings: "playground/settings.json",
  example: "playground/cat.jpg",
  capabilities: "v1/capabilities",
  jobs: "v1/jobs",
  cancel: "v1/jobs/{job_id}:cancel",
  events: "v1/jobs/{job_id}/events",
};
export const END_KINDS = { STATE_SUCCEEDED: "succeeded", STATE_FAILED: "failed", STATE_CANCELLED: "cancelled" };
const ENVELOPE = ["sequence", "event_time", "job"];
// milliseconds; the service sends an event or a heartbeat every 15 seconds
const SILENCE_MS = 40_000;
const PAUSE_MS = { first: 500, max: 8_000 };

// An error response: the service's message, and messages by the name of the field in `fields`.
export class ServiceError extends Error {
  constructor(message, fields = {}, status = 0) {
    super(message);
    this.fields = fields;
    this.status = status;
  }
}

export const settings = async () => (await call(PATHS.settings, "")).json();
export const example = async () => (await call(PATHS.example, "")).blob();
export const capabilities = async (key) => (await call(PATHS.capabilities, key)).json();

export async function create(spec, key, signal) {
  const body = JSON.stringify({ spec });
  const headers = { "Content-Type": "application/json" };
  return (await (await call(PATHS.jobs, key, { method: "POST", body, headers, signal })).json()).job;
}

// Returns a page of the tenant's jobs, the newest first.
export async function list(key, pageSize, pageToken) {
  const query = new URLSearchParams({ page_size: pageSize, ...(pageToken && { page_token: pageToken }) });
  return (await call(`${PATHS.jobs}?${query}`, key)).json();
}

export const cancel = (id, key) => call(PATHS.cancel.replace("{job_id}", id), key, { method: "POST" });

// Yields a job's events after sequence number `last` as {kind, sequence, …}, until the job has ended.
// Resumes a stream that breaks after the last event; before each pause, calls `onLost` with its number.
export async function* follow(id, key, signal, onLost, last = 0) {
  let pause = PAUSE_MS.first;
  for (;;) {
    let ended = null;
    try {
      const path = `${PATHS.events.replace("{job_id}", id)}?after_sequence=${last}`;
      for await (const event of stream(path, key, signal)) {
        const kind = Object.keys(event).find((name) => !ENVELOPE.includes(name));
        last = Math.max(last, Number(event.sequence));
        pause = PAUSE_MS.first;
        ended = kind === "snapshot" ? event.snapshot.job : null;
        yield { kind, sequence: last, ...event[kind] };
        if (Object.values(END_KINDS).includes(kind)) return;
      }
      const kind = END_KINDS[ended?.state]; // set if the events have expired but not the record
      if (kind) {
        yield { kind, sequence: last, job: ended };
        return;
      }
    } catch (error) {
      if (signal.aborted || (error.status >= 400 && error.status < 500)) throw error;
    }
    onLost(last);
    await new Promise((resolve) => setTimeout(resolve, pause));
    if (signal.aborted) throw new DOMException("", "AbortError");
    pause = Math.min(2 * pause, PAUSE_MS.max);
  }
}

// Reads server-sent events. EventSource cannot send the key in a header.
async function* stream(path, key, signal) {
  const inner = new AbortController();
  const stop = () => inner.abort();
  signal.addEventListener("abort", stop);
  let silence = setTimeout(stop, SILENCE_MS);
  try {
    const response = await call(path, key, { signal: inner.signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      clearTimeout(silence);
      silence = setTimeout(stop, SILENCE_MS);
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split("\n").find((line) => line.startsWith("data: "));
        if (data) yield JSON.parse(data.slice("data: ".length));
      }
    }
  } finally {
    clearTimeout(silence);
    signal.removeEventListener("abort", stop);
    inner.abort();
  }
}

async function call(path, key, options = {}) {
  if (!/^[!-~]*$/.test(key)) throw new ServiceError("The API key is wrong: keys have printable ASCII characters only and no spaces", {}, 401);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError("The service cannot be reached.");
  }
  const isJson = response.headers.get("Content-Type")?.startsWith("application/json");
  if (response.ok && !isJson) return response;
  const body = await response.clone().json().catch(() => ({}));
  // In legacy mode errors have HTTP status 200, too, and `message` may hold the fields.
  if (response.ok && !["error", "failed"].includes(body.status)) return response;
  const inMessage = typeof body.message === "object" ? body.message : {};
  const fields = body.errors ?? inMessage ?? {};
  const first = Object.values(fields).flat()[0] ?? `The service responded with HTTP status ${response.status}.`;
  const message = typeof body.message === "string" ? body.message : first;
  throw new ServiceError(message, fields, response.ok ? 400 : response.status);
}
