// Client of SLSNet Server, for browsers and Node. It keeps no photo and writes none.

import type { components } from "./openapi.js";

/** A file's bytes; in Node also the path of a file. */
export type Photo = Blob | ArrayBuffer | ArrayBufferView | string | URL;

export interface ClientOptions {
  /** If the server has keys. */
  apiKey?: string;
  /** For a photo, all repetitions included. The server is told what is left. Default: 30,000. */
  deadlineMs?: number;
  /** How often a photo is sent again, or a stream opened, where the server is full or not reached. Default: 4. */
  retries?: number;
  /** What opens streams, where there is none of the platform's own: before Node 22, that of the package ws. */
  WebSocket?: typeof globalThis.WebSocket;
}

/** The forms of `segmentAs`: the mask or what is drawn or told of it, as a file. */
export type Form = "png" | "overlay" | "overlay-png" | "probability8" | "probability16" | "npy" | "svg" | "coco";

export interface AskOptions {
  /** Lesion is where the probability is above it. Default: 0.5. */
  threshold?: number;
  /** Whether to leave only the largest region, without its holes. */
  clean?: boolean;
  /** Name of the network, of those that the server has. Default: the server's default one. */
  model?: string;
  /** Whether a picture that is likely no dermoscopic photo is refused, and not only told of in `fitness`. */
  rejectUnfit?: boolean;
  /** Whether to let interactive requests go first. */
  bulk?: boolean;
  /** Instead of the client's. */
  deadlineMs?: number;
  /** Ends the request; the promise is rejected with its reason. */
  signal?: AbortSignal;
}

export interface SegmentOptions extends AskOptions {
  /**
   * Whether to fetch probabilities too, 2.7 bytes for each pixel of the photo, rounded to 16 bits. The mask is then
   * made of them, so pixels whose probability is within 1/131070 of the threshold may differ from `lesion`'s figures.
   */
  probability?: boolean;
  /** Whether to fetch measurements of shape and colours, which are no diagnosis. */
  features?: boolean;
}

export interface StreamOptions {
  /** Frames that are unanswered at the same time, at most. Default: 2, so one is on its way meanwhile. */
  inFlight?: number;
  threshold?: number;
  clean?: boolean;
  model?: string;
  rejectUnfit?: boolean;
  /** Within which a frame's mask is of use. Default: 2,000. */
  deadlineMs?: number;
  /** Ends the stream; the loop then throws its reason. */
  signal?: AbortSignal;
}

export interface ManyOptions extends SegmentOptions {
  /** Photos at work at the same time, at most. Default: 4. */
  concurrency?: number;
  /** Whether outcomes come in the photos' order; otherwise as they get done. Default: true. */
  ordered?: boolean;
}

export interface Result {
  /** 1 is lesion; row by row, upright. */
  mask: Uint8Array;
  /** 0 to 1, row by row, upright; null unless it was asked for. */
  probability: Float32Array | null;
  /** Pixels of the photo, upright. */
  width: number;
  height: number;
  /** How good the mask is likely to be; null where the server does not know. */
  quality: components["schemas"]["QualityAnswer"] | null;
  /** Whether it is a dermoscopic photo at all; null where the server does not know. */
  fitness: components["schemas"]["FitnessAnswer"] | null;
  /** Measurements of shape and colours; null unless they were asked for, or without a lesion. */
  features: components["schemas"]["FeaturesAnswer"] | null;
  /** The lesion that was found, in pixels of the mask. */
  lesion: components["schemas"]["LesionAnswer"];
  network: components["schemas"]["ModelId"];
  threshold: number;
  clean: boolean;
  /** Milliseconds in the server, by stage. */
  timingsMs: Record<string, number>;
  requestId: string;
}

/** One photo of many: it has either `result` or `error`. `index` counts the photos from 0. */
export type Outcome =
  | { index: number; result: Result; error: null }
  | { index: number; result: null; error: unknown };

/** The answer to one frame of a stream: it has either `result` or `error`. `index` counts the frames from 0. */
export type Streamed = {
  index: number;
  /** Frames of the stream up to now that were dropped: for a newer one, or with a lost connection. */
  dropped: number;
  /** From when the frame was taken from its source to its answer. */
  latencyMs: number;
} & ({ result: Result; error: null } | { result: null; error: SlsnetError });

/** RGBA, row by row, such as an `ImageData`. */
export interface Picture {
  data: Uint8ClampedArray | Uint8Array;
  width: number;
  height: number;
}

/**
 * A copy of an upright picture with the outline of its photo's mask over it, for
 * `new ImageData(data, width)`. `colour` is RGB, 0 to 255. Throws a `RangeError` where the two differ
 * in size.
 */
export function overlay(
  picture: Picture,
  result: Pick<Result, "mask" | "width" | "height">,
  options?: { colour?: [number, number, number] },
): { data: Uint8ClampedArray<ArrayBuffer>; width: number; height: number };

/** Asks an SLSNet Server. An option that there is not is a `TypeError`. */
export class Client {
  /** `url` is the server's, such as `http://127.0.0.1:8000`. */
  constructor(url: string | URL, options?: ClientOptions);

  /**
   * Segment one photo. Throws a `SlsnetError` where the server refused, failed, was not reached, or
   * took too long; a `TypeError` or Node's own error where the photo cannot be read here.
   */
  segment(photo: Photo, options?: SegmentOptions): Promise<Result>;

  /** Segment one photo into a file of another form; errors as for `segment`. */
  segmentAs(photo: Photo, form: Form, options?: AskOptions): Promise<Blob>;

  /**
   * Segment the frames of a camera, over one WebSocket. The next frame is taken once there is room for
   * it, so a source that gives its latest picture when it is asked keeps the latency low. A stream that
   * is lost, or that the server ends because it stops or is full, is opened again `retries` times in a
   * row; what was unanswered then is dropped. It ends with its source. Throws a `SlsnetError` where the
   * server refused the stream or was not reached; what is wrong with one frame is in its answer only.
   */
  stream(frames: Iterable<Photo> | AsyncIterable<Photo>, options?: StreamOptions): AsyncGenerator<Streamed, void, void>;

  /**
   * Segment many photos, which are taken one by one, as there is room; what is wrong with one is in
   * its own outcome only. `bulk` is on unless the options say otherwise. The deadline is each photo's.
   */
  segmentMany(
    photos: Iterable<Photo> | AsyncIterable<Photo>,
    options?: ManyOptions,
  ): AsyncGenerator<Outcome, void, void>;
}

/** Any error between client and server, with what the server's problem document says. */
export class SlsnetError extends Error {
  readonly detail: string;
  /** Of HTTP; null where no answer came. */
  readonly status: number | null;
  readonly title: string;
  readonly type: string;
  /** Finds the line in the server's log. */
  readonly requestId: string | null;
  /** After which the server wants to be asked again, if it said so. */
  readonly retryAfterMs: number | null;
}

/** There is no API key, or it does not open this server (401, 403). */
export class KeyRefused extends SlsnetError {}
/** The photo or a parameter is wrong; the same request will be refused again (other 4xx). */
export class RequestRefused extends SlsnetError {}
/** The server is full, or does not take requests now (429, 503). */
export class ServerBusy extends SlsnetError {}
/** The answer did not come in time (504, 408, or the client's own clock). */
export class DeadlinePassed extends SlsnetError {}
/** The server failed, or something else than an SLSNet Server answered. */
export class ServerFailed extends SlsnetError {}
/** No connection, or it was lost before the answer was whole. */
export class Unreachable extends SlsnetError {}

export type { components } from "./openapi.js";
