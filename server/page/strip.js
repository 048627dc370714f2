// Several photos: the strip of small pictures, and the table of what was found.

import { byId, element } from "./dom.js";
import { areaText, lengthText } from "./measure.js";
import { heading } from "./segment.js";

const HEIGHT = 64;
const STATES = { waiting: "waits", busy: "is under way", done: "done", error: "refused" };
const UNFIT = "likely no dermoscopic photo";

/** One after the other: a large photo takes much memory while it is made small. */
let drawing = Promise.resolve();

/** A photo's place in the strip and its row in the table. */
export function addPhoto(photo, select) {
  const picture = element("canvas", { width: HEIGHT, height: HEIGHT, "aria-hidden": "true" });
  const word = element("span", { class: "tile-word" });
  const button = element("button", { type: "button", class: "tile" }, picture, element("span", { class: "tile-name" }, photo.name), word);
  button.addEventListener("click", () => select(photo));
  const cells = Array.from({ length: 5 }, () => element("td"));
  const row = element("tr", {}, element("th", { scope: "row" }, photo.name), ...cells);
  photo.place = { button, word, cells, row };
  byId("strip").append(element("li", {}, button));
  byId("table").append(row);
  tell(photo);
  drawing = drawing.then(() => draw(photo.file, picture));
}

/** All places are empty again. */
export function clearStrip() {
  byId("strip").replaceChildren();
  byId("table").replaceChildren();
}

/** A photo's state, in its place. */
export function tell(photo) {
  const { button, word, cells } = photo.place;
  button.dataset.state = photo.state;
  const isUnfit = photo.state === "done" && photo.fitness?.unfit;
  word.textContent = photo.state === "error" ? heading(photo.problem) : isUnfit ? UNFIT : STATES[photo.state];
  if (photo.state !== "error") return;
  // Why, where the figures would be.
  cells[0].textContent = `${heading(photo.problem)} ${photo.problem.detail ?? ""}`;
  cells[0].colSpan = 5;
  for (const cell of cells.slice(1)) cell.hidden = true;
}

/** What was found in a photo, in its row. */
export function fill({ place, size }, figures, scale) {
  const texts = [
    `${size.width} × ${size.height}`, (figures.share * 100).toFixed(1), areaText(figures.area, scale),
    lengthText(figures.diameter, scale), lengthText(figures.perimeter, scale),
  ];
  place.cells.forEach((cell, i) => {
    cell.textContent = texts[i];
    cell.colSpan = 1;
    cell.hidden = false;
  });
}

/** The small picture; none where the browser does not read the photo. */
async function draw(file, picture) {
  try {
    const bitmap = await createImageBitmap(file, { resizeHeight: HEIGHT * 2, resizeQuality: "medium" });
    picture.width = Math.min(bitmap.width, HEIGHT * 4);
    picture.height = bitmap.height;
    picture.getContext("2d").drawImage(bitmap, (picture.width - bitmap.width) / 2, 0);
    bitmap.close();
  } catch {
    picture.dataset.empty = "true";
  }
}
