// Sizes of a lesion, in pixels, and in millimetres where the photo's scale is known.

import { whole } from "./dom.js";

/**
 * What is measured, in pixels: `mask` as `lesionMask` gives it, `rings` of its outline.
 *
 * The perimeter is that of all rings, holes included. The diameter is the largest distance between two
 * points of the outline. `cut` is whether the lesion reaches the photo's edge: then all of it is of the
 * part that is seen.
 */
export function measure(mask, rings) {
  const { area, box, width, height } = mask;
  const perimeter = rings.reduce(
    (sum, ring) => sum + ring.reduce((length, [x, y], i) => {
      const [a, b] = ring.at(i - 1);
      return length + Math.hypot(x - a, y - b);
    }, 0),
    0,
  );
  const corners = hull(rings.flat());
  let square = 0;
  for (let i = 0; i < corners.length; i++) {
    for (let j = 0; j < i; j++) {
      square = Math.max(square, (corners[i][0] - corners[j][0]) ** 2 + (corners[i][1] - corners[j][1]) ** 2);
    }
  }
  const diameter = Math.sqrt(square);
  const cut = Boolean(box) && (!box[0] || !box[1] || box[0] + box[2] === width || box[1] + box[3] === height);
  return { area, share: area / (width * height), box, perimeter, diameter, cut };
}

/** The convex hull (Andrew's monotone chain). */
function hull(points) {
  const sorted = [...points].sort(([a, b], [c, d]) => a - c || b - d);
  const chain = (order) => {
    const kept = [];
    for (const [x, y] of order) {
      while (kept.length > 1) {
        const [[a, b], [c, d]] = [kept[kept.length - 2], kept[kept.length - 1]];
        if ((c - a) * (y - b) - (d - b) * (x - a) > 0) break;
        kept.pop();
      }
      kept.push([x, y]);
    }
    return kept.slice(0, -1);
  };
  return [...chain(sorted), ...chain(sorted.reverse())];
}

/** `length` pixels in words; `scale` is millimetres a pixel, or null. */
export function lengthText(length, scale) {
  return scale ? `${(length * scale).toFixed(1)} mm` : `${whole.format(Math.round(length))} px`;
}

/** `area` pixels in words. */
export function areaText(area, scale) {
  return scale ? `${(area * scale * scale).toFixed(1)} mm²` : `${whole.format(area)} px`;
}
