// Asks the server: repetitions, deadlines, and many photos at a time.

import { DeadlinePassed, ServerBusy, ServerFailed, Unreachable, errorOf } from "./errors.js";
import { resultOf } from "./result.js";
import { streamed } from "./stream.js";

// Before the first repetition, unless the server asks for more; each next waits twice as long, up to
// the second figure.
const [PAUSE_MS, LONGEST_PAUSE_MS] = [200, 2000];

// Timers take no longer time, and the server no infinite one; it is 24 days.
const LONGEST_DEADLINE_MS = 2 ** 31 - 1;

const ASK = ["threshold", "clean", "model", "rejectUnfit", "bulk", "deadlineMs", "signal"];
const SEGMENT = [...ASK, "probability", "features"];
const STREAM = ["inFlight", "threshold", "clean", "model", "rejectUnfit", "deadlineMs", "signal"];

export class Client {
  #address;
  #apiKey;
  #headers;
  #deadlineMs;
  #retries;
  #Socket;

  constructor(url, options = {}) {
    check(options, ["apiKey", "deadlineMs", "retries", "WebSocket"]);
    const { apiKey, deadlineMs = 30_000, retries = 4, WebSocket = globalThis.WebSocket } = options;
    this.#address = new URL(String(url).replace(/\/?$/, "/"));
    this.#apiKey = apiKey;
    this.#Socket = WebSocket;
    // The server tells the type by the bytes.
    this.#headers = { "Content-Type": "application/octet-stream" };
    if (apiKey !== undefined) this.#headers.Authorization = `Bearer ${apiKey}`;
    this.#deadlineMs = deadlineMs;
    this.#retries = retries;
  }

  async segment(photo, options = {}) {
    check(options, SEGMENT);
    const { probability = false, features = false } = options;
    const query = { mask: probability ? "probabilities" : "rle", ...(features && { features }) };
    return this.#post("segment/json", query, photo, options, (body) => resultOf(jsonOf(body)));
  }

