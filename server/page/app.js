// A photo → POST /segment → its outline over the photo. Nothing here comes from, or goes, elsewhere.

import { decode, encodePng, largestPart, largestRegion, lesionMask, outline } from "./mask.js";

const STAGES = ["read", "decode", "queue", "infer", "encode"];
const SERVER_PAUSE_MS = 10_000;
const SERVER_PAUSE_GONE_MS = 2_000;

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
/** Where the same photo again may help: the photo was not the reason. */
const PASSING = new Set([0, 408, 429]);

const byId = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");

/** The photo on show, and the request that is under way for it. */
let photo = null;
let photoUrl = null;
let request = null;
let drawing = 0;
let serverPause = 0;

/** The last photo that was answered, with its answer: what an error leaves on show. */
let good = null;
let tryAgain = retry;

function setState(state) {
  document.body.dataset.state = state;
  byId("download").disabled = state !== "done";
}

function take(file) {
  if (!file) return;
  byId("note").hidden = true;
  const url = URL.createObjectURL(file);
  if (photoUrl && photoUrl !== good?.url) URL.revokeObjectURL(photoUrl);
  photo = file;
  photoUrl = url;
  clearResult();
  showPhoto(url);
  segment();
}

/** The photo of what was dropped or pasted; a word where that is not one photo. */
function takeFrom(transfer, done) {
  const files = [...transfer.files];
  const folders = [...transfer.items].some((item) => item.webkitGetAsEntry?.()?.isDirectory);
  if (folders) {
    note("That is a folder: open it and take one photo.");
  } else if (files.length) {
    take(files[0]);
    if (files.length > 1) {
      note(`${files.length} files were ${done}; this page takes one at a time: ${files[0].name}.`);
    }
  } else if (transfer.types.includes("text/uri-list") || transfer.types.includes("text/html")) {
    note(`Only the address of a picture was ${done}, not the picture: save it, then choose the file.`);
  } else {
    note(`No photo was ${done}: choose a file of a photo.`);
  }
}

function note(text) {
  byId("note").textContent = text;
  byId("note").hidden = false;
}

/** The photo as the browser turns it, until the server has told how. */
function showPhoto(url) {
  const image = byId("photo");
  byId("picture").removeAttribute("href");
  image.hidden = false;
  image.dataset.shown = "true";
  image.alt = "The photo";
  image.src = url;
  byId("no-preview").hidden = true;
}

async function segment() {
  request?.abort();
  const controller = new AbortController();
  request = controller;
  setState("busy");
  byId("problem").hidden = true;
  byId("result").hidden = false;
  byId("announce").textContent = "Working on the photo";
  try {
    const { answer, header } = await post(controller.signal);
    if (request !== controller) return;
    const milliseconds = timings(header);
    if (good && good.url !== photoUrl) URL.revokeObjectURL(good.url);
    good = { photo, url: photoUrl, map: decode(answer.mask), size: answer.image, mask: null };
    show();
    showTimings(milliseconds);
    setState("done");
    tellServer();
  } catch (error) {
    if (request !== controller) return;
    fail(error);
  }
}

/** The answer to the photo, with the network's probabilities; throws what `fail` shows. */
function post(signal) {
  const gone = { status: 0, detail: "It is down, or the connection was lost." };
  return new Promise((resolve, reject) => {
    // Unlike `fetch`, it tells how much has been sent.
    const sending = new XMLHttpRequest();
    sending.open("POST", "segment?format=json&mask=probabilities");
    // The server tells the type by the bytes.
    sending.setRequestHeader("Content-Type", "application/octet-stream");
    sending.upload.onprogress = ({ loaded, total }) => {
      byId("upload").hidden = loaded === total;
      byId("upload").value = loaded / (total || 1);
    };
    sending.onloadend = () => {
      byId("upload").hidden = true;
    };
    sending.onerror = () => reject(gone);
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
        resolve({ answer: body, header: sending.getResponseHeader("Server-Timing") });
      } else if (body && type.startsWith("application/problem+json")) {
        reject(body);
      } else {
        const detail = `It answered ${sending.status} and gave no reason.`;
        reject({ status: sending.status, detail });
      }
    };
    signal.addEventListener("abort", () => sending.abort());
    sending.send(photo);
  });
}

