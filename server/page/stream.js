// Frames → outlines: by the server's WebSocket, or one after the other where masks are computed here.

import { outlineRings } from "./mask.js";
import { segment } from "./segment.js";

/** At most so many frames are under way: one at work, one that comes after it. */
const UNDER_WAY = 2;
/** A connection that was lost is opened again, for so long. */
const PATIENCE_MS = 60_000;
const PAUSE_MS = 1000;

const CLOSED = {
  4401: "The server asks for a key, which this page does not have.",
  4403: "The server does not let this page in.",
  4422: "The server does not take frames in this way.",
  4429: "The server has no room for another camera now. Try again later.",
  1009: "The frames are too large for the server.",
};

/**
 * A connection to `/stream`.
 *
 * `found({ rings, width, height, share, unfit, grabbed, dropped })` gets each answer, `unfit` being whether
 * it is likely no dermoscopic photo, `grabbed` what was given with the frame; `word(text)` what the person should know, "" when it is over; `ended(text)` that
 * nothing more will come.
 */
export class Stream {
  #grabbed = new Map();
  #sent = 0;
  #answered = 0;
  #ready = false;
  #lostAt = 0;
  #closed = false;
  #socket = null;
  #again = 0;
  #said = "";

  constructor(threshold, { found, word, ended }) {
    Object.assign(this, { threshold, found, word, ended });
    this.#open();
  }

  get free() {
    return this.#ready && this.#sent - this.#answered < UNDER_WAY;
  }

  /** Send a frame, a Blob; only while `free`. */
  send(frame, grabbed) {
    if (!this.free) return;
    this.#sent++;
    this.#grabbed.set(this.#sent, grabbed);
    this.#socket.send(frame);
  }

  close() {
    this.#closed = true;
    clearTimeout(this.#again);
    this.#socket.close();
  }

  #open() {
    const url = new URL("stream", document.baseURI);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    url.search = new URLSearchParams({ mask: "polygons", threshold: this.threshold });
    const socket = new WebSocket(url, ["slsnet.v1"]);
    socket.onmessage = ({ data }) => this.#take(JSON.parse(data));
    socket.onclose = ({ code }) => this.#lost(code);
    this.#socket = socket;
    this.#sent = this.#answered = 0;
    this.#grabbed.clear();
  }

  #take(message) {
    if (message.type === "ready") {
      this.#ready = true;
      this.#said = "";
      this.word("");
      return;
    }
    if (message.frame === null) {
      this.#said = message.error.detail;
      return;
    }
    this.#answered = message.frame;
    const grabbed = this.#grabbed.get(message.frame);
    for (const number of this.#grabbed.keys()) if (number <= message.frame) this.#grabbed.delete(number);
    if (message.type === "error") {
      this.word(message.error.detail);
      return;
    }
    const { mask, lesion, image, fitness } = message.result;
    this.word("");
    this.found({
      rings: mask.polygons.flat(), width: image.width, height: image.height, share: lesion.area_fraction,
      unfit: fitness?.unfit, grabbed, dropped: message.dropped,
    });
  }

  async #lost(code) {
    if (this.#ready) this.#lostAt = performance.now();
    this.#ready = false;
    if (this.#closed) return;
    const told = CLOSED[code];
    const worked = this.#lostAt && performance.now() - this.#lostAt < PATIENCE_MS;
    if (told) this.ended([told, this.#said].filter(Boolean).join(" "));
    else if (worked || code === 4503) {
      this.word("The connection to the server was lost; trying again.");
      this.#again = setTimeout(() => this.#open(), PAUSE_MS);
    } else this.ended(await unopened());
  }
}

/** Why the connection could not be opened: the browser does not say. */
async function unopened() {
  try {
    const { status } = await fetch("stream", { cache: "no-store" });
    if (status === 404) return "This server does not offer live masks.";
    if (status === 401) return CLOSED[4401];
    return "The server refused the connection. A proxy in front of it may not let WebSocket through.";
  } catch {
    return "The server cannot be reached.";
  }
}

/** The same, computed by `segment`: where the page computes the masks itself. */
export class Sequence {
  #busy = false;
  #stop = new AbortController();

  constructor(threshold, { found, word }) {
    Object.assign(this, { threshold, found, word });
  }

  get free() {
    return !this.#busy && !this.#stop.signal.aborted;
  }

  async send(frame, grabbed) {
    this.#busy = true;
    try {
      const { map, size, fitness } = await segment(frame, { signal: this.#stop.signal });
      const { width, height } = size;
      let above = 0;
      for (const value of map.values) if (value > this.threshold) above++;
      this.word("");
      const rings = outlineRings(map, width, height, this.threshold);
      const share = above / map.values.length;
      this.found({ rings, width, height, share, unfit: fitness?.unfit, grabbed, dropped: 0 });
    } catch (problem) {
      if (!this.#stop.signal.aborted) this.word(problem.detail ?? String(problem));
    } finally {
      this.#busy = false;
    }
  }

  close() {
    this.#stop.abort();
  }
}
