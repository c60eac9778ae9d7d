// The page: the form, and the jobs that it creates.
import { code } from "./code.js";
import * as images from "./images.js";
import * as jobs from "./jobs.js";
import * as service from "./service.js";
import { $, clearErrors, clearField, element, showError } from "./view.js";

const NUMBERS = ["strength", "width", "height", "num_inference_steps", "guidance_scale", "samples", "seed", "lora_scale"];
const FLAGS = ["safety_checker", "enhance_prompt"];
const STORED_KEY = "img2img-key";
const form = $("form");
let grpc = `${location.hostname}:50051`;
let grpcTls = false;
let devKey = "";  // the development key, if the service accepts it
let models = [];
let strengthChosen = false; // false: the model's default is shown and not sent
let sending = null; // an AbortController while requests are sent

// ---- key, models

async function begin() {
  try {
    const settings = await service.settings();
    devKey = settings.api_key;
    grpc = settings.grpc_address || grpc;
    grpcTls = settings.grpc_tls;
  } catch (error) {
    showError(error);
  }
  // A key that was typed while the settings were loaded stays.
  $("key").value ||= sessionStorage.getItem(STORED_KEY) ?? devKey;
  if (devKey) $("key-hint").textContent = `This service accepts the development key, ${devKey}.`;
  await loadCapabilities();
  drawCode();
}

async function loadCapabilities() {
  clearErrors();
  if (!$("key").value.trim()) return;
  try {
    const capabilities = await service.capabilities(key());
    models = capabilities.models;
    $("server").textContent = `version ${capabilities.server_version}`;
    setLimits(capabilities.limits);
    options($("model"), models.map((model) => [model.name, `${model.name}${model.workers ? ` (${model.device})` : " (no worker)"}`]));
    adaptToModel();
    await jobs.load(key());
  } catch (error) {
    showError(error);
  }
}

function setLimits(limits) {
  $("samples").max = limits.max_samples;
  $("guidance").max = limits.max_guidance_scale;
  $("lora-scale").min = limits.min_lora_scale;
  $("lora-scale").max = limits.max_lora_scale;
}

function adaptToModel() {
  const model = models.find(({ name }) => name === $("model").value);
  if (!model) return;
  for (const side of [$("width"), $("height")]) {
    Object.assign(side, { min: model.min_side_pixels, max: model.max_side_pixels, step: model.side_multiple });
  }
  $("size-hint").textContent = `Empty: as the init image. ${model.min_side_pixels} to ${model.max_side_pixels}, multiples of ${model.side_multiple}.`;
  if (!strengthChosen) $("strength").value = model.default_strength;
  offer($("negative_prompt"), model.takes_negative_prompt);
  offer($("guidance"), model.guidance !== "GUIDANCE_NONE");
  $("steps").placeholder = model.default_num_inference_steps;
  $("guidance").placeholder = model.default_guidance_scale;
  options($("scheduler"), model.schedulers.map((name) => [name, name]));
  adaptToScheduler();
  const loras = model.loras ?? [];
  options($("lora"), [["", "none"], ...loras.map((name) => [name, name])]);
  $("loras").hidden = !loras.length;
  if (!loras.length) $("lora-scale").value = "";
  drawCode();
}

// Hides a field that the model does not use; the value of a disabled field is not sent.
function offer(input, isUsed) {
  input.disabled = !isUsed;
  input.closest(".field").hidden = !isUsed;
}

function adaptToScheduler() {
  const model = models.find(({ name }) => name === $("model").value);
  $("steps").max = model.scheduler_max_steps?.[$("scheduler").value] ?? model.max_num_inference_steps;
}

function options(select, pairs) {
  const before = select.value;
  select.replaceChildren(...pairs.map(([value, text]) => element("option", { value }, text)));
  if (pairs.some(([value]) => value === before)) select.value = before;
}

const key = () => $("key").value.trim();

// ---- init images

async function choose(files) {
  clearErrors();
  await images.choose(files);
}

function showChosen() {
  const [first] = images.all();
  if (!sending) jobs.show({ spec: spec(), before: first?.url, samples: [], shown: 0, text: "Ready." });
  drawCode();
}

// ---- the request

function spec() {
  const found = { preview_interval_steps: 1 };
  for (const [name, value] of new FormData(form)) {
    if (value === "" || FLAGS.includes(name) || (name === "strength" && !strengthChosen)) continue;
    found[name] = NUMBERS.includes(name) ? number(value) : value;
  }
  for (const name of FLAGS) found[name] = form.elements[name].checked;
  const { lora, lora_scale: scale = 1 } = found;
  delete found.lora;
  delete found.lora_scale;
  if (lora) found.loras = [{ name: lora, scale }];
  const model = models.find(({ name }) => name === found.model);
  const steps = found.num_inference_steps ?? model?.default_num_inference_steps;
  // A job of one step has no previews.
  if (steps * (found.strength ?? model?.default_strength) < 2) delete found.preview_interval_steps;
  return found;
}

