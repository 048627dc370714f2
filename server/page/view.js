// Zoom and pan of the photo, by mouse, touch and keyboard; and the line between before and after.

const MOST = 32;

/**
 * Move what the SVG `overlay` shows inside `stage`.
 *
 * `tool()` gives what takes the pointer instead of panning, or null: `down`, `move` and `up`, each with
 * the point in pixels of the photo, and `cancel`. `changed()` is told after every move.
 */
export class View {
  #pointers = new Map();
  #busy = null;
  #size = [1, 1];
  #centre = [0.5, 0.5];

  constructor({ stage, overlay, tool, changed }) {
    Object.assign(this, { stage, overlay, tool, changed, zoom: 1 });
    for (const [name, handle] of [
      ["pointerdown", this.#down], ["pointermove", this.#move], ["pointerup", this.#up],
      ["pointercancel", this.#lost],
    ]) overlay.addEventListener(name, handle.bind(this));
    overlay.addEventListener("dblclick", (event) => {
      if (!this.tool()) this.#zoomAt(2, event.clientX, event.clientY);
    });
    overlay.addEventListener("wheel", (event) => {
      // Without a key the page scrolls. A pinch on a touch pad comes with it.
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      this.#zoomAt(Math.exp(-event.deltaY / (event.deltaMode ? 10 : 300)), event.clientX, event.clientY);
    }, { passive: false });
    stage.addEventListener("keydown", (event) => {
      if (event.target === stage && this.#key(event)) event.preventDefault();
    });
  }

  /** A photo of this size, whole. */
  fit(width, height) {
    this.#size = [width, height];
    this.#centre = [width / 2, height / 2];
    this.zoom = 1;
    this.#apply();
  }

  /** Zoom at the middle of what is seen. */
  zoomBy(factor) {
    this.zoom = Math.min(Math.max(this.zoom * factor, 1), MOST);
    this.#apply();
  }

  /** What is seen of the photo: left, top, width, height. */
  get seen() {
    const [width, height] = this.#size.map((side) => side / this.zoom);
    return [this.#centre[0] - width / 2, this.#centre[1] - height / 2, width, height];
  }

  /** How many pixels of the photo one of the screen is. */
  get pixel() {
    return 1 / (this.overlay.getScreenCTM()?.a || 1);
  }

  /** Where on the photo a pointer is. */
  at({ clientX, clientY }) {
    const matrix = this.overlay.getScreenCTM();
    return matrix ? [(clientX - matrix.e) / matrix.a, (clientY - matrix.f) / matrix.d] : [0, 0];
  }

  #apply() {
    const [width, height] = this.#size;
    this.#centre = [width, height].map((side, i) => {
      const half = side / this.zoom / 2;
      return Math.min(Math.max(this.#centre[i], half), side - half);
    });
    this.overlay.setAttribute("viewBox", this.seen.join(" "));
    this.stage.dataset.zoomed = String(this.zoom > 1);
    this.changed();
  }

  #zoomAt(factor, clientX, clientY) {
    const point = this.at({ clientX, clientY });
    const before = this.zoom;
    this.zoom = Math.min(Math.max(before * factor, 1), MOST);
    this.#centre = this.#centre.map((at, i) => point[i] + (at - point[i]) * (before / this.zoom));
    this.#apply();
  }

  #pan(right, down) {
    this.#centre = [this.#centre[0] - right * this.pixel, this.#centre[1] - down * this.pixel];
    this.#apply();
  }

  #key({ key, ctrlKey, metaKey, altKey }) {
    if (ctrlKey || metaKey || altKey) return false;
    const step = 60;
    const moves = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] };
    if (key === "+" || key === "=") this.zoomBy(1.5);
    else if (key === "-") this.zoomBy(1 / 1.5);
    else if (key === "0") this.fit(...this.#size);
    else if (moves[key] && this.zoom > 1) this.#pan(...moves[key]);
    else return false;
    return true;
  }

  #down(event) {
    if (event.button) return;
    this.overlay.setPointerCapture(event.pointerId);
    this.#pointers.set(event.pointerId, [event.clientX, event.clientY]);
    if (this.#pointers.size === 1) {
      this.#busy = this.tool();
      this.#busy?.down(this.at(event), event);
    } else {
      // Two fingers zoom, whatever one was doing.
      this.#busy?.cancel();
      this.#busy = null;
    }
  }

  #move(event) {
    const before = this.#pointers.get(event.pointerId);
    if (!before) return;
    const now = [event.clientX, event.clientY];
    if (this.#pointers.size === 1) {
      if (this.#busy) this.#busy.move(this.at(event), event);
      else if (this.zoom > 1) this.#pan(now[0] - before[0], now[1] - before[1]);
    } else if (this.#pointers.size === 2) {
      const [other] = [...this.#pointers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
      const apart = (one) => Math.hypot(one[0] - other[0], one[1] - other[1]) || 1;
      this.#zoomAt(apart(now) / apart(before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
      if (this.zoom > 1) this.#pan((now[0] - before[0]) / 2, (now[1] - before[1]) / 2);
    }
    this.#pointers.set(event.pointerId, now);
  }

  #up(event) {
    if (!this.#pointers.delete(event.pointerId)) return;
    this.#busy?.up(this.at(event), event);
    this.#busy = null;
  }

  #lost(event) {
    if (!this.#pointers.delete(event.pointerId)) return;
    this.#busy?.cancel();
    this.#busy = null;
  }
}
