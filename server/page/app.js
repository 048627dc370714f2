// A photo → POST /segment → its outline over the photo. Nothing here comes from, or goes, elsewhere.

const STAGES = ["read", "decode", "queue", "infer", "encode"];
const SLIDER_PAUSE_MS = 150;
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
let sliderPause = 0;
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

function showPhoto(url) {
  const image = byId("photo");
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
    const response = await post("json&mask=polygons", controller.signal);
    const answer = await response.json();
    if (request !== controller) return;
    const milliseconds = timings(response.headers.get("Server-Timing"));
    if (good && good.url !== photoUrl) URL.revokeObjectURL(good.url);
    good = { photo, url: photoUrl, answer, milliseconds };
    show(answer, milliseconds);
    setState("done");
    tellServer();
  } catch (error) {
    if (request !== controller) return;
    fail(error);
  }
}

/** The answer to the photo at the slider's threshold, cleaned if so chosen; throws what `fail` shows. */
async function post(format, signal) {
  let response;
  try {
    const query = `threshold=${byId("threshold").value}&clean=${byId("clean").checked}`;
    response = await fetch(`segment?format=${format}&${query}`, {
      method: "POST",
      // The server tells the type by the bytes.
      headers: { "Content-Type": "application/octet-stream" },
      body: photo,
      signal,
    });
  } catch (error) {
    throw signal?.aborted
      ? error
      : { status: 0, detail: "It is down, or the connection was lost." };
  }
  if (response.ok) return response;
  const type = response.headers.get("Content-Type") ?? "";
  if (type.startsWith("application/problem+json")) throw await response.json();
  throw { status: response.status, detail: `It answered ${response.status} and gave no reason.` };
}

/** Tell what went wrong; `again` is what may help then. */
function fail(problem, again = retry) {
  tryAgain = again;
  const status = problem.status ?? -1;
  const passing = PASSING.has(status) || status >= 500 || status < 0;
  if (good) {
    // What was found before stays; "Try again" is for the photo that failed.
    if (good.url !== photoUrl) showPhoto(good.url);
    show(good.answer, good.milliseconds);
  }
  setState("error");
  byId("download").disabled = !good || good.photo !== photo;
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

function show(answer, milliseconds) {
  const { mask, lesion } = answer;
  byId("overlay").setAttribute("viewBox", `0 0 ${mask.width} ${mask.height}`);
  const outline = mask.polygons
    .flat()
    .map((ring) => `M${ring.map(([x, y]) => `${x} ${y}`).join("L")}Z`)
    .join("");
  for (const id of ["shade", "halo", "contour"]) byId(id).setAttribute("d", outline);
  // Where the browser cannot show the photo, the frame takes its shape from the mask.
  const image = byId("photo");
  image.setAttribute("width", answer.image.width);
  image.setAttribute("height", answer.image.height);

  const percent = (lesion.area_fraction * 100).toFixed(1);
  byId("percent").textContent = percent;
  byId("nothing").hidden = lesion.found;
  byId("area").textContent = `${number.format(lesion.area)} px`;
  byId("dimensions").textContent = `${answer.image.width} × ${answer.image.height} px`;
  byId("box").textContent = lesion.bounding_box
    ? `${lesion.bounding_box[2]} × ${lesion.bounding_box[3]} px`
    : "–";
  byId("announce").textContent = lesion.found
    ? `The lesion covers ${percent} percent of the frame, ${number.format(lesion.area)} pixels.`
    : "Nothing in this photo is above the threshold.";
  showTimings(milliseconds);
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
  byId("download").disabled = true;
  try {
    const response = await post("png");
    const url = URL.createObjectURL(await response.blob());
    const link = document.createElement("a");
    link.href = url;
    link.download = "lesion-mask.png";
    link.click();
    // The browser reads it after this task.
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
    byId("download").disabled = false;
  } catch (error) {
    fail(error);
  }
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

byId("threshold").addEventListener("input", ({ target }) => {
  byId("threshold-value").textContent = Number(target.value).toFixed(2);
  clearTimeout(sliderPause);
  sliderPause = setTimeout(segment, SLIDER_PAUSE_MS);
});

byId("clean").addEventListener("change", segment);

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
