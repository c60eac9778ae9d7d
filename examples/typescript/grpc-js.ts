// Creates an image with @grpc/grpc-js and shows its previews; resumes the stream if the connection breaks.
// node grpc-js.js IMAGE PROMPT STRENGTH; IMG2IMG_SERVER and IMG2IMG_API_KEY name the server and the key.
import { randomUUID } from "node:crypto";
import { readFile, writeFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { credentials, Metadata, status, type ClientReadableStream, type ServiceError } from "@grpc/grpc-js";
import { BadRequest, ErrorInfo } from "./google/rpc/error_details.js";
import { Status } from "./google/rpc/status.js";
import type { JobEvent } from "./img2img/v1/event.js";
import { ImageFormat, JobSpec } from "./img2img/v1/job.js";
import {
  GenerateRequest,
  Img2ImgServiceClient,
  WatchJobRequest,
  type GenerateResponse,
  type WatchJobResponse,
} from "./img2img/v1/service.js";

const [image = "", prompt = "", strength = "0.7"] = process.argv.slice(2);
const client = new Img2ImgServiceClient(process.env.IMG2IMG_SERVER ?? "127.0.0.1:50051", credentials.createInsecure(), {
  "grpc.max_receive_message_length": -1, // a large PNG exceeds the default of 4 MiB
  "grpc.keepalive_time_ms": 10_000, // without pings, a connection that is lost silently is not noticed
  "grpc.keepalive_timeout_ms": 10_000,
});
const key = new Metadata();
key.set("authorization", `Bearer ${process.env.IMG2IMG_API_KEY ?? "dev-key"}`);

const request = GenerateRequest.fromPartial({
  requestId: randomUUID(), // so that a second Generate does not create a second job
  spec: JobSpec.fromPartial({
    prompt,
    strength: Number(strength),
    seed: 1n,
    initImage: { source: { $case: "data", value: await readFile(image) } },
    outputFormat: ImageFormat.IMAGE_FORMAT_PNG,
    previewIntervalSteps: 1,
  }),
});
let job = ""; // the name, as soon as it is known
let sequence = 0n; // number of the last event

// Prints an event and stores its image. Returns whether it is the last one of the job.
async function handle(event: JobEvent): Promise<boolean> {
  job = event.job || job;
  if (event.sequence > sequence) sequence = event.sequence;
  const kind = event.event;
  switch (kind?.$case) {
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
      console.log(`${sequence} ${kind.$case}`);
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
  const stream: ClientReadableStream<GenerateResponse | WatchJobResponse> = job
    ? client.watchJob(WatchJobRequest.fromPartial({ name: job, afterSequence: sequence }), key)
    : client.generate(request, key);
  for await (const response of stream as AsyncIterable<GenerateResponse | WatchJobResponse>) {
    if (await handle(response.event!)) return true;
  }
  return false;
}

// Prints an error with its details.
function explain(error: ServiceError): void {
  const [data] = error.metadata?.get("grpc-status-details-bin") ?? [];
  console.error(`${status[error.code]}: ${error.details}`);
  for (const detail of data ? Status.decode(data as Buffer).details : []) {
    if (detail.typeUrl.endsWith("/google.rpc.ErrorInfo")) {
      console.error(`reason ${ErrorInfo.decode(detail.value).reason}`);
    } else if (detail.typeUrl.endsWith("/google.rpc.BadRequest")) {
      for (const violation of BadRequest.decode(detail.value).fieldViolations) {
        console.error(`field ${violation.field} ${violation.reason}: ${violation.description}`);
      }
    }
  }
}

for (let failures = 0; ; ) {
  const before = sequence;
  try {
    if (await follow()) break;
  } catch (caught) {
    const error = caught as ServiceError;
    failures = sequence > before ? 1 : failures + 1;
    if (error.code !== status.UNAVAILABLE || failures > 5) {
      explain(error);
      process.exitCode = 1;
      break;
    }
    console.log(`connection lost after event ${sequence}`);
    await sleep(100 * 2 ** failures);
  }
}
client.close();