/** Tell what went wrong; `again` is what may help then. */
function fail(problem, again = retry) {
  tryAgain = again;
  const status = problem.status ?? -1;
  const passing = PASSING.has(status) || status >= 500 || status < 0;
  if (good) {
    // What was found before stays; "Try again" is for the photo that failed.
    if (good.url !== photoUrl) showPhoto(good.url);
    show();
  }
  setState("error");
  byId("download").disabled = !good;
  byId("result").hidden = !good && !(passing && photo);
  byId("announce").textContent = "";
  byId("problem-title").textContent =
    HEADINGS[status] ?? (status >= 500 ? "The server failed." : "Something went wrong.");
  byId("problem-detail").textContent = problem.detail ?? String(problem);
  byId("problem-kept").hidden = !good || good.photo === photo;
  byId("problem-id").textContent = problem.request_id ? `Request ${problem.request_id}` : "";
  byId("retry").hidden = !passing;
  byId("problem").hidden = false;
  tellServer();
}

function retry() {
  if (photoUrl !== good?.url) {
    clearResult();
    showPhoto(photoUrl);
  }
  segment();
}

/**
 * The stored picture → upright, `width` × `height` pixels, by EXIF's orientation. Browsers do not
 * look for it in all the places where the server does.
 */
function upright(orientation, width, height) {
  const matrices = {
    1: [1, 0, 0, 1, 0, 0],
    2: [-1, 0, 0, 1, width, 0],
    3: [-1, 0, 0, -1, width, height],
    4: [1, 0, 0, -1, 0, height],
    5: [0, 1, 1, 0, 0, 0],
    6: [0, 1, -1, 0, width, 0],
    7: [0, -1, -1, 0, width, height],
    8: [0, -1, 1, 0, 0, height],
  };
  return `matrix(${matrices[orientation].join(" ")})`;
}

/** The good photo under its outline. */
function showPicture() {
  const { url, size } = good;
  const picture = byId("picture");
  if (picture.getAttribute("href") === url) return;
  const sides = size.orientation < 5 ? [size.width, size.height] : [size.height, size.width];
  picture.setAttribute("width", sides[0]);
  picture.setAttribute("height", sides[1]);
  picture.setAttribute("transform", upright(size.orientation, size.width, size.height));
  picture.setAttribute("href", url);
  picture.dataset.shown = "true";
  byId("photo").hidden = true;
}

/** Mask, outline and figures of the good photo at the slider's threshold, cleaned if so chosen. */
function show() {
  const { size } = good;
  const threshold = Number(byId("threshold").value);
  const clean = byId("clean").checked;
  const map = clean ? largestRegion(good.map, threshold) : good.map;
  const whole = lesionMask(map, size.width, size.height, threshold);
  const mask = clean ? largestPart(whole) : whole;
  good.mask = mask;
  byId("overlay").setAttribute("viewBox", `0 0 ${size.width} ${size.height}`);
  const path = outline(map, size.width, size.height, threshold, clean);
  for (const id of ["shade", "halo", "contour"]) byId(id).setAttribute("d", path);
  showPicture();

  const percent = ((mask.area / (size.width * size.height)) * 100).toFixed(1);
  byId("percent").textContent = percent;
  byId("nothing").hidden = mask.area > 0;
  byId("area").textContent = `${number.format(mask.area)} px`;
  byId("dimensions").textContent = `${size.width} × ${size.height} px`;
  byId("box").textContent = mask.box ? `${mask.box[2]} × ${mask.box[3]} px` : "–";
  byId("announce").textContent = mask.area
    ? `The lesion covers ${percent} percent of the frame, ${number.format(mask.area)} pixels.`
    : "Nothing in this photo is above the threshold.";
}

