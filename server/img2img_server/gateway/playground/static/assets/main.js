// The page: a form, one job at a time, and what this session has made.
import { code } from "./code.js";
import { apply } from "./job.js";
import * as service from "./service.js";
import * as store from "./store.js";
import { $, alarm, clearErrors, clearField, draw, element, thumb } from "./view.js";

const NUMBERS = ["strength", "width", "height", "num_inference_steps", "guidance_scale", "samples", "seed", "lora_scale"];
const FLAGS = ["safety_checker", "enhance_prompt"];
const STORED_KEY = "img2img-key";
const HISTORY_MOST = 24;
const form = $("form");
const history = [];
let grpc = `${location.hostname}:50051`;
let openKey = ""; // the key that everybody knows, where the service says that it takes it
let models = [];
let picture = null; // {blob, name, url, width, height}
let strengthChosen = false; // until then the slider shows the model's own strength, and none is sent
let running = null; // an AbortController while a job runs
let shown = null;
let loaded = false; // whether what the tab made before a reload is shown again

// ---- key, models

async function begin() {
  try {
    const told = await service.settings();
    openKey = told.api_key;
    grpc = told.grpc_address || grpc;
  } catch (error) {
    alarm(error);
  }
  $("key").value = sessionStorage.getItem(STORED_KEY) ?? openKey;
  if (openKey) $("key-hint").textContent = `For development: this service takes ${openKey}.`;
  await learn();
  describe();
}

async function learn() {
  clearErrors();
  if (!$("key").value.trim()) return;
  try {
    const told = await service.capabilities(key());
    models = told.models;
    $("server").textContent = `version ${told.server_version}`;
    bound(told.limits);
    options($("model"), models.map((model) => [model.name, `${model.name}${model.workers ? ` (${model.device})` : " (no worker now)"}`]));
    adapt();
    reload();
  } catch (error) {
    alarm(error);
  }
}

function bound(limits) {
  $("samples").max = limits.max_samples;
  $("guidance").max = limits.max_guidance_scale;
}

function adapt() {
  const model = models.find(({ name }) => name === $("model").value);
  if (!model) return;
  for (const side of [$("width"), $("height")]) {
    Object.assign(side, { min: model.min_side_pixels, max: model.max_side_pixels, step: model.side_multiple });
  }
  $("steps").max = model.max_num_inference_steps;
  if (!strengthChosen) $("strength").value = model.default_strength;
  $("steps").placeholder = model.default_num_inference_steps;
  $("guidance").placeholder = model.default_guidance_scale;
  options($("scheduler"), model.schedulers.map((name) => [name, name]));
  const loras = model.loras ?? [];
  options($("lora"), [["", "none"], ...loras.map((name) => [name, name])]);
  $("loras").hidden = !loras.length;
  if (!loras.length) $("lora-scale").value = "";
  describe();
}

function options(select, pairs) {
  const before = select.value;
  select.replaceChildren(...pairs.map(([value, text]) => element("option", { value }, text)));
  if (pairs.some(([value]) => value === before)) select.value = before;
}

const key = () => $("key").value.trim();

// ---- picture

async function choose(blob, name) {
  clearErrors();
  const size = await createImageBitmap(blob).catch(() => ({})); // the service says what is wrong
  const url = size.width ? URL.createObjectURL(blob) : "";
  picture = { blob, name, url, width: size.width, height: size.height, small: size.width && store.small(size) };
  if (url) $("chosen").src = url;
  $("chosen").hidden = !url;
  $("chosen-name").textContent = size.width ? `${name}, ${size.width} x ${size.height}` : `${name}, which this browser cannot show`;
  $("fit").disabled = !size.width;
  if (!running) draw((shown = { spec: spec(), before: url, samples: [], shown: 0, text: "Ready." }));
  describe();
}

function fit() {
  const multiple = Number($("width").step) || 8;
  const [least, most] = [Number($("width").min) || 256, Number($("width").max) || 1024];
  const area = 512 * 512;
  const side = (length) => Math.min(most, Math.max(least, multiple * Math.round(length / multiple)));
  const width = Math.sqrt((area * picture.width) / picture.height);
  $("width").value = side(width);
  $("height").value = side(area / width);
  describe();
}

// ---- the request

function spec() {
  const found = { preview_interval_steps: 1 };
  for (const [name, value] of new FormData(form)) {
    if (value === "" || FLAGS.includes(name) || (name === "strength" && !strengthChosen)) continue;
    found[name] = NUMBERS.includes(name) ? number(value) : value;
  }
  for (const name of FLAGS) found[name] = form.elements[name].checked;
  const model = models.find(({ name }) => name === found.model);
  const steps = found.num_inference_steps ?? model?.default_num_inference_steps;
  // Of a single step there is no preview to ask for.
  if (steps * (found.strength ?? model?.default_strength) < 2) delete found.preview_interval_steps;
  return found;
}

// A seed may have 64 bits, of which a number of JavaScript is exact up to 2^53; JSON takes it as text.
const number = (text) => (/^\d{16,}$/.test(text) ? text : Number(text));

function restore(earlier) {
  strengthChosen = earlier.strength !== undefined;
  for (const { name } of form.elements) {
    if (!name) continue;
    if (FLAGS.includes(name)) form.elements[name].checked = earlier[name];
    else form.elements[name].value = earlier[name] ?? "";
  }
  adapt();
  describe();
}

