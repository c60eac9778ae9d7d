// The request of the form as code. The key is read from the environment, never written down.
const KEY = 'export IMG2IMG_API_KEY=';
const FORMATS = { IMAGE_FORMAT_JPEG: "jpeg", IMAGE_FORMAT_PNG: "png", IMAGE_FORMAT_WEBP: "webp" };
const NOT_IN_CONTRACT = ["model", "scheduler", "output_format", "preview_interval_steps", "lora", "lora_scale"];

const PLACE = crypto.getRandomValues(new Uint32Array(4)).join(); // where the picture goes: in no prompt

// `about`: file (name of the picture), origin, grpc (address), key (what to show for it).
export function code(language, spec, about) {
  return { python, curl, contract }[language](spec, about);
}

function python(spec, { file, grpc, key }) {
  const { prompt = "", preview_interval_steps: _, ...options } = spec;
  const lines = Object.entries(options).map(([name, value]) => `        ${name}=${literal(name, value)},`);
  return `# ${KEY}${key}
import os
from pathlib import Path

from img2img_client import Client

with Client(${JSON.stringify(grpc)}, api_key=os.environ["IMG2IMG_API_KEY"]) as client:
    result = client.generate(
        ${JSON.stringify(prompt)},
        Path(${JSON.stringify(file)}),
${lines.join("\n")}
    )
    for index, picture in enumerate(result.pictures):
        picture.save(f"picture-{index}.${FORMATS[spec.output_format] ?? "png"}")
        print(picture.url, picture.seed)
`;
}

function literal(name, value) {
  if (typeof value === "boolean") return value ? "True" : "False";
  if (name === "seed") return String(value); // a number, however long
  return JSON.stringify(name === "output_format" ? FORMATS[value] : value);
}

function curl(spec, about) {
  const body = { spec: { ...spec, init_image: { data: PLACE } } };
  return `${post(body, "v1/jobs", about)}
# and the events of the job, by the id in the answer:
curl -sN ${about.origin}/v1/jobs/ID/events \\
  -H "Authorization: Bearer $IMG2IMG_API_KEY"
`;
}

function contract(spec, about) {
  const kept = Object.entries(spec).filter(([name]) => !NOT_IN_CONTRACT.includes(name));
  const body = { ...Object.fromEntries(kept), init_image: PLACE };
  return `# Model, scheduler, LoRA, format and previews are not in this contract: the service's own are used.
${post(body, "api/v6/realtime/img2img", about)}`;
}

// printf's only %s is the picture's place; everything else is taken literally.
function post(body, path, { file, origin, key }) {
  const plain = (text) => quoted(text.replaceAll("\\", "\\\\").replaceAll("%", "%%"));
  const [head, tail] = JSON.stringify(body).split(JSON.stringify(PLACE)).map(plain);
  return `${KEY}${key}
printf '${head}"%s"${tail}' "$(base64 -w0 -- '${quoted(file)}')" |
  curl -s ${origin}/${path} \\
  -H "Authorization: Bearer $IMG2IMG_API_KEY" -d @-
`;
}

const quoted = (text) => text.replaceAll("'", `'\\''`);
