// Keeps what the service does not list of this tab's jobs over a reload, in the session storage: the
// request as it was sent and a thumbnail of the init image, by the id of the job.
const STORED = "img2img-jobs";
const THUMBNAIL_SIDE = 320;  // pixels of a thumbnail's longer side

// Saves those of `jobs` that this tab has created, the newest first; see view.js.
export function save(jobs) {
  const saved = jobs.filter(({ id, thumbnail }) => id && thumbnail).map(({ id, spec, thumbnail }) => ({ id, spec, thumbnail }));
  for (;;) {
    try {
      sessionStorage.setItem(STORED, JSON.stringify(saved));
      return;
    } catch {  // The storage is full.
      if (!saved.length) return;
      saved.pop();
    }
  }
}

// Returns a Map of {spec, thumbnail, before} by id.
export function load() {
  try {
    const found = JSON.parse(sessionStorage.getItem(STORED) ?? "[]");
    return new Map(found.map((each) => [each.id, { ...each, before: blobUrl(each.thumbnail) }]));
  } catch {
    return new Map(); // Another version of this page has saved the entry.
  }
}

// Returns a small JPEG of a bitmap as base64.
export function thumbnail(bitmap) {
  const scale = Math.min(1, THUMBNAIL_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.8).split(",")[1];
}

function blobUrl(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" }));
}
