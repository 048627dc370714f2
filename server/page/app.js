// Photos → their lesions' outlines over them. Nothing here comes from, or goes, elsewhere.

import { byId, element, note, save, whole } from "./dom.js";
import { Editor, HALF } from "./edit.js";
import { coco, csv, stems, zip } from "./files.js";
import { resume, startLive, stop as stopLive } from "./live.js";
import { cocoRle, encodePng, largestPart, largestRegion, largestRing, lesionMask, outlineRings, svgPath } from "./mask.js";
import { areaText, lengthText, measure } from "./measure.js";
import { GONE, heading, passes, segment } from "./segment.js";
import { borders, tellServer } from "./server.js";
import { addPhoto, clearStrip, fill, tell } from "./strip.js";
import { View } from "./view.js";

const STAGES = ["read", "decode", "queue", "infer", "encode"];
/** So many photos at once keep the server busy, and leave room for others. */
const AT_ONCE = 2;
const MOST = 500;
/** Where the outline is not seen, or not all of it, and so not corrected. */
const HIDING = ["photo", "compare"];
const PATHS = ["shade", "halo", "contour"];
const ALL_PATHS = [...PATHS, "band", "ruler"];

/** All photos: what was chosen, its state, and what was found. */
let photos = [];
/** The photo that was asked for, and the one on show: the last answered where that one failed. */
let current = null;
let good = null;
/** What is drawn of the good one. */
let drawn = null;
let drawing = 0;
let filling = 0;
let tryAgain = retry;
/** Whether the editor has more than the good photo knows of: it changes faster than is drawn. */
let ahead = false;
/** Points on the ruler while they are clicked, and the scale that holds for all. */
let picking = null;
let common = null;

function setState(state) {
  document.body.dataset.state = state;
  byId("download").disabled = state !== "done";
}

/** Photos into the strip; the first of them is shown. */
function take(files, live = false) {
  if (!files.length) return;
  stopLive();
  note("");
  const free = MOST - photos.length;
  if (files.length > free) note(`This page takes ${MOST} photos at a time: ${files.length - Math.max(free, 0)} were left out.`);
  const added = files.slice(0, Math.max(free, 0)).map((file) => ({
    file, live, name: file.name ?? "photo", url: URL.createObjectURL(file), state: "waiting", problem: null, edited: null, scale: null,
    controller: new AbortController(),
  }));
  photos.push(...added);
  for (const photo of added) addPhoto(photo, select);
  if (added.length) select(added[0]);
  pump();
}

/** The photos of what was dropped or pasted; a word where there are none. */
function takeFrom(transfer, done) {
  const files = [...transfer.files];
  const folders = [...transfer.items].some((item) => item.webkitGetAsEntry?.()?.isDirectory);
  if (folders) {
    note("That is a folder: open it and take the photos in it.");
  } else if (files.length) {
    take(files);
  } else if (transfer.types.includes("text/uri-list") || transfer.types.includes("text/html")) {
    note(`Only the address of a picture was ${done}, not the picture: save it, then choose the file.`);
  } else {
    note(`No photo was ${done}: choose a file of a photo.`);
  }
}

function pump() {
  for (const photo of photos) {
    if (photos.filter(({ state }) => state === "busy").length >= AT_ONCE) break;
    if (photo.state === "waiting") work(photo);
  }
  tellProgress();
}

async function work(photo) {
  photo.state = "busy";
  tell(photo);
  const sent = (share) => {
    if (photo !== current) return;
    byId("upload").hidden = share >= 1;
    byId("upload").value = share;
  };
  try {
    Object.assign(photo, await segment(photo.file, { signal: photo.controller.signal, sent }));
    photo.scale ??= scaleIn(photo);
    photo.state = "done";
    photo.problem = null;
  } catch (error) {
    photo.state = "error";
    photo.problem = error;
  }
  if (photo.controller.signal.aborted) return;
  tell(photo);
  // A refusal is left for a photo that was answered, but not while it alone is looked at.
  if (photo === current || (photo.state === "done" && current.state === "error")) select(photo);
  if (photo.state === "done" && photos.length > 1) fill(photo, outlined(photo).figures, scaleOf(photo));
  pump();
  if (photos.every(({ state }) => state !== "waiting")) tellServer();
}

