// Writes the request of the form as code. The code reads the key from the environment.
const KEY = 'export IMG2IMG_API_KEY=';
const FORMATS = { IMAGE_FORMAT_JPEG: "jpeg", IMAGE_FORMAT_PNG: "png", IMAGE_FORMAT_WEBP: "webp" };
const NOT_IN_CONTRACT = ["model", "scheduler", "output_format", "preview_interval_steps", "loras"];

// Stands for the init image in the JSON text. It is random, so no prompt contains it.
const PLACEHOLDER = crypto.getRandomValues(new Uint32Array(4)).join();

// `context` has the file name of the init image, the origin, the gRPC address and the key to print.
export function code(language, spec, context) {
  return { python, curl, contract }[language](spec, context);
}

function python(spec, { file, grpc, grpcTls, key }) {
  const { prompt = "", preview_interval_steps: _, ...options } = spec;
  const lines = Object.entries(options).map(([name, value]) => `        ${name}=${literal(name, value)},`);
  return `# ${KEY}${key}
import os
from pathlib import Path

from img2img_client import Client

with Client(${JSON.stringify(grpc)}, ${grpcTls ? "tls=True, " : ""}api_key=os.environ["IMG2IMG_API_KEY"]) as client:
    result = client.generate(
        ${JSON.stringify(prompt)},
        Path(${JSON.stringify(file)}),
${lines.join("\n")}
    )
    for index, image in enumerate(result.images):
        image.save(f"image-{index}.${FORMATS[spec.output_format] ?? "png"}")
        print(image.url, image.seed)
`;
}

function literal(name, value) {
  if (typeof value === "boolean") return value ? "True" : "False";
  if (name === "seed") return String(value); // an integer of any length
  if (name === "loras") return JSON.stringify(Object.fromEntries(value.map((lora) => [lora.name, lora.scale])));
  return JSON.stringify(name === "output_format" ? FORMATS[value] : value);
}

function curl(spec, context) {
  const body = { spec: { ...spec, init_image: { data: PLACEHOLDER } } };
  return `${post(body, "v1/jobs", context)}
# The events of the job. ID is the id in the response:
curl -sN ${context.origin}/v1/jobs/ID/events \\
  -H "Authorization: Bearer $IMG2IMG_API_KEY"
`;
}

function contract(spec, context) {
  const kept = Object.entries(spec).filter(([name]) => !NOT_IN_CONTRACT.includes(name));
  const body = { ...Object.fromEntries(kept), init_image: PLACEHOLDER };
  return `# ModelsLab's API has no model, scheduler, LoRA, format or previews: the service's defaults apply.
# A side that is not given is 512.
${post(body, "api/v6/realtime/img2img", context)}`;
}

// The only %s of the printf format is the place of the init image; the rest is escaped.
function post(body, path, { file, origin, key }) {
  const plain = (text) => quoted(text.replaceAll("\\", "\\\\").replaceAll("%", "%%"));
  const [head, tail] = JSON.stringify(body).split(JSON.stringify(PLACEHOLDER)).map(plain);
  return `${KEY}${key}
printf '${head}"%s"${tail}' "$(base64 -w0 -- '${quoted(file)}')" |
  curl -s ${origin}/${path} \\
  -H "Authorization: Bearer $IMG2IMG_API_KEY" -d @-
`;
}

const quoted = (text) => text.replaceAll("'", `'\\''`);
