// What this tab has made, kept over a reload in the tab's session storage: ids, requests and small
// copies of the pictures before. The pictures after are read again from the service.
const STORED = "img2img-jobs";
const SMALL_SIDE = 320; // pixels

// `results`: newest first, see view.js.
export function keep(results) {
  const kept = results.filter(({ id }) => id).map(({ id, spec, small, imagesAfter, job, ended }) => {
    const { init_image: _, ...rest } = spec;
    return { id, spec: rest, small, imagesAfter, ended: ended || Boolean(job) };
  });
  for (;;) {
    try {
      sessionStorage.setItem(STORED, JSON.stringify(kept));
      return;
    } catch { // the storage is full
      if (!kept.length) return;
      kept.pop();
    }
  }
}

// The results as `keep` was given them, without their samples.
export function kept() {
  try {
    const found = JSON.parse(sessionStorage.getItem(STORED) ?? "[]");
    return found.map((each) => ({
      ...each, before: each.small && blobUrl(each.small), samples: [], shown: 0, text: "Loading…",
    }));
  } catch {
    return []; // of another version of this page
  }
}

// A small JPEG of a bitmap as base64.
export function small(bitmap) {
  const scale = Math.min(1, SMALL_SIDE / Math.max(bitmap.width, bitmap.height));
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
