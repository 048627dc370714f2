// Frames of a camera over a WebSocket.

import { RequestRefused, ServerBusy, Unreachable, errorOf } from "./errors.js";
import { resultOf } from "./result.js";

const PROTOCOL = "slsnet.v1";

// Close code of RFC 6455, 7.4.1.
const TOO_LARGE = 1009;

/**
 * Send frames as there is room for them, and yield their answers. A connection that is lost, or that
 * the server ends because it stops or is full, is opened again after `pauseMs(repeated, error)`, until
 * that gives null; frames that were unanswered then are dropped.
 */
export async function* streamed(address, frames, { apiKey, inFlight, bytesOf, pauseMs, pause, signal, Socket }) {
  const source = frames[Symbol.asyncIterator]?.() ?? frames[Symbol.iterator]();
  const told = { taken: 0, dropped: 0, frame: null, more: true };
  // Keys never go into the URL, and a page cannot set headers here.
  const protocols = apiKey === undefined ? [PROTOCOL] : [PROTOCOL, `slsnet.key.${apiKey}`];
  const next = () => (told.frame ??= quiet(taken(source, bytesOf)));
  try {
    for (let repeated = 0; ; ) {
      const connection = new Connection(new Socket(address, protocols), signal);
      try {
        for await (const answer of connection.answers(told, next, inFlight)) {
          repeated = 0;
          yield answer;
        }
        return;
      } catch (error) {
        signal?.throwIfAborted();
        const waitMs = error instanceof ServerBusy || error instanceof Unreachable ? pauseMs(repeated++, error) : null;
        if (waitMs === null) throw error;
        await pause(waitMs, signal);
        signal?.throwIfAborted();
      } finally {
        connection.close();
      }
    }
  } finally {
    if (told.more) await source.return?.();
  }
}

/** The source's next frame, its bytes, and when it was taken. */
async function taken(source, bytesOf) {
  const { value, done } = await source.next();
  const at = performance.now();
  return done ? { done } : { at, bytes: await bytesOf(value) };
}

class Connection {
  #socket;
  #signal;
  #stopped;
  #messages = [];
  #ended = null;
  #wake = () => {};

  constructor(socket, signal) {
    this.#socket = socket;
    socket.onmessage = ({ data }) => this.#came(() => this.#messages.push(data));
    socket.onclose = ({ code, reason }) => this.#came(() => (this.#ended ??= errorOfClose(code, reason)));
    // Not every platform closes what was never open.
    socket.onerror = ({ message }) => this.#came(() => (this.#ended ??= lost(message || "no connection")));
    this.#signal = signal;
    this.#stopped = () => this.#came(() => (this.#ended ??= signal.reason));
    if (signal?.aborted) this.#stopped();
    signal?.addEventListener("abort", this.#stopped);
  }

  #came(keep) {
    keep();
    this.#wake();
  }

  /** The next message of the server; throws why there is none. */
  async #message() {
    while (!this.#messages.length) {
      if (this.#ended) throw this.#ended;
      await new Promise((resolve) => (this.#wake = resolve));
    }
    return messageOf(this.#messages.shift());
  }

  /** Frames in, answers out, until all that was sent is answered or dropped. */
  async *answers(told, next, inFlight) {
    const ready = await this.#message();
    if (ready.type !== "ready") throw errorIn(ready);
    // The server counts each connection's frames from 1, and what it drops from 0.
    const before = { ...told };
    const sent = new Map();
    let message = null;
    try {
      for (;;) {
        const frame = told.more && sent.size < inFlight ? next() : null;
        if (!frame && !sent.size) return;
        message ??= quiet(this.#message());
        const came = await Promise.race(frame ? [message, frame] : [message]);
        if (came.type) {
          message = null;
          yield answerOf(came, before, told, sent);
        } else {
          told.frame = null;
          told.more = !came.done;
          if (came.done) continue;
          sent.set(++told.taken - before.taken, came.at);
          this.#socket.send(came.bytes);
        }
      }
    } finally {
      told.dropped += sent.size;
    }
  }

  close() {
    this.#signal?.removeEventListener("abort", this.#stopped);
    this.#socket.close();
  }
}

/** What a message says of one frame; throws what ends the stream. */
function answerOf(message, before, told, sent) {
  if (message.frame === null) throw errorIn(message);
  const latencyMs = performance.now() - sent.get(message.frame);
  // Those before it that no message named were dropped.
  for (const number of sent.keys()) if (number <= message.frame) sent.delete(number);
  told.dropped = before.dropped + message.dropped;
  const failed = message.type === "error";
  return {
    index: before.taken + message.frame - 1,
    result: failed ? null : resultOf(message.result),
    error: failed ? errorIn(message) : null,
    dropped: told.dropped,
    latencyMs,
  };
}

function messageOf(text) {
  const message = JSON.parse(text);
  if (!message?.type) throw new TypeError("This is no stream of an SLSNet Server.");
  return message;
}

function errorIn({ error, retry_after_s: retryAfterS }) {
  return errorOf(error.status, error, null, retryAfterS === null ? null : 1000 * retryAfterS);
}

function errorOfClose(code, reason) {
  if (code === TOO_LARGE) return new RequestRefused(`The frame is too large: ${reason}.`, { status: 413 });
  return lost(reason || `code ${code}`);
}

function lost(why) {
  return new Unreachable(`The stream was lost: ${why}.`);
}

/** A promise that may be left: what it throws then is nobody's. */
function quiet(promise) {
  promise.catch(() => {});
  return promise;
}