function tellProgress() {
  const many = photos.length > 1;
  byId("batch").hidden = byId("table-box").hidden = !many;
  const count = (state) => photos.filter((photo) => photo.state === state).length;
  const [done, refused] = [count("done"), count("error")];
  const text = `${done} of ${photos.length} photos done${refused ? `, ${refused} refused` : ""}`;
  if (many && byId("progress").textContent !== text) byId("progress").textContent = text;
  for (const id of ["save-csv", "save-coco", "save-zip"]) byId(id).disabled = !done;
}

function select(photo) {
  if (photo !== current) pick(false);
  current = photo;
  for (const { place } of photos) place.button.setAttribute("aria-current", String(place === photo.place));
  byId("upload").hidden = true;
  if (photo.state === "error") {
    fail(photo.problem);
    return;
  }
  byId("problem").hidden = true;
  byId("result").hidden = false;
  if (photo.state === "done") {
    present(photo);
    setState("done");
  } else {
    clearResult();
    showPhoto(photo.url);
    setState("busy");
    byId("announce").textContent = "Working on the photo";
  }
}

/** Show an answered photo as it is first seen. */
function present(photo) {
  if (photo !== good || !drawn) {
    keepUp();
    good = photo;
    drawn = null;
    editor.reset();
    view.fit(photo.size.width, photo.size.height);
  }
  show();
  showTimings(photo.milliseconds);
  byId("save-photo").hidden = byId("live-again").hidden = !photo.live;
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

/** Tell what went wrong; `again` is what may help then. */
function fail(problem, again = retry) {
  tryAgain = again;
  const passing = passes(problem);
  // What was found before stays; "Try again" is for the photo that failed.
  if (good) present(good);
  else if (current) showPhoto(current.url);
  setState("error");
  byId("download").disabled = !good;
  byId("result").hidden = !good && !(passing && current) && photos.length < 2;
  byId("announce").textContent = "";
  byId("problem-title").textContent = heading(problem);
  byId("problem-detail").textContent = problem.detail ?? String(problem);
  byId("problem-kept").hidden = !good;
  byId("problem-id").textContent = problem.request_id ? `Request ${problem.request_id}` : "";
  byId("retry").hidden = !passing;
  byId("problem").hidden = false;
}

/** Once more, all photos that were not to blame. */
function retry() {
  for (const photo of photos) {
    if (photo.state !== "error" || !passes(photo.problem)) continue;
    photo.state = "waiting";
    tell(photo);
  }
  if (current) select(current);
  pump();
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
  byId("no-preview").hidden = true;
  // The one before it would stay until this one is read, under an outline that is not its own.
  picture.dataset.shown = "false";
  picture.setAttribute("href", url);
  byId("photo").hidden = true;
}

/** Mask, outline and figures of a photo: as it was corrected, or at the threshold. */
function outlined({ map, size, edited }) {
  const threshold = edited ? HALF : Number(byId("threshold").value);
  const clean = byId("clean").checked && !edited;
  const used = edited ?? (clean ? largestRegion(map, threshold) : map);
  const all = lesionMask(used, size.width, size.height, threshold);
  const mask = clean ? largestPart(all) : all;
  const found = outlineRings(used, size.width, size.height, threshold);
  const rings = clean && found.length ? [largestRing(found)] : found;
  return { map: used, size, threshold, edited: Boolean(edited), mask, rings, figures: measure(mask, rings) };
}

/** The good photo gets what the editor has. */
function keepUp() {
  if (ahead) good.edited = editor.map;
  ahead = false;
}

function show() {
  keepUp();
  drawn = outlined(good);
  const path = svgPath(drawn.rings);
  for (const id of PATHS) byId(id).setAttribute("d", path);
  showPicture();
  const { size, figures } = drawn;
  const percent = (figures.share * 100).toFixed(1);
  const scale = scaleOf(good);
  byId("percent").textContent = percent;
  byId("nothing").hidden = figures.area > 0;
  byId("unfit").hidden = !good.fitness?.unfit;
  byId("area").textContent = areaText(figures.area, scale);
  byId("diameter").textContent = figures.area ? lengthText(figures.diameter, scale) : "–";
  byId("perimeter").textContent = figures.area ? lengthText(figures.perimeter, scale) : "–";
  byId("cut").hidden = !figures.cut;
  byId("dimensions").textContent = `${size.width} × ${size.height} px`;
  byId("box").textContent = figures.box ? `${figures.box[2]} × ${figures.box[3]} px` : "–";
  const found = figures.area
    ? `The lesion covers ${percent} percent of the frame, ${whole.format(figures.area)} pixels.`
    : "Nothing in this photo is above the threshold.";
  byId("announce").textContent = byId("unfit").hidden ? found : `${byId("unfit").textContent} ${found}`;
  byId("edited").hidden = !good.edited;
  byId("threshold").disabled = byId("clean").disabled = Boolean(good.edited);
  byId("undo").disabled = !editor.canUndo;
  byId("start-over").disabled = !good.edited;
  byId("scale-um").value = scale ? Number((scale * 1000).toPrecision(5)) : "";
  showQuality();
  drawBand();
  drawRuler();
  editor.place();
  fill(good, figures, scale);
}

/** How good the mask is likely to be: known of the one that the server would answer with. */
function qualityOf({ edited, quality }) {
  const isAsked = Number(byId("threshold").value) === HALF && !edited && !byId("clean").checked;
  return (isAsked && quality) || null;
}

function showQuality() {
  const quality = qualityOf(good);
  byId("quality-row").hidden = !quality;
  if (quality) byId("quality").textContent = `${quality.jaccard.toFixed(2)}, ${quality.grade}`;
}

/** Between a tight outline and a generous one, where annotators' outlines lie; neither crosses the mask's own. */
function drawBand() {
  byId("band-row").hidden = !levelsOf(good) || Boolean(good.edited);
  const isShown = !byId("band-row").hidden && byId("borders").checked;
  byId("band").setAttribute("d", isShown ? svgPath(bandRings(good, drawn)) : "");
}

/** The probabilities at a tight and a generous outline, of the network that drew the photo's. */
const levelsOf = (photo) => photo.borders ?? borders;

/** Rings of both outlines: what is inside of one of them only is the band. */
function bandRings(photo, { map: used, threshold }) {
  const { map, size } = photo;
  const levels = levelsOf(photo);
  const [tight, generous] = [Math.max(levels.tight, threshold), Math.min(levels.generous, threshold)];
  const clean = byId("clean").checked;
  const around = (at) => used.values[at] > threshold;
  const [inner, outer] = clean ? [largestRegion(used, tight), largestRegion(map, generous, around)] : [map, map];
  return [[inner, tight], [outer, generous]].flatMap(([one, level]) => {
    const rings = outlineRings(one, size.width, size.height, level);
    return clean && rings.length ? [largestRing(rings)] : rings;
  });
}

/** Once a frame at most; while a photo is under way, its answer draws. */
function redraw() {
  cancelAnimationFrame(drawing);
  drawing = requestAnimationFrame(() => {
    if (good && document.body.dataset.state !== "busy") show();
  });
}

/** The table anew, a row at a time. */
async function refill() {
  const mine = ++filling;
  for (const photo of photos.length > 1 ? photos : []) {
    await pause();
    if (mine !== filling) return;
    if (photo.state === "done") fill(photo, outlined(photo).figures, scaleOf(photo));
  }
}

/** So that the page answers between two photos. */
const pause = () => new Promise((resolve) => setTimeout(resolve));

function showTimings(milliseconds) {
  byId("bar").replaceChildren(
    ...STAGES.filter((stage) => stage in milliseconds).map((stage) => {
      const part = element("span", { "data-stage": stage });
      part.style.flexGrow = milliseconds[stage];
      return part;
    }),
  );
  byId("stages").replaceChildren(
    ...[...STAGES, "total"].filter((stage) => stage in milliseconds).map((stage) =>
      element("div", { "data-stage": stage }, element("dt", {}, stage), element("dd", {}, `${milliseconds[stage].toFixed(1)} ms`)),
    ),
  );
}

function clearResult() {
  drawn = null;
  for (const id of ALL_PATHS) byId(id).removeAttribute("d");
  for (const id of ["percent", "area", "diameter", "perimeter", "dimensions", "box"]) byId(id).textContent = "–";
  for (const id of ["nothing", "unfit", "cut", "handles", "quality-row"]) byId(id).toggleAttribute("hidden", true);
  showTimings({});
}

function removeAll() {
  for (const { url, controller } of photos) {
    controller.abort();
    URL.revokeObjectURL(url);
  }
  photos = [];
  current = good = common = null;
  ahead = false;
  editor.reset();
  clearStrip();
  clearResult();
  note("");
  byId("scale-all").checked = false;
  byId("problem").hidden = byId("result").hidden = true;
  setState("empty");
  tellProgress();
  byId("choose").focus();
}

// Saving

async function saveMask() {
  show();
  save(await encodePng(drawn.mask), `${photos.length > 1 ? stems([good.name])[0] : "lesion"}-mask.png`);
}

/**
 * All photos that are done or refused, for a table; `more(mask)` is what else is kept of each. A mask
 * itself is not: all of them would be too many.
 */
async function rows(more = () => ({})) {
  keepUp();
  const found = [];
  for (const photo of photos) {
    const { name, problem } = photo;
    if (photo.state === "error") found.push({ name, refused: `${heading(problem)} ${problem.detail ?? ""}` });
    if (photo.state !== "done") continue;
    await pause();
    const { mask, figures, threshold, edited } = outlined(photo);
    const { width, height } = mask;
    const known = { scale: scaleOf(photo), quality: qualityOf(photo), fitness: photo.fitness };
    found.push({ name, width, height, figures, threshold, edited, ...known, ...(await more(mask)) });
  }
  const left = photos.length - found.length;
  note(left ? `Left out: ${left} that ${left > 1 ? "are" : "is"} still under way.` : "");
  return found;
}

async function saveZip() {
  const found = (await rows(async (mask) => ({ png: await encodePng(mask) }))).filter(({ refused }) => !refused);
  const names = stems(found.map(({ name }) => name));
  save(await zip(found.map(({ png }, i) => [`${names[i]}_mask.png`, png])), "lesion-masks.zip");
}

// Millimetres

/** Millimetres a pixel of a photo, or null. */
const scaleOf = (photo) => (byId("scale-all").checked ? common : photo.scale);

/** What a DICOM photo says of its pixels, if they are squares, or null. */
function scaleIn({ pixel: [across, down] = [] }) {
  return Math.abs(across - down) < 0.01 * across ? across : null;
}

function setScale(scale) {
  good.scale = scale;
  common = scale;
  redraw();
  refill();
}

function pick(on) {
  picking = on ? [] : null;
  byId("scale-pick").setAttribute("aria-pressed", String(on));
  byId("stage").dataset.picking = String(on);
  if (on) setTool("off");
  byId("scale-hint").textContent = on
    ? "Click the first point, then the second."
    : "Click two points on the ruler in the photo, or give the size of a pixel.";
}

const ruler = {
  down: () => {},
  move: () => {},
  up: (point) => {
    if (picking?.push(point) !== 2) return;
    good.ruler = picking;
    pick(false);
    scaleByRuler();
  },
  cancel: () => {},
};

/** The scale from the two points and the millimetres between them. */
function scaleByRuler() {
  if (!good?.ruler) return;
  const [[x, y], [a, b]] = good.ruler;
  const length = Math.hypot(x - a, y - b);
  const millimetres = byId("scale-mm").valueAsNumber;
  if (!(length >= 2)) byId("scale-hint").textContent = "The two points are the same: click them farther apart.";
  else if (!(millimetres > 0)) byId("scale-hint").textContent = "Give the millimetres between the points: a number above 0.";
  else {
    byId("scale-hint").textContent = `${Math.round(length)} pixels are ${millimetres} mm.`;
    setScale(millimetres / length);
  }
}

function drawRuler() {
  const points = good.ruler;
  const line = points ? `M${points.map((point) => point.join(" ")).join("L")}` : "";
  byId("ruler").setAttribute("d", line);
}

// What is seen

const view = new View({
  stage: byId("stage"),
  overlay: byId("overlay"),
  tool: () => (!drawn ? null : picking ? ruler : editor.tool()),
  changed: () => {
    byId("zoom").textContent = `${Math.round(view.zoom * 100)} %`;
    divide();
    if (drawn) editor.place();
  },
});

const editor = new Editor({
  view,
  handles: byId("handles"),
  shown: () => drawn,
  changed: () => {
    ahead = true;
    redraw();
  },
  radius: () => Number(byId("brush").value),
});

/** In "compare", what was found is drawn right of the line only. */
function divide() {
  const compare = byId("stage").dataset.view === "compare";
  byId("reveal").hidden = !compare;
  if (!compare) {
    byId("marks").removeAttribute("clip-path");
    byId("divider").removeAttribute("d");
    return;
  }
  const [left, top, width, height] = view.seen;
  const x = left + (width * byId("reveal").valueAsNumber) / 100;
  byId("after-part").setAttribute("x", x);
  byId("marks").setAttribute("clip-path", "url(#after)");
  byId("divider").setAttribute("d", `M${x} ${top}V${top + height}`);
}

function setTool(tool) {
  document.querySelector(`input[name=tool][value=${tool}]`).checked = true;
  editor.mode = tool;
  byId("stage").dataset.tool = tool;
  if (tool !== "off") {
    pick(false);
    if (HIDING.includes(byId("stage").dataset.view)) setView("outline");
  }
  if (drawn) editor.place();
}

function setView(name) {
  document.querySelector(`input[name=view][value=${name}]`).checked = true;
  byId("stage").dataset.view = name;
  if (HIDING.includes(name) && editor.mode !== "off") setTool("off");
  divide();
}

// From the person

for (const id of ["choose", "camera", "another"]) {
  byId(id).addEventListener("change", ({ target }) => {
    take([...target.files]);
    // So that the same file can be chosen again.
    target.value = "";
  });
}

async function takeExample() {
  try {
    const response = await fetch("page/example.jpg");
    if (!response.ok) throw response;
    take([new File([await response.blob()], "example.jpg", { type: "image/jpeg" })]);
  } catch {
    fail(GONE, takeExample);
  }
}

const clicked = (id, handle) => byId(id).addEventListener("click", handle);

clicked("example", takeExample);
clicked("retry", () => tryAgain());
clicked("download", saveMask);
clicked("save-csv", async () => save(csv(await rows()), "lesions.csv"));
clicked("save-coco", async () => save(coco(await rows((mask) => ({ rle: cocoRle(mask) }))), "lesions-coco.json"));
clicked("save-zip", saveZip);
clicked("save-photo", () => save(good.file, good.name));
clicked("live-again", resume);
clicked("clear", removeAll);
clicked("zoom-in", () => view.zoomBy(1.5));
clicked("zoom-out", () => view.zoomBy(1 / 1.5));
clicked("zoom-fit", () => good?.size && view.fit(good.size.width, good.size.height));
clicked("undo", () => editor.undo());
document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "z" && editor.mode !== "off" && editor.canUndo) {
    event.preventDefault();
    editor.undo();
  }
});
clicked("start-over", () => {
  editor.reset();
  good.edited = null;
  ahead = false;
  redraw();
});
clicked("scale-pick", () => pick(!picking));

