// Client of SLSNet Server, for browsers and Node. It keeps no photo and writes none.

import type { components } from "./openapi.js";

/** A file's bytes; in Node also the path of a file. */
export type Photo = Blob | ArrayBuffer | ArrayBufferView | string | URL;

export interface ClientOptions {
  /** If the server has keys. */
  apiKey?: string;
  /** For a photo, all repetitions included. The server is told what is left. Default: 30,000. */
  deadlineMs?: number;
  /** How often a photo is sent again where the server is full or not reached. Default: 4. */
  retries?: number;
}

export interface SegmentOptions {
  /** Lesion is where the probability is above it. Default: 0.5. */
  threshold?: number;
  /** Whether to leave only the largest region, without its holes. */
  clean?: boolean;
  /** Whether to fetch probabilities too, 2.7 bytes for each pixel of the photo, rounded to 16 bits. */
  probability?: boolean;
  /** Whether to let interactive requests go first. */
  bulk?: boolean;
  /** Instead of the client's. */
  deadlineMs?: number;
  /** Ends the request; the promise is rejected with its reason. */
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
  /** What the server says of the photo's quality; null where it says nothing. */
  quality: unknown;
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

/** Asks an SLSNet Server. */
export class Client {
  /** `url` is the server's, such as `http://127.0.0.1:8000`. */
  constructor(url: string | URL, options?: ClientOptions);

  /**
   * Segment one photo. Throws a `SlsnetError` where the server refused, failed, was not reached, or
   * took too long; a `TypeError` or Node's own error where the photo cannot be read here.
   */
  segment(photo: Photo, options?: SegmentOptions): Promise<Result>;

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
