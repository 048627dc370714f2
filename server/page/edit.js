// The outline corrected by hand: by brush, or by points on it.
//
// What is edited is a map as the network's, but finer, in a canvas whose opacity is the value: so
// everything that is made of the network's map is made of the corrected one too.

import { largestRing, resample } from "./mask.js";
import { shape } from "./dom.js";

const LONGEST = 768;
const POINTS = 24;
const STEPS = 30;
/** Corrected maps are 0 or 1 but for the edge. */
export const HALF = 0.5;

export class Editor {
  #canvas = document.createElement("canvas");
  #pen = this.#canvas.getContext("2d", { willReadFrequently: true });
  #ratio = 1;
  #begun = false;
  #steps = [];
  #last = null;
  #ring = null;
  #places = [];
  #held = null;

  /**
   * `shown()` gives what is on show: `map`, `threshold`, `rings`, `size`, and `edited`, whether the map
   * is a corrected one. `changed()` is called after every change.
   */
  constructor({ view, handles, shown, changed, radius }) {
    Object.assign(this, { view, handles, shown, changed, radius, mode: "off" });
    handles.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Forget the photo that was edited. */
  reset() {
    this.#steps = [];
    this.#begun = false;
    this.#ring = this.#last = this.#held = null;
  }

  get canUndo() {
    return this.#steps.length > 0;
  }

  /** The corrected map; null where nothing was corrected, or all was undone. */
  get map() {
    if (!this.#begun) return null;
    const { width, height } = this.#canvas;
    const alpha = this.#alpha();
    const values = new Float32Array(alpha.length);
    for (let i = 0; i < values.length; i++) values[i] = alpha[i] / 255;
    return { width, height, values };
  }

  /** What takes the pointer, if anything; see `View`. */
  tool() {
    if (this.mode === "off") return null;
    if (this.mode === "points") return this.#points;
    return this.#brush;
  }

  undo() {
    const step = this.#steps.pop();
    if (!step) return;
    this.#ring = null;
    this.#begun = step.edited;
    this.#write(step.alpha);
    this.changed();
  }

  #brush = {
    down: (point) => {
      this.#begin();
      this.#last = point;
      this.#stroke(point);
    },
    move: (point) => this.#stroke(point),
    up: () => {
      this.#last = null;
    },
    cancel: () => {
      if (this.#last) this.undo();
      this.#last = null;
    },
  };

  #points = {
    down: (point, event) => {
      const index = event.target.dataset?.index;
      if (index === undefined) return;
      event.target.focus();
      this.#hold(Number(index), point);
    },
    move: (point) => this.#drag(point),
    up: () => {
      this.#held = null;
    },
    cancel: () => {
      if (this.#held) this.undo();
      this.#held = null;
    },
  };

  /** Keep what there is for `undo`, and have it in the canvas. */
  #begin() {
    const step = this.#begun ? { alpha: this.#alpha(), edited: true } : this.#first();
    this.#steps.push(step);
    if (this.#steps.length > STEPS) this.#steps.shift();
    this.#begun = true;
  }

  /** What is on show, into the canvas. */
  #first() {
    const { map, threshold, size, edited } = this.shown();
    this.#ratio = Math.min(1, LONGEST / Math.max(size.width, size.height));
    const [width, height] = [size.width, size.height].map((side) => Math.max(1, Math.round(side * this.#ratio)));
    const values = resample(map, width, height);
    // The edge stays where it is, and is some two pixels wide.
    const steep = edited ? 1 : 16;
    const alpha = new Uint8ClampedArray(values.length);
    for (let i = 0; i < alpha.length; i++) alpha[i] = 255 * (HALF + (values[i] - threshold) * steep);
    Object.assign(this.#canvas, { width, height });
    this.#write(alpha);
    return { alpha, edited };
  }

  #write(alpha) {
    const { width, height } = this.#canvas;
    const pixels = new ImageData(width, height);
    for (let i = 0; i < alpha.length; i++) pixels.data[4 * i + 3] = alpha[i];
    this.#pen.putImageData(pixels, 0, 0);
  }

  #alpha() {
    const { width, height } = this.#canvas;
    const { data } = this.#pen.getImageData(0, 0, width, height);
    const alpha = new Uint8ClampedArray(width * height);
    for (let i = 0; i < alpha.length; i++) alpha[i] = data[4 * i + 3];
    return alpha;
  }

  #stroke(point) {
    const pen = this.#pen;
    pen.globalCompositeOperation = this.mode === "remove" ? "destination-out" : "source-over";
    pen.lineWidth = 2 * this.radius() * this.view.pixel * this.#ratio;
    pen.lineCap = "round";
    pen.beginPath();
    pen.moveTo(...this.#last.map((at) => at * this.#ratio));
    pen.lineTo(...point.map((at) => at * this.#ratio));
    pen.stroke();
    this.#last = point;
    this.#ring = null;
    this.changed();
  }

  #hold(index, point) {
    this.#begin();
    // Without the region that is dragged, and without its edge.
    const pen = this.#pen;
    pen.globalCompositeOperation = "destination-out";
    this.#trace(this.#ring);
    pen.fill();
    pen.lineWidth = 2;
    pen.stroke();
    const { width, height } = this.#canvas;
    this.#held = { index, point, ring: this.#ring, around: pen.getImageData(0, 0, width, height) };
  }

  /** The held point and, less and less towards the next points, the outline beside it. */
  #drag(point) {
    if (!this.#held) return;
    const { index, ring, around } = this.#held;
    const { size } = this.shown();
    const [right, down] = [point[0] - this.#held.point[0], point[1] - this.#held.point[1]];
    const centre = this.#places[index];
    const gap = (to) => ((this.#places.at(to % POINTS) - centre + ring.length) % ring.length) || ring.length;
    const [before, after] = [ring.length - gap(index - 1), gap(index + 1)];
    const inside = (at, most) => Math.min(Math.max(at, 0), most);
    this.#ring = ring.map(([x, y], i) => {
      const ahead = (i - centre + ring.length) % ring.length;
      const far = Math.min(ahead / after, (ring.length - ahead) / before);
      const share = ahead === 0 ? 1 : far < 1 ? (1 + Math.cos(Math.PI * far)) / 2 : 0;
      return [inside(x + right * share, size.width), inside(y + down * share, size.height)];
    });
    this.#pen.putImageData(around, 0, 0);
    this.#pen.globalCompositeOperation = "source-over";
    this.#trace(this.#ring);
    this.#pen.fill();
    this.changed();
    this.place();
  }

  #trace(ring) {
    this.#pen.beginPath();
    for (const [x, y] of ring) this.#pen.lineTo(x * this.#ratio, y * this.#ratio);
    this.#pen.closePath();
  }

  #key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const move = moves[event.key];
    const index = event.target.dataset?.index;
    if (!move || index === undefined) return;
    event.preventDefault();
    const step = (event.shiftKey ? 20 : 4) * this.view.pixel;
    this.#hold(Number(index), [0, 0]);
    this.#drag(move.map((way) => way * step));
    this.#held = null;
  }

  /** Put the points on the outline; as large on the screen at any zoom. */
  place() {
    const show = this.mode === "points";
    this.handles.toggleAttribute("hidden", !show);
    if (!show) {
      this.#ring = null;
      return;
    }
    // The network's own outline may have moved with the threshold.
    if (!this.#held && !this.shown().edited) this.#ring = null;
    this.#ring ??= largestRing(this.shown().rings) ?? [];
    const ring = this.#ring;
    const count = ring.length ? POINTS : 0;
    while (this.handles.childElementCount > count) this.handles.lastElementChild.remove();
    this.#places = Array.from({ length: count }, (_, i) => Math.floor((i * ring.length) / count));
    this.#places.forEach((place, i) => {
      const named = { "data-index": i, tabindex: 0, role: "button", "aria-label": `Point ${i + 1} of ${count}` };
      const point = this.handles.children[i] ?? this.handles.appendChild(shape("circle", named));
      point.setAttribute("cx", ring[place][0]);
      point.setAttribute("cy", ring[place][1]);
      point.setAttribute("r", 8 * this.view.pixel);
    });
  }
}
