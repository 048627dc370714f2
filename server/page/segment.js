// A photo → the network's probabilities. The one module that asks for masks.

import { decode } from "./mask.js";

/** What a refusal's status means to the person at the page. */
const HEADINGS = {
  0: "The server cannot be reached.",
  400: "The server cannot read this photo.",
  401: "The server asks for a key, which this page does not have.",
  403: "The server does not let this page in.",
  404: "The server does not offer this.",
  408: "The photo took too long to arrive.",
  413: "This photo is too large.",
  415: "This is not a photo of a kind that the server reads.",
  422: "The server cannot read this photo.",
  429: "The server is busy.",
  503: "The server is not ready.",
  504: "The answer took too long.",
};

export const GONE = { status: 0, detail: "It is down, or the connection was lost." };

/** What a refusal means, in a sentence. */
export function heading({ status = -1 }) {
  if (isLocal() && [400, 415, 422].includes(status)) return "This photo cannot be read here.";
  return HEADINGS[status] ?? (status >= 500 ? "The server failed." : "Something went wrong.");
}

/** Whether the same photo again may help: the photo was not the reason. */
export function passes({ status = -1 }) {
  return [0, 408, 429].includes(status) || status >= 500 || status < 0;
}

let way = ask;

/** Whether masks are computed here, not by the server. */
export const isLocal = () => way !== ask;

/** Let `other`, which has the form of `segment`, take the server's place; without it, the server. */
export function computeBy(other = ask) {
  way = other;
}

/**
 * Find the lesion in a photo.
 *
 * `photo` is a Blob, `signal` an AbortSignal; `sent` is told the share that has been sent, if at all.
 * Gives `map` (as `decode` does), `size` (upright pixels, and EXIF's orientation of what is stored),
 * `quality` (of the mask at one half), `fitness` (whether it is a dermoscopic photo) and `pixel` (its size in
 * millimetres, across and down), where they are known, `borders` where masks are computed here, and `milliseconds` by stage. Rejects with a problem: `status`, `detail` and perhaps `request_id`.
 */
export function segment(photo, { signal, sent = () => {} } = {}) {
  return way(photo, { signal, sent });
}

function ask(photo, { signal, sent }) {
  // What the server says of a request without a body is for programs.
  if (!photo.size) return Promise.reject({ status: 400, detail: "The file is empty (0 bytes): take the original one." });
  return new Promise((resolve, reject) => {
    // Unlike `fetch`, it tells how much has been sent.
    const sending = new XMLHttpRequest();
    sending.open("POST", "segment?format=json&mask=probabilities");
    // The server tells the type by the bytes.
    sending.setRequestHeader("Content-Type", "application/octet-stream");
    sending.upload.onprogress = ({ loaded, total }) => sent(loaded / (total || 1));
    sending.onloadend = () => sent(1);
    sending.onerror = () => reject(GONE);
    sending.onabort = () => reject(signal.reason);
    sending.onload = () => {
      const type = sending.getResponseHeader("Content-Type") ?? "";
      let body = null;
      try {
        body = JSON.parse(sending.responseText);
      } catch {
        // What stands between here and the server may answer in HTML.
      }
      if (sending.status === 200 && body) {
        const milliseconds = timings(sending.getResponseHeader("Server-Timing"));
        const { quality, fitness, lesion } = body;
        const pixel = lesion.millimetres?.pixel;
        resolve({ map: decode(body.mask), size: body.image, quality, fitness, pixel, milliseconds });
      } else if (body && type.startsWith("application/problem+json")) {
        reject(body);
      } else {
        reject({ status: sending.status, detail: `It answered ${sending.status} and gave no reason.` });
      }
    };
    signal?.addEventListener("abort", () => sending.abort());
    sending.send(photo);
  });
}

/** `Server-Timing` → milliseconds by stage. */
function timings(header) {
  const entries = (header ?? "").matchAll(/(\w+);dur=([\d.]+)/g);
  return Object.fromEntries([...entries].map(([, name, duration]) => [name, Number(duration)]));
}
