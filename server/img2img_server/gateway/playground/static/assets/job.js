// What each event of a job does to the result on the page.
import { worded } from "./view.js";

export function apply(result, told) {
  const sample = told.sample === undefined ? null : (result.samples[told.sample] ??= {});
  const at = { snapshot, queued, started, step, preview, sample_finished, sample_stored };
  if (["succeeded", "failed", "cancelled"].includes(told.kind)) ended(result, told);
  else at[told.kind]?.(result, told, sample);
}

function snapshot(result, { job }) {
  result.samples = Array.from({ length: job.spec.samples }, (_, index) => result.samples[index] ?? {});
  result.text = { STATE_QUEUED: "Queued.", STATE_RUNNING: "Running." }[job.state] ?? result.text;
}

function queued(result, { position, eta, requeue_reason: reason }) {
  const place = { "-1": "waiting", 0: "next in line" }[position] ?? `${position} before it`;
  const about = eta ? `, about ${Number.parseFloat(eta).toFixed(1)} s` : "";
  Object.assign(result, { waiting: true, text: `Queued: ${place}${about}${reason ? ` (${reason})` : ""}.` });
}

function started(result, { worker, model }) {
  result.imagesAfter = undefined; // a new attempt makes them again
  for (const sample of result.samples) Object.assign(sample, { step: 0, total: 0 });
  Object.assign(result, { waiting: false, text: `Running ${model} on ${worker}.` });
}

function step(result, told, sample) {
  Object.assign(sample, { step: told.step, total: told.total });
  result.waiting = false;
}

function preview(_, { image }, sample) {
  if (sample.url && !sample.rough) return;
  if (sample.url) URL.revokeObjectURL(sample.url);
  Object.assign(sample, { url: blobUrl(image), rough: true });
}

function sample_finished(result, { sequence, image, seed, nsfw }, sample) {
  result.imagesAfter ??= sequence - 1; // where to read the pictures again
  if (sample.url) URL.revokeObjectURL(sample.url);
  Object.assign(sample, { url: blobUrl(image), rough: false, mediaType: image.media_type, seed, nsfw });
}

function sample_stored(_, { url }, sample) {
  sample.link = url;
}

function ended(result, { kind, job }) {
  job.samples.forEach((told, index) => {
    const sample = (result.samples[index] ??= {});
    Object.assign(sample, { link: told.url || sample.link, seed: told.seed, nsfw: told.nsfw });
    if (kind === "succeeded") sample.url ??= told.url; // its event has expired: the stored file
  });
  const seconds = Number.parseFloat(job.timings?.total ?? 0).toFixed(2);
  const text = { succeeded: `Done in ${seconds} s.`, failed: `Failed: ${worded(job.error?.message)}`, cancelled: "Cancelled." }[kind];
  Object.assign(result, { job, text, waiting: undefined });
}

function blobUrl({ data, media_type: type }) {
  return URL.createObjectURL(new Blob([Uint8Array.from(atob(data), (char) => char.charCodeAt(0))], { type }));
}
