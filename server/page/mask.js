// The network's probabilities → mask, figures, outline and PNG, as the server makes them: so that
// another threshold needs no other request.

/** `mask.probabilities` of an answer → numbers from 0 to 1, row by row. */
export function decode({ width, height, probabilities }) {
  const bytes = Uint8Array.from(atob(probabilities), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const values = Float32Array.from({ length: width * height }, (_, i) => view.getUint16(2 * i, true) / 65535);
  return { width, height, values };
}

/**
 * Leave only the largest region above the threshold, joined by edges, and fill its holes. With `counts`
 * it is the one that has most of the pixels that count, by their index.
 */
export function largestRegion({ width, height, values }, threshold, counts = () => true) {
  const label = new Int32Array(width * height);
  const flood = (from, mark, inside) => {
    const found = [from];
    label[from] = mark;
    for (let next = 0; next < found.length; next++) {
      const at = found[next];
      const column = at % width;
      for (const [to, within] of [
        [at - 1, column > 0],
        [at + 1, column < width - 1],
        [at - width, at >= width],
        [at + width, at < width * (height - 1)],
      ]) {
        if (within && label[to] === 0 && inside(to)) {
          label[to] = mark;
          found.push(to);
        }
      }
    }
    return found;
  };
  let [kept, most] = [[], -1];
  for (let at = 0; at < values.length; at++) {
    if (values[at] > threshold && label[at] === 0) {
      const region = flood(at, 1, (to) => values[to] > threshold);
      const counted = region.filter(counts).length;
      if (counted > most || (counted === most && region.length > kept.length)) [kept, most] = [region, counted];
    }
  }
  if (!kept.length) return { width, height, values };
  const mine = new Uint8Array(values.length);
  for (const at of kept) mine[at] = 1;
  label.fill(0);
  for (let at = 0; at < values.length; at++) {
    const column = at % width;
    const frame = column === 0 || column === width - 1 || at < width || at >= values.length - width;
    if (frame && !mine[at] && label[at] === 0) flood(at, 1, (to) => !mine[to]);
  }
  const cleaned = values.map((value, at) => {
    if (mine[at]) return value;
    return label[at] === 0 ? 1 : value > threshold ? 0 : value;
  });
  return { width, height, values: cleaned };
}

/**
 * Leave only the largest region of a mask at the photo's size, and fill its holes: what is one region
 * of the probabilities can be thinner than a pixel somewhere.
 */
export function largestPart(mask) {
  const regions = connected(runsOf(mask));
  if (!regions.length) return mask;
  const pixels = (region) => region.reduce((sum, [, start, end]) => sum + end - start, 0);
  const kept = regions.reduce((most, region) => (pixels(region) > pixels(most) ? region : most));
  const left = kept.reduce((least, run) => Math.min(least, run[1]), Infinity);
  const right = kept.reduce((most, run) => Math.max(most, run[2]), 0);
  const [top, bottom] = [kept[0][0], kept[kept.length - 1][0] + 1];
  // The first of what is around it is what reaches the frame; holes are the rest.
  const holes = connected(around(kept, left - 1, right + 1)).slice(1);
  const filled = [kept, ...holes];
  const bits = new Uint8Array(mask.bits.length);
  for (const region of filled) for (const run of region) setRun(bits, mask.width, run);
  const area = filled.reduce((sum, region) => sum + pixels(region), 0);
  const box = [left, top, right - left, bottom - top];
  return { bits, width: mask.width, height: mask.height, area, box };
}

/** The pixels of a mask as runs, from the top: row, first column, column after the last. */
function runsOf({ bits, width, height }) {
  const stride = Math.ceil(width / 8);
  const runs = [];
  for (let y = 0; y < height; y++) {
    let start = -1;
    for (let at = 0; at < stride; at++) {
      const byte = bits[y * stride + at];
      if (byte === (start < 0 ? 0 : 255)) continue;
      for (let bit = 0; bit < 8; bit++) {
        const lesion = (byte & (128 >> bit)) !== 0;
        if (lesion === start >= 0) continue;
        if (!lesion) runs.push([y, start, at * 8 + bit]);
        start = lesion ? at * 8 + bit : -1;
      }
    }
    if (start >= 0) runs.push([y, start, width]);
  }
  return runs;
}

/** Regions joined by edges, as their runs from the top; by union and find on runs in reading order. */
function connected(runs) {
  const parent = Int32Array.from(runs, (_, i) => i);
  const root = (i) => {
    while (parent[i] !== i) i = parent[i] = parent[parent[i]];
    return i;
  };
  let upper = 0;
  for (let lower = 0; lower < runs.length; lower++) {
    const [row, first, last] = runs[lower];
    while (runs[upper][0] < row - 1 || (runs[upper][0] === row - 1 && runs[upper][2] <= first)) upper++;
    // What reaches beyond this run may touch the next one too.
    for (let i = upper; runs[i][0] === row - 1 && runs[i][1] < last; i++) parent[root(lower)] = root(i);
  }
  const found = new Map();
  runs.forEach((run, i) => {
    const region = found.get(root(i));
    if (region) region.push(run);
    else found.set(root(i), [run]);
  });
  return [...found.values()];
}

/** What a region is not, between these columns and the rows next to it. */
function around(region, left, right) {
  const outside = [[region[0][0] - 1, left, right]];
  let [row, start] = [region[0][0], left];
  for (const [y, first, last] of region) {
    if (y !== row) {
      outside.push([row, start, right]);
      [row, start] = [y, left];
    }
    outside.push([row, start, first]);
    start = last;
  }
  outside.push([row, start, right], [row + 1, left, right]);
  return outside;
}

function setRun(bits, width, [y, from, to]) {
  const stride = Math.ceil(width / 8);
  for (let x = from; x < to; x++) {
    if ((x & 7) === 0 && x + 8 <= to) {
      bits[y * stride + (x >> 3)] = 255;
      x += 7;
    } else bits[y * stride + (x >> 3)] |= 128 >> (x & 7);
  }
}

/** For each output pixel: the source pixel before it, and the share of the next. */
function positions(length, source) {
  return Array.from({ length }, (_, i) => {
    const at = Math.min(Math.max((i + 0.5) * (source / length) - 0.5, 0), source - 1);
    return [Math.floor(at), at - Math.floor(at)];
  });
}

/** The map's values at another size, row by row: bilinear, as the mask is made. */
export function resample(map, width, height) {
  const across = positions(width, map.width);
  const values = new Float32Array(width * height);
  const line = new Float32Array(map.width + 1);
  positions(height, map.height).forEach(([row, down], y) => {
    const upper = row * map.width;
    const lower = Math.min(row + 1, map.height - 1) * map.width;
    for (let c = 0; c < map.width; c++) {
      line[c] = map.values[upper + c] + (map.values[lower + c] - map.values[upper + c]) * down;
    }
    line[map.width] = line[map.width - 1];
    for (let x = 0; x < width; x++) {
      const [c, right] = across[x];
      values[y * width + x] = line[c] + (line[c + 1] - line[c]) * right;
    }
  });
  return values;
}

/**
 * The mask at the photo's size in packed bits, the leftmost pixel in the highest, with its figures.
 *
 * Bilinear, with half-pixel centres and clamped edges. Between two source columns on the same side
 * of the threshold all pixels are on that side, so only where they differ is anything computed.
 */
export function lesionMask(map, width, height, threshold) {
  const stride = Math.ceil(width / 8);
  const bits = new Uint8Array(stride * height);
  const across = positions(width, map.width);
  const starts = new Int32Array(map.width + 1).fill(width);
  for (let x = width - 1; x >= 0; x--) starts[across[x][0]] = x;
  for (let c = map.width - 1; c >= 0; c--) starts[c] = Math.min(starts[c], starts[c + 1]);
  const line = new Float32Array(map.width);
  let [area, left, top, right, bottom] = [0, width, height, 0, 0];
  positions(height, map.height).forEach(([row, down], y) => {
    const upper = row * map.width;
    const lower = Math.min(row + 1, map.height - 1) * map.width;
    for (let c = 0; c < map.width; c++) {
      line[c] = map.values[upper + c] + (map.values[lower + c] - map.values[upper + c]) * down;
    }
    const fill = (from, to) => {
      if (to <= from) return;
      area += to - from;
      left = Math.min(left, from);
      right = Math.max(right, to);
      top = Math.min(top, y);
      bottom = y + 1;
      setRun(bits, width, [y, from, to]);
    };
    for (let c = 0; c < map.width; c++) {
      const next = line[Math.min(c + 1, map.width - 1)];
      const above = line[c] > threshold;
      if (above === next > threshold) {
        if (above) fill(starts[c], starts[c + 1]);
        continue;
      }
      for (let x = starts[c]; x < starts[c + 1]; x++) {
        if (line[c] + (next - line[c]) * across[x][1] > threshold) fill(x, x + 1);
      }
    }
  });
  const box = area ? [left, top, right - left, bottom - top] : null;
  return { bits, width, height, area, box };
}

/**
 * The outline in pixels of the photo, as rings of [x, y]: marching squares on a grid of at least 512
 * points a side, so that the bilinear surface between the map's own points is followed.
 */
export function outlineRings(map, width, height, threshold) {
  const fine = Math.max(1, Math.round(512 / Math.max(map.width, map.height)));
  const [columns, rows] = [map.width * fine, map.height * fine];
  // A border below the threshold closes the rings at the frame.
  const wide = columns + 2;
  const grid = new Float32Array(wide * (rows + 2)).fill(-1);
  const values = resample(map, columns, rows);
  for (let y = 0; y < rows; y++) {
    for (let x = 0; x < columns; x++) grid[(y + 1) * wide + x + 1] = values[y * columns + x] - threshold;
  }
  const scale = (at, from, length) => Math.min(Math.max((at - 0.5) / from, 0), 1) * length;
  const point = (edge) => {
    const i = edge >> 1;
    const other = i + (edge & 1 ? wide : 1);
    const share = grid[i] / (grid[i] - grid[other]);
    const [x, y] = [i % wide, Math.floor(i / wide)];
    const border = (at, count) => (at < 0.999 ? 0 : at > count + 0.001 ? count + 1 : at);
    const px = border(x + (edge & 1 ? 0 : share), columns);
    const py = border(y + (edge & 1 ? share : 0), rows);
    return [scale(px, columns, width), scale(py, rows, height)];
  };
  const next = crossings(grid, wide, columns, rows);
  const rings = [];
  while (next.size) {
    const points = [];
    let [edge] = next.keys();
    while (next.has(edge)) {
      points.push(point(edge));
      const to = next.get(edge);
      next.delete(edge);
      edge = to;
    }
    rings.push(points);
  }
  return rings;
}

/**
 * From each edge of the grid that the outline crosses, with the lesion at one hand, to the next. Edge
 * 2i goes right from point i, 2i + 1 down.
 */
function crossings(grid, wide, columns, rows) {
  const next = new Map();
  for (let y = 0; y <= rows; y++) {
    for (let x = 0; x <= columns; x++) {
      const i = y * wide + x;
      const first = grid[i] > 0;
      if (first === grid[i + 1] > 0 && first === grid[i + wide + 1] > 0 && first === grid[i + wide] > 0) {
        continue;
      }
      const corners = [first, grid[i + 1] > 0, grid[i + wide + 1] > 0, grid[i + wide] > 0];
      const edges = [2 * i, 2 * (i + 1) + 1, 2 * (i + wide), 2 * i + 1];
      const middle = grid[i] + grid[i + 1] + grid[i + wide + 1] + grid[i + wide] > 0;
      const saddle = corners[0] === corners[2] && corners[1] === corners[3] && corners[0] !== corners[1];
      for (let k = 0; k < 4; k++) {
        // Clockwise from outside to inside on edge k; out again on the first that leaves, or, where
        // the middle of a saddle is outside, the one that cuts off this corner alone.
        if (corners[k] || !corners[(k + 1) % 4]) continue;
        let out = k;
        do out = (out + 1) % 4;
        while (!(corners[out] && !corners[(out + 1) % 4]));
        if (saddle && middle) out = (out + 2) % 4;
        next.set(edges[k], edges[out]);
      }
    }
  }
  return next;
}

/** What a ring of [x, y] encloses. */
export function enclosed(ring) {
  return Math.abs(ring.reduce((sum, [x, y], i) => sum + x * ring.at(i - 1)[1] - y * ring.at(i - 1)[0], 0)) / 2;
}

/** The ring that encloses most; undefined where there is none. */
export function largestRing(rings) {
  return rings.reduce((most, ring) => (most && enclosed(most) >= enclosed(ring) ? most : ring), undefined);
}

/** Rings of [x, y] as the path of an SVG. */
export function svgPath(rings) {
  const text = (ring) => ring.map(([x, y]) => `${x.toFixed(2)} ${y.toFixed(2)}`).join("L");
  return rings.map((ring) => `M${text(ring)}Z`).join("");
}

/** COCO's compressed run-length encoding of a mask, as the server writes it. */
export function cocoRle({ bits, width, height }) {
  const stride = Math.ceil(width / 8);
  const runs = [];
  let [now, run] = [0, 0];
  for (let x = 0; x < width; x++) {
    const bit = 7 - (x & 7);
    for (let y = 0, at = x >> 3; y < height; y++, at += stride) {
      if (((bits[at] >> bit) & 1) === now) run++;
      else {
        runs.push(run);
        [now, run] = [1 - now, 1];
      }
    }
  }
  runs.push(run);
  // The difference from the run two before, in groups of 5 bits, lowest first.
  const codes = [];
  runs.forEach((length, i) => {
    let value = i > 2 ? length - runs[i - 2] : length;
    for (let more = true; more; ) {
      const group = value & 31;
      value >>= 5;
      more = value !== (group & 16 ? -1 : 0);
      codes.push((more ? group | 32 : group) + 48);
    }
  });
  return { size: [height, width], counts: codes.map((code) => String.fromCharCode(code)).join("") };
}

/** A 1-bit greyscale PNG, lesion white. */
export async function encodePng({ bits, width, height }) {
  const stride = Math.ceil(width / 8);
  const lines = new Uint8Array((stride + 1) * height);
  for (let y = 0; y < height; y++) {
    lines.set(bits.subarray(y * stride, (y + 1) * stride), y * (stride + 1) + 1);
  }
  const zlib = new Blob([lines]).stream().pipeThrough(new CompressionStream("deflate"));
  const pixels = new Uint8Array(await new Response(zlib).arrayBuffer());
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint8(8, 1);
  return new Blob(
    [
      new Uint8Array([0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a]),
      chunk("IHDR", new Uint8Array(header.buffer)),
      chunk("IDAT", pixels),
      chunk("IEND", new Uint8Array()),
    ],
    { type: "image/png" },
  );
}

function chunk(kind, body) {
  const bytes = new Uint8Array(12 + body.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, body.length);
  bytes.set(new TextEncoder().encode(kind), 4);
  bytes.set(body, 8);
  view.setUint32(8 + body.length, crc(bytes.subarray(4, 8 + body.length)));
  return bytes;
}

const CRCS = Int32Array.from({ length: 256 }, (_, value) => {
  for (let bit = 0; bit < 8; bit++) value = (value >>> 1) ^ (value & 1 ? 0xedb88320 : 0);
  return value;
});

/** CRC-32, as PNG and ZIP have it. */
export function crc(bytes) {
  let value = -1;
  for (const byte of bytes) value = (value >>> 8) ^ CRCS[(value ^ byte) & 255];
  return ~value >>> 0;
}
