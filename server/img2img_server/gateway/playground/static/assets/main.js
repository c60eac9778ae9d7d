// The page: a form, one job at a time, and the history of the tab.
import { code } from "./code.js";
import { apply } from "./job.js";
import * as service from "./service.js";
import * as store from "./store.js";
import { $, clearErrors, clearField, draw, element, showError, thumb } from "./view.js";

const NUMBERS = ["strength", "width", "height", "num_inference_steps", "guidance_scale", "samples", "seed", "lora_scale"];
const FLAGS = ["safety_checker", "enhance_prompt"];
const STORED_KEY = "img2img-key";
const MAX_HISTORY = 24;
const form = $("form");
const history = [];
let grpc = `${location.hostname}:50051`;
let grpcTls = false;
let devKey = "";  // the development key, if the service accepts it
let models = [];
let initImage = null; // {blob, name, url, width, height, thumbnail}
let strengthChosen = false; // false: the model's default is shown and not sent
let running = null; // an AbortController while a job runs
let shown = null;
let loaded = false; // whether the jobs from before a reload are shown again

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
    reload();
  } catch (error) {
    showError(error);
  }
}

function setLimits(limits) {
  $("samples").max = limits.max_samples;
  $("guidance").max = limits.max_guidance_scale;
}

function adaptToModel() {
  const model = models.find(({ name }) => name === $("model").value);
  if (!model) return;
  for (const side of [$("width"), $("height")]) {
    Object.assign(side, { min: model.min_side_pixels, max: model.max_side_pixels, step: model.side_multiple });
  }
  if (!strengthChosen) $("strength").value = model.default_strength;
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

// ---- init image

async function choose(blob, name) {
  clearErrors();
  const size = await createImageBitmap(blob).catch(() => ({}));  // The service reports the fault.
  const url = size.width ? URL.createObjectURL(blob) : "";
  initImage = { blob, name, url, width: size.width, height: size.height, thumbnail: size.width && store.thumbnail(size) };
  if (url) $("chosen").src = url;
  $("chosen").hidden = !url;
  $("chosen-name").textContent = size.width ? `${name}, ${size.width} x ${size.height}` : `${name} (this browser cannot display it)`;
  if (!running) draw((shown = { spec: spec(), before: url, samples: [], shown: 0, text: "Ready." }));
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
  for (const { name } of form.elements) {
    if (!name) continue;
    if (FLAGS.includes(name)) form.elements[name].checked = earlier[name];
    else form.elements[name].value = earlier[name] ?? "";
  }
  adaptToModel();
  drawCode();
}

function drawCode() {
  $("strength-value").value = $("strength").value;
  const context = { file: initImage?.name ?? "image.jpg", origin: new URL(".", location.href).href.slice(0, -1), grpc, grpcTls, key: devKey && key() === devKey ? devKey : "YOUR-KEY" };
  $("code").textContent = code($("language").value, spec(), context);
}

// ---- a job

async function generate(event) {
  event.preventDefault();
  if (running) return;
  clearErrors();
  const request = spec();
  const result = { spec: request, before: initImage?.url, thumbnail: initImage?.thumbnail, samples: [], shown: 0, waiting: true, text: "Sending the request…" };
  show(result);
  if (matchMedia("(max-width: 860px)").matches) $("stage").scrollIntoView({ behavior: "smooth" });
  await run(result, async (signal) => {
    if (initImage) request.init_image = { data: await base64(initImage.blob) };
    result.id = (await service.create(request, key(), signal)).id;
    delete request.init_image;
    store.save([result, ...history]);  // A reload of the page finds the job by this entry.
    await watch(result, signal);
  });
  delete request.init_image;
}

// Runs the form's job: disables the form until `work` has ended.
async function run(result, work) {
  const control = (running = new AbortController());
  busy(true);
  try {
    await work(control.signal);
    remember(result);
  } catch (error) {
    const known = control.signal.aborted ? "Cancelled." : error.status === 404 && "This job no longer exists.";
    Object.assign(result, { waiting: undefined, text: known || "The request failed; see the form." });
    if (shown === result) draw(result);
    if (!known) showError(error);
    store.save(history);
  } finally {
    running = null;
    busy(false);
  }
}

// Draws a job's events until it has ended.
async function watch(result, signal, after) {
  const onLost = (last) => showLost(result, last);
  for await (const event of service.follow(result.id, key(), signal, onLost, after)) {
    apply(result, event);
    if (shown === result) draw(result);
  }
}

function showLost(result, last) {
  result.text = `Connection lost; resuming after event ${last}…`;
  if (shown === result) draw(result);
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
  // There is no job yet, so the request is aborted.
  if (!shown?.id || shown.job) return running?.abort();
  try {
    await service.cancel(shown.id, key());
  } catch (error) {
    showError(error);
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
  for (const old of history.splice(MAX_HISTORY)) old.samples.forEach(({ url }) => URL.revokeObjectURL(url));
  store.save(history);
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

// Shows the tab's jobs from before a reload, and follows one that still runs.
async function reload() {
  if (loaded) return;
  loaded = true;
  const found = store.load();
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
      const index = history.indexOf(result);  // The job has expired, or another key created it.
      if (index >= 0) history.splice(index, 1);
    }
    drawHistory();
  }
}

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
begin();
