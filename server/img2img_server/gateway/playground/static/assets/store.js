// Keeps the tab's jobs over a reload, in its session storage: ids, requests and thumbnails of the init
// images. The generated images are read from the service again.
const STORED = "img2img-jobs";
const THUMBNAIL_SIDE = 320;  // pixels of a thumbnail's longer side

// Saves `results`, the newest first; see view.js.
export function save(results) {
  const saved = results.filter(({ id }) => id).map(({ id, spec, thumbnail, imagesAfter, job, ended }) => {
    const { init_image: _, ...rest } = spec;
    return { id, spec: rest, thumbnail, imagesAfter, ended: ended || Boolean(job) };
  });
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

// Returns the saved results, without their samples.
export function load() {
  try {
    const found = JSON.parse(sessionStorage.getItem(STORED) ?? "[]");
    return found.map((each) => ({
      ...each, before: each.thumbnail && blobUrl(each.thumbnail), samples: [], shown: 0, text: "Loading…",
    }));
  } catch {
    return [];  // Another version of this page has saved the entry.
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
