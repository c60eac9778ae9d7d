// Creates an image with Connect and shows its previews; resumes the stream if the connection breaks.
// node connect.js IMAGE PROMPT STRENGTH; IMG2IMG_SERVER and IMG2IMG_API_KEY name the server and the key.
import { randomUUID } from "node:crypto";
import { readFile, writeFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { create } from "@bufbuild/protobuf";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { BadRequestSchema, ErrorInfoSchema } from "./google/rpc/error_details_pb.js";
import type { JobEvent } from "./img2img/v1/event_pb.js";
import { ImageFormat } from "./img2img/v1/job_pb.js";
import { GenerateRequestSchema, Img2ImgService } from "./img2img/v1/service_pb.js";

const [image = "", prompt = "", strength = "0.7"] = process.argv.slice(2);
const transport = createGrpcTransport({
  baseUrl: `http://${process.env.IMG2IMG_SERVER ?? "127.0.0.1:50051"}`,
  pingIntervalMs: 10_000, // without pings, a connection that is lost silently is not noticed
});
const client = createClient(Img2ImgService, transport);
const headers = { authorization: `Bearer ${process.env.IMG2IMG_API_KEY ?? "dev-key"}` };

const request = create(GenerateRequestSchema, {
  requestId: randomUUID(), // so that a second Generate does not create a second job
  spec: {
    prompt,
    strength: Number(strength),
    seed: 1n,
    initImage: { source: { case: "data", value: await readFile(image) } },
    outputFormat: ImageFormat.PNG,
    previewIntervalSteps: 1,
  },
});
let job = ""; // the name, as soon as it is known
let sequence = 0n; // number of the last event

// Prints an event and stores its image. Returns whether it is the last one of the job.
async function handle(event: JobEvent): Promise<boolean> {
  job = event.job || job;
  if (event.sequence > sequence) sequence = event.sequence;
  const kind = event.event;
  switch (kind.case) {
    case "step":
      console.log(`${sequence} step ${kind.value.step} of ${kind.value.total}`);
      return false;
    case "preview":
      await writeFile("preview.jpg", kind.value.image!.data);
      console.log(`${sequence} preview`);
      return false;
    case "sampleFinished":
      await writeFile("output.png", kind.value.image!.data);
      console.log(`${sequence} output.png`);
      return false;
    case "succeeded":
    case "cancelled":
      console.log(`${sequence} ${kind.case}`);
      return true;
    case "failed":
      console.log(`${sequence} failed: ${kind.value.job!.error!.reason}`);
      return true;
    default: // snapshots, heartbeats and kinds that later versions add
      return false;
  }
}

// Reads one stream. Returns whether the job has ended.
async function follow(): Promise<boolean> {
  const stream = job
    ? client.watchJob({ name: job, afterSequence: sequence }, { headers })
    : client.generate(request, { headers });
  for await (const response of stream) {
    if (await handle(response.event!)) return true;
  }
  return false;
}

// Prints an error with its details.
function explain(error: ConnectError): void {
  console.error(`${Code[error.code]}: ${error.rawMessage}`);
  for (const info of error.findDetails(ErrorInfoSchema)) console.error(`reason ${info.reason}`);
  for (const { fieldViolations } of error.findDetails(BadRequestSchema)) {
    for (const violation of fieldViolations) {
      console.error(`field ${violation.field} ${violation.reason}: ${violation.description}`);
    }
  }
}

for (let failures = 0; ; ) {
  const before = sequence;
  try {
    if (await follow()) break;
  } catch (caught) {
    const error = ConnectError.from(caught);
    failures = sequence > before ? 1 : failures + 1;
    // Connect for Node reports a reset connection as Aborted.
    if (![Code.Unavailable, Code.Aborted].includes(error.code) || failures > 5) {
      explain(error);
      process.exitCode = 1;
      break;
    }
    console.log(`connection lost after event ${sequence}`);
    await sleep(100 * 2 ** failures);
  }
}
