// A photo → POST /segment → its outline over the photo. Nothing here comes from, or goes, elsewhere.

const STAGES = ["read", "decode", "queue", "infer", "encode"];
const SLIDER_PAUSE_MS = 150;

const byId = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");

/** The photo on show, and the request that is under way for it. */
let photo = null;
let photoUrl = null;
let request = null;
let sliderPause = 0;

function setState(state) {
  document.body.dataset.state = state;
  byId("download").disabled = state !== "done";
}

function take(file) {
  if (!file) return;
  photo = file;
  if (photoUrl) URL.revokeObjectURL(photoUrl);
  photoUrl = URL.createObjectURL(file);
  clearOverlay();
  const image = byId("photo");
  image.dataset.shown = "true";
  image.alt = "The photo";
  image.src = photoUrl;
  byId("no-preview").hidden = true;
  segment();
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
    show(answer, timings(response.headers.get("Server-Timing")));
    setState("done");
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
      : { title: "No answer.", detail: "The server cannot be reached, or closed the connection." };
  }
  if (response.ok) return response;
  const type = response.headers.get("Content-Type") ?? "";
  if (type.startsWith("application/problem+json")) throw await response.json();
  throw { title: `The server answered ${response.status}.`, detail: "It gave no reason." };
}

function fail(problem) {
  clearOverlay();
  setState("error");
  byId("result").hidden = true;
  byId("announce").textContent = "";
  byId("problem-title").textContent = problem.title ?? "Something went wrong.";
  byId("problem-detail").textContent = problem.detail ?? String(problem);
  byId("problem-id").textContent = problem.request_id ? `Request ${problem.request_id}` : "";
  // The same photo again helps only where the photo was not the reason.
  byId("retry").hidden = problem.status >= 400 && problem.status < 500 && problem.status !== 429;
  byId("problem").hidden = false;
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

function clearOverlay() {
  for (const id of ["shade", "halo", "contour"]) byId(id).removeAttribute("d");
  byId("percent").textContent = "–";
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

async function tellServer() {
  const line = byId("server");
  try {
    const response = await fetch("model");
    const model = await response.json();
    line.dataset.ready = String(response.ok);
    line.textContent = response.ok
      ? `${model.name} ${model.version} · ${model.backend.name}`
      : "The network is being loaded";
    if (response.status === 503) setTimeout(tellServer, 1000);
  } catch {
    line.dataset.ready = "false";
    line.textContent = "The server cannot be reached";
  }
}

for (const id of ["choose", "camera", "another"]) {
  byId(id).addEventListener("change", ({ target }) => {
    take(target.files[0]);
    // So that the same file can be chosen again.
    target.value = "";
  });
}

byId("example").addEventListener("click", async () => {
  try {
    take(await (await fetch("page/example.jpg")).blob());
  } catch {
    fail({ title: "No answer.", detail: "The server cannot be reached." });
  }
});

byId("retry").addEventListener("click", segment);
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
  take(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  take(event.clipboardData.files[0]);
});

tellServer();
