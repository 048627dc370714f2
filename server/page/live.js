// Camera mode: a camera, a shared screen or a video file, with the outline over it as it moves.

import { byId, note } from "./dom.js";
import { outlineRings, svgPath } from "./mask.js";
import { isLocal } from "./segment.js";
import { Sequence, Stream } from "./stream.js";

/** Frames are sent no larger: the network sees 128 × 128 pixels of them. */
const LONGEST = 640;
/** Figures are of the last so many milliseconds. */
const WINDOW_MS = 2000;
/** How much of the newest mask goes into a smoothed one, whose grid is so many points wide. */
const SHARE = 0.35;
const GRID = 256;

const REFUSED = {
  NotAllowedError: "The camera was not allowed. Allow it beside the browser's address, then start again.",
  NotFoundError: "There is no camera on this device.",
  NotReadableError: "The camera does not answer. Another program may be using it.",
  OverconstrainedError: "The chosen camera is not there any more.",
  AbortError: "The camera did not start.",
};

const video = byId("video");
const canvas = document.createElement("canvas");
const grid = document.createElement("canvas");
let link = null;
let stream = null;
let fileUrl = null;
let frozen = () => {};
let last = () => {};
let encoding = false;
let smooth = null;
let answers = [];
let telling = 0;
let starting = 0;

/** Open again what was open last. */
export const resume = () => last();

/** `take(file)` gets what is frozen. */
export function startLive(take) {
  frozen = take;
  byId("live-camera").addEventListener("click", () => camera());
  byId("live-screen").addEventListener("click", screen);
  byId("live-video").addEventListener("change", ({ target }) => {
    if (target.files[0]) file(target.files[0]);
    target.value = "";
  });
  byId("live-device").addEventListener("change", ({ target }) => camera(target.value));
  byId("live-stop").addEventListener("click", stop);
  byId("live-freeze").addEventListener("click", freeze);
  byId("live-smooth").addEventListener("change", () => {
    smooth = null;
  });
  if (!navigator.mediaDevices?.getDisplayMedia) byId("live-screen").hidden = true;
  video.addEventListener("error", () => {
    if (fileUrl) end("This browser does not play this video. MP4 with H.264 and WebM play in most.");
  });
}

/** What is under way ends; the page is as before. */
export function stop() {
  starting++;
  link?.close();
  link = null;
  clearInterval(telling);
  for (const track of stream?.getTracks() ?? []) {
    track.onended = null;
    track.stop();
  }
  stream = null;
  video.srcObject = null;
  if (fileUrl) {
    URL.revokeObjectURL(fileUrl);
    fileUrl = null;
    video.removeAttribute("src");
    video.load();
  }
  byId("live").hidden = true;
  document.body.classList.remove("live");
}

function end(word) {
  stop();
  note(word);
}

async function camera(device) {
  last = () => camera(device);
  if (!navigator.mediaDevices) {
    note("Browsers give the camera only to pages that come by https, or from this machine.");
    return;
  }
  const wanted = device ? { deviceId: { exact: device } } : { facingMode: "environment" };
  const opened = await open(() =>
    navigator.mediaDevices.getUserMedia({
      video: { ...wanted, width: { ideal: 1920 }, height: { ideal: 1080 } }, audio: false,
    }),
  );
  if (!opened) return;
  begin(opened, "The camera was taken away.");
  const devices = await navigator.mediaDevices.enumerateDevices();
  const cameras = devices.filter(({ kind }) => kind === "videoinput");
  const now = opened.getVideoTracks()[0].getSettings().deviceId;
  byId("live-device").replaceChildren(
    ...cameras.map(({ deviceId, label }, i) => new Option(label || `Camera ${i + 1}`, deviceId, false, deviceId === now)),
  );
  byId("live-devices").hidden = cameras.length < 2;
}

async function screen() {
  last = screen;
  const opened = await open(() => navigator.mediaDevices.getDisplayMedia({ video: true, audio: false }), {
    ...REFUSED, NotAllowedError: "Nothing was shared.", NotFoundError: "There is nothing to share.",
  });
  if (opened) begin(opened, "Sharing has ended.");
}

/** A stream of the browser's, or a word why there is none. */
async function open(ask, words = REFUSED) {
  stop();
  note("");
  const mine = ++starting;
  try {
    const opened = await ask();
    if (mine === starting) return opened;
    for (const track of opened.getTracks()) track.stop();
  } catch (error) {
    if (mine === starting) note(words[error.name] ?? `The camera did not start: ${error.message}`);
  }
  return null;
}

function begin(opened, word) {
  stream = opened;
  stream.getVideoTracks()[0].onended = () => end(word);
  video.srcObject = stream;
  show(false);
}

function file(chosen) {
  last = () => file(chosen);
  stop();
  note("");
  fileUrl = URL.createObjectURL(chosen);
  video.src = fileUrl;
  byId("live-devices").hidden = true;
  show(true);
}

