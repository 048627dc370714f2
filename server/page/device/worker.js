// Runs the network in the browser, off the page's thread: photos in, probabilities out.

import { fitnessOf, qualityOf } from "./judge.js";
import { PhotoError, SIDE, squareOf } from "./pixels.js";

/** The largest difference in probability from the answers that came with the network. */
const MOST_DIFFERENCE = 0.02;

/** The trial answers are means over so many pixels a side (common/stamp.py). */
const CELL = 8;

/** More threads than these gain nothing on a network of this size. */
const MOST_THREADS = 4;

let opened = null;
let last = Promise.resolve();

self.onmessage = ({ data }) => {
  if (data.files) {
    opened = open(data.files);
    opened.then(
      ({ device, threads }) => postMessage({ ready: { device, threads } }),
      (error) => postMessage({ failed: String(error?.message ?? error) }),
    );
    return;
  }
  // One after the other: each may take all cores.
  last = last.then(() => answer(data));
};

async function answer({ id, photo }) {
  try {
    const began = performance.now();
    const { square, width, height, orientation } = await squareOf(photo);
    const decoded = performance.now();
    const { infer, quality, fitness } = await opened;
    const values = await infer(square);
    const done = performance.now();
    const milliseconds = { decode: decoded - began, infer: done - decoded, total: done - began };
    const map = { width: SIDE, height: SIDE, values };
    const found = { map, size: { width, height, orientation }, milliseconds };
    if (quality) Object.assign(found, { quality: qualityOf(values, quality), borders: quality });
    if (fitness) found.fitness = fitnessOf(square, fitness);
    postMessage({ id, found });
  } catch (error) {
    const status = error instanceof PhotoError ? error.status : -1;
    postMessage({ id, problem: { status, detail: String(error?.message ?? error) } });
  }
}

/** The network, on the GPU where the browser lets it and it computes the same there. */
async function open(files) {
  checkBrowser();
  const names = ["network", "trial", "quality", "fitness"];
  const [network, trial, ...tables] = await Promise.all(names.map((name) => files[name] && bytesOf(files[name])));
  const [quality, fitness] = tables.map((table) => table && JSON.parse(new TextDecoder().decode(table)));
  if (await hasGpu()) {
    try {
      return { quality, fitness, ...(await run(files.webgpu, "webgpu", network, trial)) };
    } catch {
      // A GPU or driver that computes something else, or not at all, is passed over.
    }
  }
  return { quality, fitness, ...(await run(files.wasm, "wasm", network, trial)) };
}

function checkBrowser() {
  // The instruction i32x4.dot_i16x8_s in the smallest module that has it.
  const simd = [0, 97, 115, 109, 1, 0, 0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 10, 30, 1, 28, 0, 65, 0];
  simd.push(253, 15, 253, 12, ...Array(16).fill(0), 253, 186, 1, 26, 11);
  if (typeof WebAssembly !== "object" || !WebAssembly.validate(new Uint8Array(simd))) {
    throw new Error("This browser has no WebAssembly with SIMD: take a newer one, or the server.");
  }
  // Protection against fingerprints changes the pixels that a page reads, so that masks would be wrong.
  const context = new OffscreenCanvas(16, 16).getContext("2d", { willReadFrequently: true });
  const pixels = context.createImageData(16, 16);
  pixels.data.forEach((_, i) => {
    pixels.data[i] = i % 4 === 3 ? 255 : (i * 37) % 256;
  });
  context.putImageData(pixels, 0, 0);
  const found = context.getImageData(0, 0, 16, 16).data;
  if (found.some((value, i) => value !== pixels.data[i])) {
    throw new Error(
      "This browser changes the pixels that a page reads, against fingerprints: allow this page to" +
        " read them, or let the server compute.",
    );
  }
}

async function bytesOf(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`A file of the network was not found (${response.status}).`);
  return new Uint8Array(await response.arrayBuffer());
}

async function hasGpu() {
  try {
    return Boolean(await navigator.gpu?.requestAdapter());
  } catch {
    return false;
  }
}

async function run(runtime, device, network, trial) {
  const ort = await import(runtime);
  const threads = self.crossOriginIsolated
    ? Math.min(MOST_THREADS, navigator.hardwareConcurrency || 1)
    : 1;
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  const session = await ort.InferenceSession.create(network, { executionProviders: [device] });
  const infer = async (square) => {
    const image = new ort.Tensor("uint8", square, [1, SIDE, SIDE, 3]);
    const { probability } = await session.run({ image });
    return Float32Array.from(await probability.getData());
  };
  await prove(infer, trial);
  return { infer, device, threads };
}

/** The network has to answer on the trial images as it did where it was made. */
async function prove(infer, trial) {
  const [pixels, cells] = [3 * SIDE * SIDE, (SIDE / CELL) ** 2];
  const count = trial.length / (pixels + cells);
  for (let image = 0; image < count; image++) {
    const values = await infer(trial.slice(image * pixels, (image + 1) * pixels));
    const told = trial.subarray(count * pixels + image * cells);
    const sums = new Float64Array(cells);
    values.forEach((value, i) => {
      const [row, column] = [Math.floor(i / SIDE), i % SIDE];
      sums[Math.floor(row / CELL) * (SIDE / CELL) + Math.floor(column / CELL)] += value;
    });
    sums.forEach((sum, cell) => {
      if (!(Math.abs(sum / CELL ** 2 - told[cell] / 255) <= MOST_DIFFERENCE)) {
        throw new Error("The network computes something else here than it should: let the server compute.");
      }
    });
  }
}