byId("photo").addEventListener("error", () => {
  byId("photo").dataset.shown = "false";
  byId("photo").alt = "";
  if (!byId("photo").hidden) byId("no-preview").hidden = current?.state === "error";
});

byId("picture").addEventListener("load", () => {
  byId("picture").dataset.shown = "true";
});

byId("picture").addEventListener("error", () => {
  byId("no-preview").hidden = false;
});

byId("threshold").addEventListener("input", ({ target }) => {
  byId("threshold-value").textContent = Number(target.value).toFixed(2);
  redraw();
});
byId("threshold").addEventListener("change", refill);

byId("borders").addEventListener("change", redraw);

byId("clean").addEventListener("change", () => {
  redraw();
  refill();
});

byId("scale-mm").addEventListener("change", scaleByRuler);
byId("scale-um").addEventListener("change", ({ target }) => {
  if (good) setScale(target.valueAsNumber > 0 ? target.valueAsNumber / 1000 : null);
});
byId("scale-all").addEventListener("change", () => {
  common = good?.scale ?? common;
  redraw();
  refill();
});

byId("reveal").addEventListener("input", divide);
addEventListener("resize", () => drawn && editor.place());

for (const radio of document.querySelectorAll("input[name=tool]")) {
  radio.addEventListener("change", () => setTool(radio.value));
}

// A browser may keep the choice over a reload.
for (const radio of document.querySelectorAll("input[name=view]")) {
  radio.addEventListener("change", () => setView(radio.value));
  if (radio.checked) setView(radio.value);
}
for (const radio of document.querySelectorAll("input[name=colour]")) {
  radio.addEventListener("change", () => {
    document.body.dataset.colour = radio.value;
  });
  if (radio.checked) document.body.dataset.colour = radio.value;
}
setTool("off");

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

startLive((file) => take([file], true));
tellServer();
// Only pages that come by https, or from this machine, may have one.
navigator.serviceWorker?.register("sw.js").catch(() => {});
