// The server's state, beside the dot at the top.

import { byId } from "./dom.js";

const PAUSE_MS = 10_000;
const PAUSE_GONE_MS = 2_000;

let pause = 0;

/** The probabilities at the tight and the generous outline of the server's network, if they are known. */
export let borders = null;

/** Tell it now and from time to time; nothing where the page was written without a server. */
export async function tellServer() {
  if (document.documentElement.dataset.server === "none") return;
  clearTimeout(pause);
  const line = byId("server");
  let told;
  try {
    const response = await fetch("model", { cache: "no-store" });
    const model = response.ok ? await response.json() : null;
    borders = model?.borders ?? null;
    told = model
      ? `${model.name} ${model.version} · ${model.backend.name}`
      : response.status === 503
        ? "The network is being loaded"
        : `The server answers ${response.status}`;
    line.dataset.ready = String(response.ok);
  } catch {
    told = "The server cannot be reached";
    line.dataset.ready = "false";
  }
  // Screen readers tell changes alone.
  if (line.textContent !== told) line.textContent = told;
  clearTimeout(pause);
  pause = setTimeout(tellServer, line.dataset.ready === "true" ? PAUSE_MS : PAUSE_GONE_MS);
}
