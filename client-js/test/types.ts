// What a caller writes, and what the compiler must refuse; it is compiled, not run.

import { Client, type Outcome, type Result, RequestRefused, ServerBusy, SlsnetError, overlay } from "../src/index.js";

export async function use(file: File, files: AsyncIterable<Blob>): Promise<number> {
  const client = new Client("http://127.0.0.1:8000", { apiKey: "key", deadlineMs: 5000, retries: 2 });
  const result: Result = await client.segment(file, { threshold: 0.4, clean: true, rejectUnfit: true, signal: new AbortController().signal });
  const box: [number, number, number, number] | null | undefined = result.lesion.bounding_box;
  const sha: string = result.network.weights_sha256;
  // @ts-expect-error probabilities are there only where they were asked for
  result.probability.length;
  // @ts-expect-error there is no such option
  await client.segment(file, { treshold: 0.4 });
  // @ts-expect-error a number is no photo
  await client.segment(5);
  for await (const outcome of client.segmentMany(files, { concurrency: 8, ordered: false })) take(outcome);
  for await (const outcome of client.segmentMany([file, "path.jpg"])) take(outcome);
  for await (const { index, result, error } of client.stream(files, { inFlight: 1, rejectUnfit: true })) {
    if (error) continue;
    result.lesion.area + index;
  }
  // @ts-expect-error there is no such form
  await client.segmentAs(file, "gif");
  const blob: Blob = await client.segmentAs(file, "overlay");
  return (box?.[2] ?? 0) + sha.length + blob.size;
}

export function draw(picture: ImageData, result: Result): ImageData {
  const { data, width } = overlay(picture, result, { colour: [255, 0, 0] });
  // @ts-expect-error a word is no colour
  overlay(picture, result, { colour: "red" });
  return new ImageData(data, width);
}

function take(outcome: Outcome): number {
  if (outcome.result) return outcome.result.lesion.area;
  const { error } = outcome;
  if (error instanceof ServerBusy) return error.retryAfterMs ?? 0;
  if (error instanceof RequestRefused || error instanceof SlsnetError) return error.status ?? 0;
  throw error;
}