/** Once a frame at most; while a photo is under way, its answer draws. */
function redraw() {
  cancelAnimationFrame(drawing);
  drawing = requestAnimationFrame(() => {
    if (good && document.body.dataset.state !== "busy") show();
  });
}

function showTimings(milliseconds) {
  byId("bar").replaceChildren(
    ...STAGES.filter((stage) => stage in milliseconds).map((stage) => {
      const part = document.createElement("span");
      part.dataset.stage = stage;
      part.style.flexGrow = milliseconds[stage];
      return part;
    }),
  );
  byId("stages").replaceChildren(
    ...[...STAGES, "total"].filter((stage) => stage in milliseconds).map((stage) => {
      const row = document.createElement("div");
      row.dataset.stage = stage;
      const name = document.createElement("dt");
      name.textContent = stage;
      const value = document.createElement("dd");
      value.textContent = `${milliseconds[stage].toFixed(1)} ms`;
      row.append(name, value);
      return row;
    }),
  );
}

/** `Server-Timing` → milliseconds by stage. */
function timings(header) {
  const entries = (header ?? "").matchAll(/(\w+);dur=([\d.]+)/g);
  return Object.fromEntries([...entries].map(([, name, duration]) => [name, Number(duration)]));
}

function clearResult() {
  for (const id of ["shade", "halo", "contour"]) byId(id).removeAttribute("d");
  for (const id of ["percent", "area", "dimensions", "box"]) byId(id).textContent = "–";
  byId("nothing").hidden = true;
  showTimings({});
}

async function download() {
  show();
  const url = URL.createObjectURL(await encodePng(good.mask));
  const link = document.createElement("a");
  link.href = url;
  link.download = "lesion-mask.png";
  link.click();
  // The browser reads it after this task.
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** The server's state beside the dot, now and from time to time. */
async function tellServer() {
  clearTimeout(serverPause);
  const line = byId("server");
  let told;
  try {
    const response = await fetch("model", { cache: "no-store" });
    const model = response.ok ? await response.json() : null;
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
  clearTimeout(serverPause);
  const pause = line.dataset.ready === "true" ? SERVER_PAUSE_MS : SERVER_PAUSE_GONE_MS;
  serverPause = setTimeout(tellServer, pause);
}

for (const id of ["choose", "camera", "another"]) {
  byId(id).addEventListener("change", ({ target }) => {
    take(target.files[0]);
    // So that the same file can be chosen again.
    target.value = "";
  });
}

async function takeExample() {
  try {
    const response = await fetch("page/example.jpg");
    if (!response.ok) throw response;
    take(await response.blob());
  } catch {
    fail({ status: 0, detail: "It is down, or the connection was lost." }, takeExample);
  }
}

byId("example").addEventListener("click", takeExample);

byId("retry").addEventListener("click", () => tryAgain());
byId("download").addEventListener("click", download);

byId("photo").addEventListener("error", () => {
  byId("photo").dataset.shown = "false";
  byId("photo").alt = "";
  byId("no-preview").hidden = false;
});

byId("picture").addEventListener("error", () => {
  byId("picture").dataset.shown = "false";
});

byId("threshold").addEventListener("input", ({ target }) => {
  byId("threshold-value").textContent = Number(target.value).toFixed(2);
  redraw();
});

byId("clean").addEventListener("change", redraw);

for (const radio of document.querySelectorAll("input[name=view]")) {
  radio.addEventListener("change", () => {
    byId("stage").dataset.view = radio.value;
  });
  // A browser may keep the choice over a reload.
  if (radio.checked) byId("stage").dataset.view = radio.value;
}

document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  takeFrom(event.dataTransfer, "dropped");
});
document.addEventListener("paste", (event) => {
  takeFrom(event.clipboardData, "pasted");
});

tellServer();
