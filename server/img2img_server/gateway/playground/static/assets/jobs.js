// The jobs of the key's tenant: those that this page creates and those that the service lists.
import { apply } from "./job.js";
import * as service from "./service.js";
import * as store from "./store.js";
import { $, draw, element, showError, thumb } from "./view.js";

// Event streams at a time: browsers open few connections to a host, and other requests need some.
const STREAMS = 3;
const PAGE_SIZE = 24;
const END_KINDS = service.END_KINDS;

let jobs = []; // the newest first; see `draw` in view.js for their fields
let shown = null;
let key = "";
let nextPage = "";
let streams = 0;
let waiting = []; // jobs that wait for a stream
let kept = new Map(); // what this tab keeps of its jobs, by id
let onSelect = () => {};

export const current = () => shown;
export const isRunning = () => Boolean(shown?.id && !shown.job);

// `select`: called with a job that the user selects.
export function begin(select) {
  onSelect = select;
  $("more").onclick = () => listPage().catch(showError);
  for (const image of [$("before"), $("after")]) image.addEventListener("error", () => shown && restoreImages(shown));
}

// Shows a request that the service has not accepted yet, or an init image that was chosen.
export function show(job) {
  shown = job;
  changed(job);
}

// Adds an accepted job and follows it.
export function add(job, id) {
  job.id = id;
  jobs.unshift(job);
  store.save(jobs);
  drawGallery();
  follow(job);
}

// Lists the jobs of a key in place of those of the key before. Shows one if nothing is shown.
export async function load(newKey) {
  if (newKey === key) return;
  waiting = [];
  for (const job of jobs) job.stream?.abort();
  [key, nextPage, kept] = [newKey, "", store.load()];
  if (shown?.id) shown = null;
  jobs = jobs.filter(({ id }) => !id);
  drawGallery();
  await listPage();
  const open = jobs.find(({ job }) => !job);
  const first = open ?? jobs[0];
  if (!shown && first) {
    show(first);
    if (kept.has(first.id)) onSelect(first); // The form is filled as before the reload.
  }
}

async function listPage() {
  const page = await service.list(key, PAGE_SIZE, nextPage);
  nextPage = page.next_page_token ?? "";
  for (const job of page.jobs ?? []) {
    if (!jobs.some(({ id }) => id === job.id)) jobs.push(listed(job));
  }
  $("more").hidden = !nextPage;
  store.save(jobs);
  drawGallery();
}

function listed(job) {
  const saved = kept.get(job.id);
  const made = {
    id: job.id, spec: saved?.spec ?? job.spec, thumbnail: saved?.thumbnail, before: saved?.before,
    samples: Array.from({ length: job.spec.samples ?? 1 }, () => ({})), shown: 0, waiting: true, text: "Loading…",
  };
  const kind = END_KINDS[job.state];
  if (kind) apply(made, { kind, job });
  else follow(made);
  return made;
}

// ---- streams

function follow(job) {
  waiting.push(job);
  startStreams();
}

function startStreams() {
  while (streams < STREAMS && waiting.length) stream(waiting.shift());
}

// Draws a job's events until it has ended.
async function stream(job) {
  const control = (job.stream = new AbortController());
  const usedKey = key;
  const onLost = (last) => {
    job.text = `Connection lost; resuming after event ${last}…`;
    changed(job);
  };
  streams += 1;
  try {
    for await (const event of service.follow(job.id, usedKey, control.signal, onLost)) {
      apply(job, event);
      changed(job);
    }
  } catch (error) {
    if (control.signal.aborted) return;
    const text = error.status === 404 ? "This job no longer exists." : "The events of the job cannot be read.";
    Object.assign(job, { waiting: undefined, text });
    changed(job);
    if (error.status !== 404) showError(error);
  } finally {
    streams -= 1;
    job.stream = null;
    startStreams();
  }
}

// Reads the images of an ended job from its events, because a stored file cannot be shown: it has
// expired, or it is on another host.
function restoreImages(job) {
  if (!job.job) return;
  for (const sample of job.samples) {
    if (sample.url && !sample.url.startsWith("blob:")) sample.url = undefined;
  }
  if (!job.isRead) follow(Object.assign(job, { isRead: true }));
  changed(job);
}

// ---- gallery

function changed(job) {
  if (job === shown) draw(job);
  $("cancel").hidden = !isRunning() && !document.body.classList.contains("sending");
  if (job.place) drawPlace(job);
}

function drawGallery() {
  $("history-empty").hidden = jobs.length > 0;
  $("history").replaceChildren(...jobs.map((job) => {
    job.place ??= place(job);
    drawPlace(job);
    return job.place;
  }));
  $("more").hidden = !nextPage;
}

function place(job) {
  const button = thumb("");
  button.append(element("span", { className: "badge" }));
  button.firstChild.loading = "lazy";
  button.firstChild.onerror = () => restoreImages(job);
  button.onclick = () => {
    show(job);
    jobs.forEach(drawPlace);
    onSelect(job);
  };
  return element("li", {}, button);
}

function drawPlace(job) {
  const button = job.place.firstChild;
  const [image, badge] = button.children;
  const name = `${job.spec.prompt ?? ""}, job ${job.id}: ${job.text}`;
  Object.assign(button, { title: name });
  image.alt = name;
  const source = job.samples[0]?.url ?? job.before;
  if (!source) image.removeAttribute("src");
  else if (image.getAttribute("src") !== source) image.src = source;
  const { step, total } = job.samples[0] ?? {};
  badge.textContent = job.job ? { STATE_FAILED: "failed", STATE_CANCELLED: "cancelled" }[job.job.state] ?? "" : total ? `${step} / ${total}` : "queued";
  badge.hidden = !badge.textContent;
  button.setAttribute("aria-pressed", job === shown);
}
