// Calls the gateway with OpenAI's client for Node and prints the results as JSON.
// node openai_sdk.mjs BASE_URL IMAGE; from a folder whose node_modules has openai.
import fs from "node:fs";
import { createRequire } from "node:module";

const OpenAI = createRequire(`${process.cwd()}/`)("openai");
const [, , baseURL, file] = process.argv;
const client = new OpenAI({ baseURL, apiKey: "dev-key", maxRetries: 0 });
const image = () => OpenAI.toFile(fs.readFileSync(file), "harbour.jpg", { type: "image/jpeg" });
const error = async (work) => {
  try {
    await work();
  } catch (error) {
    return [error.constructor.name, error.status ?? null, error.code ?? null, error.param ?? null];
  }
  return [];
};
const found = {};

found.models = [];
for await (const model of client.models.list()) found.models.push(model.id);

const { data, response } = await client.images
  .edit({ image: await image(), prompt: "a harbour", n: 2, size: "256x256", quality: "high", strength: 0.25 })
  .withResponse();
found.images = data.data.map((each) => each.b64_json.slice(0, 11));
found.job = response.headers.get("img2img-job");
found.ignored = response.headers.get("img2img-ignored-fields");

const linked = await client.images.edit({ image: [await image()], prompt: "a harbour", response_format: "url" });
found.links = linked.data.map((each) => each.url);

const stream = await client.images.edit({
  image: await image(), prompt: "a harbour", stream: true, partial_images: 2, num_inference_steps: 12,
});
found.events = [];
for await (const event of stream) found.events.push([event.type, event.b64_json.slice(0, 4)]);

found.errors = [
  await error(async () => client.images.edit({ image: await image(), prompt: "a harbour", n: 7 })),
  await error(async () => client.images.edit({ image: await image(), prompt: "a harbour", model: "gpt-image-1" })),
  await error(async () => client.images.generate({ prompt: "a harbour" })),
  await error(async () => new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 }).models.retrieve("fake")),
  await error(async () => client.images.edit({ image: await image(), prompt: "fail:out of ink" })),
  await error(async () => {
    const failing = await client.images.edit({ image: await image(), prompt: "fail:out of ink", stream: true });
    for await (const event of failing) found.events.push(event.type);
  }),
  await error(async () => client.images.edit({ image: await image(), prompt: "hold:it" }, { timeout: 1000 })),
];
console.log(JSON.stringify(found));