// A seed may have 64 bits, and a JavaScript number is exact up to 2^53, so a long seed is sent as text.
const number = (text) => (/^\d{16,}$/.test(text) ? text : Number(text));

function restore(earlier) {
  strengthChosen = earlier.strength !== undefined;
  const [lora] = earlier.loras ?? [];
  const values = { ...earlier, lora: lora?.name, lora_scale: lora?.scale };
  for (const { name } of form.elements) {
    if (!name) continue;
    if (FLAGS.includes(name)) form.elements[name].checked = earlier[name] ?? false;
    else form.elements[name].value = values[name] ?? "";
  }
  adaptToModel();
  drawCode();
}

function drawCode() {
  $("strength-value").value = $("strength").value;
  const context = { file: images.all()[0]?.name ?? "image.jpg", origin: new URL(".", location.href).href.slice(0, -1), grpc, grpcTls, key: devKey && key() === devKey ? devKey : "YOUR-KEY" };
  $("code").textContent = code($("language").value, spec(), context);
}

// ---- jobs

async function generate(event) {
  event.preventDefault();
  if (sending) return;
  clearErrors();
  const request = spec();
  const chosen = images.all().length ? images.all() : [null];
  sending = new AbortController();
  busy(true);
  try {
    for (const [index, image] of chosen.entries()) await create(request, image, index === 0, sending.signal);
  } finally {
    sending = null;
    busy(false);
  }
}

// Creates the job of one init image; null: the service reports that it is missing.
async function create(request, image, isFirst, signal) {
  const job = { spec: request, before: image?.url, thumbnail: image?.thumbnail, samples: [], shown: 0, waiting: true, text: "Sending the request…" };
  if (isFirst) jobs.show(job);
  if (isFirst && matchMedia("(max-width: 860px)").matches) $("stage").scrollIntoView({ behavior: "smooth" });
  if (signal.aborted) return;
  try {
    const init_image = image ? { init_image: { data: await base64(image.blob) } } : {};
    jobs.add(job, (await service.create({ ...request, ...init_image }, key(), signal)).id);
  } catch (error) {
    const text = signal.aborted ? "Cancelled." : "The request failed; see the form.";
    jobs.show(Object.assign(job, { waiting: undefined, text }));
    if (!signal.aborted) showError(error);
    sending?.abort(); // The next requests would fail alike.
  }
}

function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new service.ServiceError("The file cannot be read.", {}, 400));
    reader.readAsDataURL(blob);
  });
}

async function stop() {
  if (!jobs.isRunning()) return sending?.abort(); // There is no job yet.
  try {
    await service.cancel(jobs.current().id, key());
  } catch (error) {
    showError(error);
  }
}

function busy(is) {
  $("generate").disabled = is;
  document.body.classList.toggle("sending", is);
  $("cancel").hidden = !is && !jobs.isRunning();
  $("stage").setAttribute("aria-busy", is);
}

const named = (files) => [...files].map((blob) => ({ blob, name: blob.name || "pasted.png" }));

// ---- listeners

form.addEventListener("submit", generate);
$("strength").addEventListener("input", () => (strengthChosen = true));
form.addEventListener("input", ({ target }) => {
  clearField(target);
  drawCode();
});
$("cancel").addEventListener("click", stop);
$("language").addEventListener("change", drawCode);
$("model").addEventListener("change", adaptToModel);
$("scheduler").addEventListener("change", adaptToScheduler);
$("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText($("code").textContent);
  $("copy").textContent = "Copied";
});
$("key").addEventListener("change", () => {
  sessionStorage.setItem(STORED_KEY, key());
  loadCapabilities();
});
$("file").addEventListener("change", ({ target }) => target.files.length && choose(named(target.files)));
$("file").addEventListener("chosen", showChosen);
$("example").addEventListener("click", async () => choose([{ blob: await service.example(), name: "cat.jpg" }]));
$("split").addEventListener("input", ({ target }) => $("compare").style.setProperty("--split", `${target.value}%`));
for (const kind of ["dragover", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    if (kind === "drop" && event.dataTransfer.files.length) choose(named(event.dataTransfer.files));
  });
}
document.addEventListener("paste", ({ clipboardData }) => {
  if (clipboardData.files.length) choose(named(clipboardData.files));
});
jobs.begin((job) => restore(job.spec));
begin();
