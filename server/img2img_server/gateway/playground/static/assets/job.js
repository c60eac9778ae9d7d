// Applies the events of a job to the result that the page shows.
import { withLabels } from "./view.js";

export function apply(result, event) {
  const sample = event.sample === undefined ? null : (result.samples[event.sample] ??= {});
  const handlers = { snapshot, queued, started, step, preview, sample_finished, sample_stored, storage_waiting };
  if (["succeeded", "failed", "cancelled"].includes(event.kind)) ended(result, event);
  else handlers[event.kind]?.(result, event, sample);
}

function snapshot(result, { job }) {
  result.samples = Array.from({ length: job.spec.samples }, (_, index) => result.samples[index] ?? {});
  const queued = job.state_reason === "MODEL_UNSERVED" ? `Queued. ${job.warning}` : "Queued.";
  result.text = { STATE_QUEUED: queued, STATE_RUNNING: "Running." }[job.state] ?? result.text;
}

function queued(result, { position, eta, requeue_reason: reason }) {
  const place = { "-1": "waiting", 0: "next", 1: "1 job ahead" }[position] ?? `${position} jobs ahead`;
  const about = eta ? `, about ${Number.parseFloat(eta).toFixed(1)} s` : "";
  Object.assign(result, { waiting: true, text: `Queued: ${place}${about}${reason ? ` (${reason})` : ""}.` });
}

function started(result, { worker, model, stored_samples: stored = [] }) {
  result.samples.forEach((sample, index) => {
    if (!stored.includes(index)) Object.assign(sample, { step: 0, total: 0 });
  });
  Object.assign(result, { waiting: false, text: `Running ${model} on ${worker}.` });
}

function step(result, event, sample) {
  Object.assign(sample, { step: event.step, total: event.total });
  result.waiting = false;
}

function preview(_, { image }, sample) {
  if (sample.url && !sample.isPreview) return;
  if (sample.url) URL.revokeObjectURL(sample.url);
  Object.assign(sample, { url: blobUrl(image), isPreview: true });
}

function sample_finished(_, { image, seed, nsfw }, sample) {
  if (sample.url) URL.revokeObjectURL(sample.url);
  Object.assign(sample, { url: blobUrl(image), isPreview: false, mediaType: image.media_type, seed, nsfw });
}

function sample_stored(_, { url }, sample) {
  sample.link = url;
}

function storage_waiting(result, { reason }) {
  result.text = `Waiting for storage: ${reason}.`;
}

function ended(result, { kind, job }) {
  job.samples.forEach((stored, index) => {
    const sample = (result.samples[index] ??= {});
    Object.assign(sample, { link: stored.url || sample.link, seed: stored.seed, nsfw: stored.nsfw });
    if (kind === "succeeded") sample.url ??= here(stored.url);
  });
  const seconds = Number.parseFloat(job.timings?.total ?? 0).toFixed(2);
  const text = { succeeded: `Done in ${seconds} s.`, failed: `Failed: ${withLabels(job.error?.message)}`, cancelled: "Cancelled." }[kind];
  Object.assign(result, { job, text, waiting: undefined });
}

// Returns the address of a stored file at this gateway: the page may have another name of it than the
// link, and must not show images of other hosts.
function here(link) {
  const [, path] = (link ?? "").split("/generations/");
  return path ? `generations/${path}` : link;
}

function blobUrl({ data, media_type: type }) {
  return URL.createObjectURL(new Blob([Uint8Array.from(atob(data), (char) => char.charCodeAt(0))], { type }));
}
