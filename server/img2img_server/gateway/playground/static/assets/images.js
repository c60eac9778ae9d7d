// The init images that are chosen: one job is created for each of them.
import * as store from "./store.js";
import { $, element } from "./view.js";

let chosen = []; // [{blob, name, url, width, height, thumbnail}]; url is empty if the browser cannot display it

export const all = () => chosen;

// Replaces the chosen images by files or blobs with names.
export async function choose(files) {
  chosen = await Promise.all(files.map(read));
  show();
}

// URLs are not revoked, because jobs show them.
async function read({ blob, name }) {
  const size = await createImageBitmap(blob).catch(() => ({})); // The service reports the fault.
  const url = size.width ? URL.createObjectURL(blob) : "";
  return { blob, name, url, width: size.width, height: size.height, thumbnail: size.width && store.thumbnail(size) };
}

function show() {
  const shown = chosen.filter(({ url }) => url);
  $("chosen").hidden = !shown.length;
  $("chosen").replaceChildren(...shown.map((each) => {
    const image = element("img", { src: each.url, alt: chosen.length > 1 ? each.name : "The chosen init image" });
    if (chosen.length < 2) return element("li", {}, image);
    const remove = element("button", { type: "button", className: "remove", title: `Remove ${each.name}` }, "×");
    remove.setAttribute("aria-label", `Remove ${each.name}`);
    remove.onclick = () => {
      chosen = chosen.filter((other) => other !== each);
      show();
    };
    return element("li", {}, image, remove);
  }));
  $("chosen-name").textContent = chosen.length === 1 ? text(chosen[0]) : `${chosen.length} images: one job for each.`;
  $("file").dispatchEvent(new Event("chosen", { bubbles: true }));
}

const text = ({ name, width, height }) => (width ? `${name}, ${width} x ${height}` : `${name} (this browser cannot display it)`);
