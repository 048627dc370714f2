// "Compute on this device": photos stay in the browser, and the network comes to them.

import { computeBy } from "../segment.js";

const KEY = "slsnet-compute";

/** The service worker's. */
const CACHE = "slsnet-page";

const here = (name) => new URL(name, import.meta.url).href;

/** Where the page has no server, there is no choice. */
const alone = document.documentElement.dataset.server === "none";

const privacy = document.getElementById("privacy");
const PRIVACY = {
  server: privacy.textContent,
  device:
    "Photos and camera frames stay on this device, and nothing of them is kept. This browser keeps the" +
    " page’s own files and the network, so that it works offline.",
};

let worker = null;
let ready = null;
let count = 0;
const waiting = new Map();

// What files may be chosen: all that the server reads, or what `pixels.js` does.
const READS = "image/jpeg,image/png,image/webp,image/bmp";
const choosers = [...document.querySelectorAll("#choose, #another")].map((input) => [input, input.accept]);

// Before the page can take a photo: who has chosen this device sends none.
const listed = fetch(here("files.json")).then((response) => response.json());
listed.catch(() => {}); // Who chooses this device is told.
offer(document.getElementById("compute"));

/** Show the choice, and take the one that was made before. */
function offer(place) {
  const line = document.createElement("p");
  line.className = "hint";
  line.id = "compute-status";
  line.setAttribute("role", "status");
  if (alone) {
    place.replaceChildren(line);
    choose(true, line);
    return;
  }
  const box = document.createElement("input");
  box.type = "checkbox";
  box.id = "compute-here";
  box.checked = remembered();
  const label = document.createElement("label");
  label.className = "check";
  label.append(box, " Compute on this device: photos do not leave it");
  place.replaceChildren(label, line);
  box.addEventListener("change", () => {
    remember(box.checked);
    choose(box.checked, line);
  });
  choose(box.checked, line);
}

async function choose(device, line) {
  computeBy(device ? local : undefined);
  const where = device ? "device" : "server";
  document.documentElement.dataset.compute = where;
  for (const [input, all] of choosers) input.accept = device ? READS : all;
  privacy.textContent = PRIVACY[where];
  line.textContent = "";
  if (!device) return;
  try {
    const files = await listed;
    line.textContent = `Loading the network into the browser: ${files.megabytes} MB, the first time only.`;
    const [{ device: way, threads }, isSame] = await Promise.all([open(files), isSameNetwork(files)]);
    const on = way === "webgpu" ? "the graphics processor" : threads > 1 ? `${threads} threads` : "one thread";
    const { name, version } = files.network;
    if (document.documentElement.dataset.compute !== "device") return;
    line.textContent =
      `Photos do not leave this device: ${name} ${version} runs here, on ${on}.` +
      (isSame ? "" : " The server has another network by now.");
    await keep(files, way);
  } catch (problem) {
    line.textContent = problem.detail ?? "The network's files do not come from the server.";
  }
}

/** Whether the server's network is the one of these files; unknown is as good. */
async function isSameNetwork({ network }) {
  if (alone) return true;
  try {
    const response = await fetch("model", { cache: "no-store" });
    return !response.ok || (await response.json()).weights_sha256 === network.weights_sha256;
  } catch {
    return true;
  }
}

/** A browser may keep nothing for a page. */
function remembered() {
  try {
    return localStorage.getItem(KEY) === "device";
  } catch {
    return false;
  }
}

function remember(device) {
  try {
    localStorage.setItem(KEY, device ? "device" : "server");
  } catch {
    // Then it is asked again next time.
  }
}

/**
 * Keep for the next time what the network needs, also without a connection. The service worker keeps
 * what passes through it, but on a first visit it starts too late for that.
 */
async function keep(files, device) {
  try {
    const cache = await caches.open(CACHE);
    const { network, trial, quality, fitness } = files.names;
    const names = [network, trial, quality, fitness, ...files.runtimes[device]].filter(Boolean);
    const own = ["files.json", "compute.js", "judge.js", "pixels.js", "worker.js"];
    for (const url of [...own, ...names.map((name) => `${files.folder}/${name}`)].map(here)) {
      if (!(await cache.match(url))) await cache.add(url);
    }
    for (const { url } of await cache.keys()) {
      const folder = /\/page\/device\/([0-9a-f]{16})\//.exec(url)?.[1];
      if (folder && folder !== files.folder) await cache.delete(url);
    }
  } catch {
    // A browser may keep nothing: it works with a connection then.
  }
}

function open(files) {
  if (ready) return ready;
  worker = new Worker(here("worker.js"), { type: "module", name: "network" });
  const started = worker;
  ready = new Promise((resolve, reject) => {
    const end = (detail) => {
      // The next photo tries anew.
      if (worker === started) worker = ready = null;
      started.terminate();
      const problem = { status: -1, detail };
      reject(problem);
      for (const { reject: refuse } of waiting.values()) refuse(problem);
      waiting.clear();
    };
    started.onerror = (event) => {
      event.preventDefault();
      end(event.message || "This browser could not start the network.");
    };
    started.onmessage = ({ data }) => {
      if (data.ready) resolve(data.ready);
      else if (data.failed) end(data.failed);
      else {
        const asked = waiting.get(data.id);
        waiting.delete(data.id);
        if (data.found) asked?.resolve(data.found);
        else asked?.reject(data.problem);
      }
    };
  });
  // Whoever waits for a photo is told; without one there may be nobody.
  ready.catch(() => {});
  const absolute = Object.entries(files.names).map(([what, name]) => [what, here(`${files.folder}/${name}`)]);
  started.postMessage({ files: Object.fromEntries(absolute) });
  return ready;
}

/** As `segment` of segment.js: a photo → its probabilities. */
async function local(photo, { signal } = {}) {
  await open(await listed);
  signal?.throwIfAborted();
  return new Promise((resolve, reject) => {
    const id = ++count;
    waiting.set(id, { resolve, reject });
    signal?.addEventListener("abort", () => {
      waiting.delete(id);
      reject(signal.reason);
    });
    worker.postMessage({ id, photo });
  });
}
