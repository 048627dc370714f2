// The outline of a mask, drawn over its photo.

const EDGE = [0, 0, 0];
const LINE = [0, 235, 200];

/** A copy of the picture with the mask's outline over it; a black edge keeps it visible on any skin. */
export function overlay({ data, width, height }, result, { colour = LINE } = {}) {
  if (result.width !== width || result.height !== height) {
    throw new RangeError(`The mask has ${result.width}×${result.height} pixels, the picture ${width}×${height}.`);
  }
  const drawn = new Uint8ClampedArray(data);
  const outline = outlineOf(result.mask, width, height);
  const reach = Math.max(1, Math.round(Math.max(width, height) / 600));
  for (const [rgb, distance] of [[EDGE, reach + 1], [colour, reach]]) {
    for (const at of outline) {
      const [x, y] = [at % width, Math.floor(at / width)];
      for (let v = Math.max(0, y - distance); v <= Math.min(height - 1, y + distance); v++) {
        const [first, last] = [Math.max(0, x - distance), Math.min(width - 1, x + distance)];
        for (let u = first; u <= last; u++) drawn.set([...rgb, 255], 4 * (v * width + u));
      }
    }
  }
  return { data: drawn, width, height };
}

/** The pixels that are lesion and have a neighbour that is not; beyond the picture nothing is. */
function outlineOf(mask, width, height) {
  const found = [];
  for (let at = 0; at < mask.length; at++) {
    if (!mask[at]) continue;
    const x = at % width;
    const isInside = x && x < width - 1 && mask[at - 1] && mask[at + 1] && mask[at - width] && mask[at + width];
    if (!isInside) found.push(at);
  }
  return found;
}