  async segmentAs(photo, form, options = {}) {
    check(options, ASK);
    return this.#post("segment", { format: form }, photo, options, (body, type) => {
      if (type.startsWith("text/")) throw new TypeError(`it is ${type}`);
      return new Blob([body], { type });
    });
  }

  async #post(path, query, photo, options, read) {
    const { bulk = false } = options;
    const { deadlineMs: asks = this.#deadlineMs, signal } = options;
    const deadlineMs = Math.min(asks, LONGEST_DEADLINE_MS);
    const address = new URL(path, this.#address);
    address.search = new URLSearchParams({ ...asked(options), size: "original", ...query });
    // The same for every repetition, so that the server's log shows them together.
    const requestId = newId();
    const headers = { ...this.#headers, "X-Request-ID": requestId, ...(bulk && { Priority: "bulk" }) };
    const late = new DeadlinePassed("No answer came before the deadline.", { requestId });
    const ends = performance.now() + deadlineMs;
    return within(deadlineMs, late, signal, async (stop) => {
      const body = await bytesOf(photo);
      stop.throwIfAborted();
      return this.#ask(address, headers, body, ends, stop, read);
    });
  }

  async #ask(address, headers, body, ends, signal, read) {
    for (let repeated = 0; ; repeated++) {
      const leftMs = Math.max(1, Math.round(ends - performance.now()));
      headers = { ...headers, "X-Request-Timeout-Ms": String(leftMs) };
      const { result, error } = await once(address, { method: "POST", headers, body, signal }, read);
      if (result) return result;
      signal.throwIfAborted();
      const again = error instanceof ServerBusy || error instanceof Unreachable;
      const pauseMs = pauseBefore(repeated, error);
      // Where the pause ends after the deadline, the caller knows at once.
      if (!again || repeated >= this.#retries || performance.now() + pauseMs >= ends) throw error;
      await pause(pauseMs, signal);
    }
  }

  async *segmentMany(photos, { concurrency = 4, ordered = true, signal, ...options } = {}) {
    check(options, SEGMENT, ["concurrency", "ordered"]);
    if (!(concurrency >= 1)) throw new RangeError(`The concurrency is 1 or more, not ${concurrency}.`);
    const stop = new AbortController();
    const end = () => stop.abort(signal.reason);
    if (signal?.aborted) end();
    signal?.addEventListener("abort", end);
    const waiting = photos[Symbol.asyncIterator]?.() ?? photos[Symbol.iterator]();
    const tasks = [];
    let more = true;
    try {
      for (let index = 0; ; ) {
        while (more && tasks.length < concurrency) {
          const { value, done } = await waiting.next();
          more = !done;
          if (more) tasks.push(this.#task(index++, value, { bulk: true, ...options, signal: stop.signal }));
        }
        if (!tasks.length) return;
        const { task, outcome } = await (ordered ? tasks[0].done : Promise.race(tasks.map(({ done }) => done)));
        tasks.splice(tasks.indexOf(task), 1);
        signal?.throwIfAborted();
        yield outcome;
      }
    } finally {
      // What is under way ends where nobody waits for it any more.
      stop.abort();
      signal?.removeEventListener("abort", end);
      if (more) await waiting.return?.();
    }
  }

  async *stream(frames, options = {}) {
    check(options, STREAM);
    const { inFlight = 2, deadlineMs = 2000, signal } = options;
    if (!(inFlight >= 1)) throw new RangeError(`At least 1 frame is in flight, not ${inFlight}.`);
    if (!this.#Socket) throw new TypeError("There is no WebSocket here: give the client one, such as that of the package ws.");
    signal?.throwIfAborted();
    const address = new URL("stream", this.#address);
    address.protocol = address.protocol.replace("http", "ws");
    address.search = new URLSearchParams({ ...asked(options), mask: "rle", deadline_ms: Math.min(deadlineMs, LONGEST_DEADLINE_MS) });
    const pauseMs = (repeated, error) => (repeated < this.#retries ? pauseBefore(repeated, error) : null);
    const kept = { apiKey: this.#apiKey, Socket: this.#Socket, inFlight, signal };
    yield* streamed(address, frames, { ...kept, bytesOf, pauseMs, pause });
  }

  #task(index, photo, options) {
    const task = {};
    task.done = this.segment(photo, options).then(
      (result) => ({ task, outcome: { index, result, error: null } }),
      (error) => ({ task, outcome: { index, result: null, error } }),
    );
    return task;
  }
}

/** Refuse options that there are not: a misspelt `threshold` would otherwise pass unnoticed. */
function check(options, known, more = []) {
  const unknown = Object.keys(options).find((name) => !known.includes(name));
  if (unknown !== undefined) throw new TypeError(`There is no option ${unknown}: there are ${[...known, ...more].join(", ")}.`);
}

/** What photos and frames ask for alike. Servers of an earlier version do not know the last two. */
function asked({ threshold = 0.5, clean = false, model, rejectUnfit = false }) {
  return { threshold, clean, ...(model !== undefined && { model }), ...(rejectUnfit && { reject_unfit: true }) };
}

/** Run `work` until it is done, the caller's signal, or the deadline: then it throws `late`. */
async function within(ms, late, signal, work) {
  signal?.throwIfAborted();
  const stop = new AbortController();
  const timer = setTimeout(() => stop.abort(late), ms);
  const end = () => stop.abort(signal.reason);
  signal?.addEventListener("abort", end);
  const stopped = new Promise((_, reject) => {
    stop.signal.addEventListener("abort", () => reject(stop.signal.reason));
  });
  try {
    return await Promise.race([work(stop.signal), stopped]);
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", end);
  }
}

/** One request: its `result` as `read` makes it of body and type, or what was wrong as `error`. */
async function once(address, request, read) {
  const asked = request.headers["X-Request-ID"];
  let [answer, body] = [null, null];
  try {
    answer = await fetch(address, { ...request, redirect: "manual" });
    body = await answer.arrayBuffer();
  } catch (cause) {
    const why = cause?.cause?.message || cause?.message || String(cause);
    return { error: new Unreachable(`The server was not reached: ${why}.`, { requestId: asked, cause }) };
  }
  const { status, headers } = answer;
  const requestId = headers.get("X-Request-ID") ?? asked;
  if (status !== 200) {
    let document = null;
    try {
      document = jsonOf(body);
    } catch {
      // What stands between here and the server may answer in HTML.
    }
    return { error: errorOf(status, document, requestId, retryAfterMs(headers)) };
  }
  try {
    return { result: read(body, headers.get("Content-Type") ?? "") };
  } catch (cause) {
    const detail = "This is no answer of an SLSNet Server: is the address right?";
    return { error: new ServerFailed(detail, { status, requestId, cause }) };
  }
}

function jsonOf(body) {
  return JSON.parse(new TextDecoder().decode(body));
}

/** Milliseconds before a repetition: longer each time, and no less than the server asks for. */
function pauseBefore(repeated, error) {
  const grown = Math.min(LONGEST_PAUSE_MS, PAUSE_MS * 2 ** repeated) * (0.5 + Math.random() / 2);
  return Math.max(grown, error.retryAfterMs ?? 0);
}

/** Milliseconds, from either form that HTTP allows; null where it says nothing. */
function retryAfterMs(headers) {
  const said = headers.get("Retry-After") ?? "";
  if (/^\d+$/.test(said)) return 1000 * Number(said);
  const at = Date.parse(said);
  return Number.isNaN(at) ? null : Math.max(0, at - Date.now());
}

function pause(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve();
    });
  });
}

/** What is sent: a file's bytes as they are. */
async function bytesOf(photo) {
  if (photo instanceof Blob || photo instanceof ArrayBuffer || ArrayBuffer.isView(photo)) return photo;
  const isPath = typeof photo === "string" || photo instanceof URL;
  if (!isPath || typeof process === "undefined") {
    throw new TypeError("A photo is a Blob, a File, an ArrayBuffer or its view; in Node also a path.");
  }
  const { readFile } = await import("node:fs/promises");
  return readFile(photo);
}

/** 128 random bits. `crypto.randomUUID` is for secure pages only. */
function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