function show(controls) {
  video.controls = controls;
  video.loop = controls;
  answers = [];
  smooth = null;
  for (const id of ["live-halo", "live-contour"]) byId(id).removeAttribute("d");
  byId("live").hidden = false;
  document.body.classList.add("live");
  byId("live-word").textContent = "Connecting";
  const Way = isLocal() || document.documentElement.dataset.server === "none" ? Sequence : Stream;
  link = new Way(Number(byId("threshold").value), {
    found,
    word: (text) => {
      byId("live-word").textContent = text;
    },
    ended: end,
  });
  video.play().catch(() => {});
  clearInterval(telling);
  telling = setInterval(tell, 500);
  tell();
  nextFrame();
  byId("live-freeze").focus();
}

/** Look at every frame of the video as it is shown. */
function nextFrame() {
  const mine = link;
  const seen = (now, metadata) => {
    if (link !== mine) return;
    grab(metadata?.captureTime ?? performance.now());
    nextFrame();
  };
  if (video.requestVideoFrameCallback) video.requestVideoFrameCallback(seen);
  else requestAnimationFrame(seen);
}

function grab(grabbed) {
  if (encoding || !link.free || !video.videoWidth || video.paused) return;
  const mine = link;
  encoding = true;
  paint(Math.min(1, LONGEST / Math.max(video.videoWidth, video.videoHeight)));
  canvas.toBlob(
    (frame) => {
      encoding = false;
      if (frame && link === mine) link.send(frame, grabbed);
    },
    "image/jpeg",
    0.85,
  );
}

function paint(scale) {
  canvas.width = Math.max(1, Math.round(video.videoWidth * scale));
  canvas.height = Math.max(1, Math.round(video.videoHeight * scale));
  canvas.getContext("2d", { alpha: false }).drawImage(video, 0, 0, canvas.width, canvas.height);
}

function found({ rings, width, height, share, unfit, grabbed, dropped }) {
  const outline = byId("live-smooth").checked ? smoothed(rings, width, height) : rings;
  byId("live-overlay").setAttribute("viewBox", `0 0 ${width} ${height}`);
  for (const id of ["live-halo", "live-contour"]) byId(id).setAttribute("d", svgPath(outline));
  // On the screen with the next frame.
  requestAnimationFrame((now) => answers.push({ now, took: now - grabbed, share, unfit, dropped }));
}

/** The mean of the masks, the newer the more, cut at one half. */
function smoothed(rings, width, height) {
  grid.width = GRID;
  grid.height = Math.max(1, Math.round((GRID * height) / width));
  const pen = grid.getContext("2d", { willReadFrequently: true });
  for (const ring of rings) {
    ring.forEach(([x, y], i) => {
      const point = [(x * grid.width) / width, (y * grid.height) / height];
      if (i) pen.lineTo(...point);
      else pen.moveTo(...point);
    });
    pen.closePath();
  }
  pen.fill("evenodd");
  const { data } = pen.getImageData(0, 0, grid.width, grid.height);
  const count = grid.width * grid.height;
  if (smooth?.length !== count) smooth = Float32Array.from({ length: count }, (_, i) => data[4 * i + 3] / 255);
  else for (let i = 0; i < count; i++) smooth[i] += SHARE * (data[4 * i + 3] / 255 - smooth[i]);
  return outlineRings({ width: grid.width, height: grid.height, values: smooth }, width, height, 0.5);
}

/** Frame rate and latency, of the last two seconds. */
function tell() {
  const now = performance.now();
  answers = answers.filter((answer) => now - answer.now < WINDOW_MS);
  const took = answers.map((answer) => answer.took).sort((a, b) => a - b);
  const last = answers.at(-1);
  const middle = took[took.length >> 1];
  byId("live-rate").textContent = (answers.length / (WINDOW_MS / 1000)).toFixed(1);
  byId("live-latency").textContent = last ? `${Math.max(0, Math.round(middle))}` : "–";
  byId("live-dropped").textContent = last ? `${last.dropped}` : "–";
  byId("live-share").textContent = last ? (last.share * 100).toFixed(1) : "–";
  byId("live-size").textContent = video.videoWidth ? `${video.videoWidth} × ${video.videoHeight}` : "–";
  // Of most: the word would flicker with single frames.
  byId("live-unfit").hidden = answers.filter(({ unfit }) => unfit).length * 2 <= answers.length;
  byId("live-low").hidden = !video.videoWidth || Math.min(video.videoWidth, video.videoHeight) >= 240;
}

/** The frame on the screen becomes a photo, as large as it is. */
function freeze() {
  if (!video.videoWidth) return;
  video.pause();
  paint(1);
  const time = new Date().toTimeString().slice(0, 8).replaceAll(":", "-");
  canvas.toBlob((photo) => {
    stop();
    frozen(new File([photo], `camera ${time}.jpg`, { type: "image/jpeg" }));
  }, "image/jpeg", 0.95);
}