function describe() {
  $("strength-value").value = $("strength").value;
  const about = { file: picture?.name ?? "picture.jpg", origin: new URL(".", location.href).href.slice(0, -1), grpc, key: key() === openKey && openKey ? openKey : "YOUR-KEY" };
  $("code").textContent = code($("language").value, spec(), about);
}

// ---- a job

async function generate(event) {
  event.preventDefault();
  if (running) return;
  clearErrors();
  const asked = spec();
  const result = { spec: asked, before: picture?.url, small: picture?.small, samples: [], shown: 0, waiting: true, text: "Sending the picture…" };
  show(result);
  if (matchMedia("(max-width: 860px)").matches) $("stage").scrollIntoView({ behavior: "smooth" });
  await run(result, async (signal) => {
    if (picture) asked.init_image = { data: await base64(picture.blob) };
    result.id = (await service.create(asked, key(), signal)).id;
    delete asked.init_image;
    store.keep([result, ...history]); // a reload finds it again
    await watch(result, signal);
  });
  delete asked.init_image;
}

// The one job of the form, from `work` until its end.
async function run(result, work) {
  const control = (running = new AbortController());
  busy(true);
  try {
    await work(control.signal);
    remember(result);
  } catch (error) {
    const known = control.signal.aborted ? "Cancelled." : error.status === 404 && "This job is not there any more.";
    Object.assign(result, { waiting: undefined, text: known || "Not done; the form says why." });
    if (shown === result) draw(result);
    if (!known) alarm(error);
    store.keep(history);
  } finally {
    running = null;
    busy(false);
  }
}

// Draws a job's events until it has ended.
async function watch(result, signal, after) {
  const broken = (last) => lost(result, last);
  for await (const told of service.follow(result.id, key(), signal, broken, after)) {
    apply(result, told);
    if (shown === result) draw(result);
  }
}

function lost(result, last) {
  result.text = `The connection broke; going on after event ${last}…`;
  if (shown === result) draw(result);
}

function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new service.ServiceError("The picture cannot be read.", {}, 400));
    reader.readAsDataURL(blob);
  });
}

async function stop() {
  if (!shown?.id || shown.job) return running?.abort(); // no job yet: what is being sent is given up
  try {
    await service.cancel(shown.id, key());
  } catch (error) {
    alarm(error);
  }
}

function busy(is) {
  $("generate").disabled = is;
  $("cancel").hidden = !is;
  $("stage").setAttribute("aria-busy", is);
}

// ---- history

function show(result) {
  shown = result;
  draw(result);
}

function remember(result) {
  history.unshift(result);
  for (const old of history.splice(HISTORY_MOST)) old.samples.forEach(({ url }) => URL.revokeObjectURL(url));
  store.keep(history);
  drawHistory();
}

function drawHistory() {
  $("history-empty").hidden = history.length > 0;
  $("history").replaceChildren(...history.map((each) => {
    const button = thumb(`${each.spec.prompt ?? ""}, job ${each.id}: ${each.text}`);
    const source = each.samples[0]?.url ?? each.before;
    if (source) button.firstChild.src = source;
    button.onclick = () => {
      if (running) return;
      show(each);
      restore(each.spec);
    };
    return element("li", {}, button);
  }));
}

// Shows again what this tab made before it was reloaded, and goes on with a job that still runs.
async function reload() {
  if (loaded) return;
  loaded = true;
  const found = store.kept();
  history.push(...found.filter(({ ended }) => ended));
  drawHistory();
  const open = found.find(({ ended }) => !ended);
  if (open && !running) {
    show(Object.assign(open, { waiting: true }));
    restore(open.spec);
    run(open, (signal) => watch(open, signal));
  } else if (!shown && history.length) show(history[0]);
  for (const result of history.filter(({ ended }) => ended)) {
    try {
      await watch(result, new AbortController().signal, result.imagesAfter ?? 0);
    } catch {
      const place = history.indexOf(result); // it has expired, or it is another key's
      if (place >= 0) history.splice(place, 1);
    }
    drawHistory();
  }
}

// ---- wiring

form.addEventListener("submit", generate);
$("strength").addEventListener("input", () => (strengthChosen = true));
form.addEventListener("input", ({ target }) => {
  clearField(target);
  describe();
});
$("cancel").addEventListener("click", stop);
$("fit").addEventListener("click", fit);
$("language").addEventListener("change", describe);
$("model").addEventListener("change", adapt);
$("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText($("code").textContent);
  $("copy").textContent = "Copied";
});
$("key").addEventListener("change", () => {
  sessionStorage.setItem(STORED_KEY, key());
  learn();
});
$("file").addEventListener("change", ({ target }) => target.files[0] && choose(target.files[0], target.files[0].name));
$("example").addEventListener("click", async () => choose(await service.example(), "cat.jpg"));
$("split").addEventListener("input", ({ target }) => $("compare").style.setProperty("--split", `${target.value}%`));
for (const kind of ["dragover", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    const file = kind === "drop" && event.dataTransfer.files[0];
    if (file) choose(file, file.name);
  });
}
document.addEventListener("paste", ({ clipboardData }) => {
  const file = clipboardData.files[0];
  if (file) choose(file, file.name || "pasted.png");
});
$("fit").disabled = true;
begin();
