// Draws one result (both images, the progress, the facts) and errors.
const STAGES = {
  fetch: "Init image check", queue: "Wait for a worker", held: "Wait for the device", prepare: "Prepare",
  encode: "Encode", denoise: "Denoise", paused: "Steps of other jobs", decode: "Decode",
  safety: "Safety check", image_encode: "Encode file", upload: "Upload",
};

export const $ = (id) => document.getElementById(id);

// Returns an element with properties and children, which are text, never HTML.
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export function setStatus(text) {
  if ($("status").textContent !== text) $("status").textContent = text;
}

// `result`: {id, spec, before, samples: [{url, link, seed, nsfw, step, total}], shown, job, text}.
export function draw(result) {
  const sample = result.samples[result.shown];
  // The init image of a job that another client created is not known: its image is shown whole.
  $("compare").classList.toggle("empty", !result.before && !sample?.url);
  $("compare").classList.toggle("generated", Boolean(result.before && sample?.url));
  $("compare").classList.toggle("preview", Boolean(sample?.isPreview));
  source($("before"), result.before);
  source($("after"), sample?.url);
  setStatus(result.text);
  drawProgress(result);
  drawSamples(result);
  drawFacts(result, sample);
}

// The place of the images has the shape of the generated image, before that of the init image.
for (const image of [$("before"), $("after")]) image.addEventListener("load", () => {
  const { naturalWidth, naturalHeight } = $("after").hasAttribute("src") ? $("after") : $("before");
  const shape = naturalWidth / naturalHeight;
  $("compare").style.setProperty("--shape", shape > 0.1 && shape < 10 ? shape : 1);
});

function source(image, url) {
  if (!url) image.removeAttribute("src");
  else if (image.getAttribute("src") !== url) image.src = url;
}

function drawProgress({ samples, job, waiting }) {
  const bar = $("progress");
  bar.hidden = Boolean(job) || waiting === undefined;
  const total = samples.length * Math.max(0, ...samples.map((sample) => sample.total ?? 0));
  const done = samples.reduce((sum, sample) => sum + (sample.step ?? 0), 0);
  $("step").hidden = bar.hidden || waiting || !total;
  // In the status element, a screen reader would read this text aloud.
  $("step").textContent = `Step ${done} of ${total}.`;
  if (waiting || !total) bar.removeAttribute("value");
  else bar.value = done / total;
}

function drawSamples(result) {
  const list = $("samples-shown");
  list.hidden = result.samples.length < 2;
  if (list.children.length !== result.samples.length) {
    list.replaceChildren(...result.samples.map((_, index) => element("li", {}, thumb(`Image ${index + 1}`))));
  }
  [...list.children].forEach(({ firstChild: button }, index) => {
    source(button.firstChild, result.samples[index].url ?? result.before);
    button.setAttribute("aria-pressed", index === result.shown);
    button.onclick = () => draw(Object.assign(result, { shown: index }));
  });
}

function drawFacts({ id, job, samples }, sample) {
  $("facts").hidden = !job;
  if (!job) return;
  const links = element("p", { className: "row" });
  if (sample?.link) links.append(element("a", { href: sample.link, target: "_blank", rel: "noreferrer" }, "Stored PNG"));
  if (sample?.url && !sample.isPreview) {
    const type = sample.mediaType?.split("/")[1] ?? "png";
    const download = `img2img-${id}-${samples.indexOf(sample)}.${type}`;
    links.append(element("a", { href: sample.url, download }, `Save ${type.toUpperCase()}`));
  }
  const facts = [
    ["Job", id],
    ["Seed", sample?.seed],
    ["Steps", job.timings?.steps],
    ["Model", job.spec.model],
    ["Device", job.device],
    ["Prompt used", job.spec.prompt === job.original_prompt ? "" : job.spec.prompt],
    ["Warning", withLabels(job.warning)],
    ["Safety", sample?.nsfw ? "blanked by the safety checker" : ""],
  ];
  const list = element("dl");
  for (const [name, value] of facts) {
    if (value) list.append(element("div", {}, element("dt", {}, name), element("dd", {}, String(value))));
  }
  $("facts").replaceChildren(links, list, ...timings(job.timings));
}

function timings(stages) {
  const total = Number.parseFloat(stages?.total);
  if (!total) return [];
  const rows = Object.entries(STAGES).map(([name, title]) => [title, Number.parseFloat(stages[name] ?? 0)]);
  const body = element("tbody");
  for (const [name, seconds] of rows.filter(([, seconds]) => seconds > 0)) {
    const bar = element("span", { className: "bar" });
    bar.style.setProperty("inline-size", `${Math.min(100, (100 * seconds) / total)}%`);
    const cells = [element("td", {}, milliseconds(seconds)), element("td", {}, bar)];
    body.append(element("tr", {}, element("th", { scope: "row" }, name), ...cells));
  }
  const caption = element("caption", {}, `Time by stage, ${milliseconds(total)} in total`);
  return [element("table", {}, caption, body)];
}

const milliseconds = (seconds) => `${Math.round(1000 * seconds).toLocaleString("en")} ms`;

// Returns a button with an image in it.
export function thumb(name) {
  return element("button", { type: "button", className: "thumb", title: name }, element("img", { alt: name }));
}

export function clearErrors() {
  $("alert").hidden = true;
  for (const error of $("form").querySelectorAll(".error")) error.remove();
  for (const input of $("form").querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
}

// Removes the error of a field whose value has changed.
export function clearField(input) {
  $("alert").hidden = true;
  const field = input.closest("[data-field]");
  field?.querySelector(".error")?.remove();
  field?.querySelector("[aria-invalid]")?.removeAttribute("aria-invalid");
}

// Returns the service's sentence with the page's labels in place of the names of fields.
export function withLabels(text) {
  let sentence = text ?? "";
  for (const field of $("form").querySelectorAll("[data-field]")) {
    const name = field.dataset.field;
    const label = field.querySelector("label").firstChild.textContent.trim();
    // "prompt" and "width" are also plain words, except at the start of a sentence.
    const known = new RegExp(name.includes("_") ? `\\b${name}\\b` : `^${name}\\b`, "g");
    sentence = sentence.replaceAll(known, label);
  }
  return sentence;
}

// Shows an error: sentences about a field next to it, the others below the form.
export function showError(error) {
  clearErrors(); // of another request that failed meanwhile
  const fields = error.status === 401 ? { key: [error.message] } : (error.fields ?? {});
  const elsewhere = [];
  for (const [name, sentences] of Object.entries(fields)) {
    const field = $("form").querySelector(`[data-field="${CSS.escape(name)}"]`);
    if (!field) elsewhere.push(...sentences.map(withLabels));
    else mark(field, name, sentences.map(withLabels));
  }
  if (!Object.keys(fields).length) elsewhere.push(withLabels(error.message));
  $("alert").hidden = !elsewhere.length;
  $("alert").textContent = elsewhere.join(" ");
  $("form").querySelector("[aria-invalid]")?.focus();
}

function mark(field, name, sentences) {
  const message = element("p", { className: "error", id: `${name}-error` }, sentences.join(" "));
  field.append(message);
  const input = field.querySelector("input, textarea, select");
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-errormessage", message.id);
}
