// What the server tells of a mask and its picture, as it does (photos/quality.py, photos/fitness.py).

const GRADES = [[0.8, "good"], [0.65, "fair"], [0, "poor"]];

/** Channels: lightness, red against green, yellow against blue. */
const PAIRS = [[0, 1], [0, 2], [1, 2]];
const LEAST = 1e-6;
const [BRIGHT, DARK] = [250, 20];
const [FRAME_BELOW, FRAME_SHARE, LEAST_INSIDE] = [50, 0.08, 64];

const rounded = (value) => Number(value.toFixed(3));
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

/** How good the mask at one half is likely to be, from the network's probabilities. */
export function qualityOf(values, { expected, jaccard }) {
  let [inside, outside, area] = [0, 0, 0];
  for (const value of values) {
    if (value > 0.5) [inside, area] = [inside + value, area + 1];
    else outside += value;
  }
  const likely = rounded(between(area ? inside / (area + outside) : 0, expected, jaccard));
  return { jaccard: likely, grade: GRADES.find(([least]) => likely >= least)[1] };
}

/** The line through the points (x, y) at `at`. */
function between(at, x, y) {
  const next = x.findIndex((value) => value > at);
  if (next <= 0) return next ? y.at(-1) : y[0];
  const share = (at - x[next - 1]) / (x[next] - x[next - 1]);
  return y[next - 1] + share * (y[next] - y[next - 1]);
}

/** How far the network's square (RGB, row by row) is from dermoscopic photos; 1 is the limit. */
export function fitnessOf(square, detector) {
  let distance = distanceOf(square, detector);
  const inside = distance > 1 && insideFrame(square);
  if (inside) distance = Math.min(distance, distanceOf(inside, detector));
  return { distance, unfit: distance > 1 };
}

function distanceOf(square, { limit, means, whitening, offsets }) {
  const found = features(square);
  const squares = offsets.map((offset, group) => {
    const white = new Float64Array(found.length);
    let at = 0;
    for (let row = 0; row < found.length; row++) {
      const left = found[row] - means[group][row];
      for (let column = row; column < found.length; column++) white[column] += left * whitening[group][at++];
    }
    return white.reduce((sum, value) => sum + value * value, offset);
  });
  return rounded(Math.sqrt(Math.min(...squares)) / limit);
}

/** `inside_frame` of photos/fitness.py. */
function insideFrame(square) {
  const side = Math.sqrt(square.length / 3);
  const all = [...Array(side).keys()];
  const dark = new Uint8Array(side * side).map((_, i) => Number(Math.max(...square.subarray(3 * i, 3 * i + 3)) < FRAME_BELOW));
  const frame = new Uint8Array(side * side);
  for (const order of [all, [...all].reverse()]) {
    for (const one of all) {
      for (let i = 0; i < side && dark[one * side + order[i]]; i++) frame[one * side + order[i]] = 1;
      for (let i = 0; i < side && dark[order[i] * side + one]; i++) frame[order[i] * side + one] = 1;
    }
  }
  let [top, bottom, left, right] = [0, side, 0, side];
  const inRow = (row) => mean(frame.subarray(row * side + left, row * side + right));
  const inColumn = (column) => mean(all.slice(top, bottom).map((row) => frame[row * side + column]));
  while (Math.min(bottom - top, right - left) > LEAST_INSIDE) {
    const shares = [inRow(top), inRow(bottom - 1), inColumn(left), inColumn(right - 1)];
    const worst = shares.indexOf(Math.max(...shares));
    if (shares[worst] <= FRAME_SHARE) {
      const whole = bottom - top === side && right - left === side;
      return whole ? null : enlarged(square, [top, bottom - top], [left, right - left], side);
    }
    if (worst === 0) top++;
    else if (worst === 1) bottom--;
    else if (worst === 2) left++;
    else right--;
  }
  return null;
}

/** A part of the square as large as the whole, first its rows and then its columns interpolated. */
function enlarged(square, [top, rows], [left, columns], side) {
  const places = (count) => [...Array(side).keys()].map((i) => {
    const at = Math.min(Math.max(((i + 0.5) * count) / side - 0.5, 0), count - 1);
    const low = Math.floor(at);
    return [low, Math.min(low + 1, count - 1), at - low];
  });
  const [down, across] = [places(rows), places(columns)];
  const between = (low, high, share) => Math.floor(low * (1 - share) + high * share + 0.5);
  const result = new Uint8Array(square.length);
  const value = (row, column, channel) => square[3 * ((top + row) * side + left + column) + channel];
  for (let i = 0; i < result.length; i++) {
    const [channel, x, y] = [i % 3, Math.floor(i / 3) % side, Math.floor(i / 3 / side)];
    const [above, below, share] = down[y];
    const [before, after, part] = across[x];
    const at = (column) => between(value(above, column, channel), value(below, column, channel), share);
    result[i] = between(at(before), at(after), part);
  }
  return result;
}

/** `features` of photos/fitness.py. */
function features(square) {
  const side = Math.sqrt(square.length / 3);
  const planes = [0, 1, 2].map((channel) => new Float64Array(side * side).map((_, i) => square[3 * i + channel]));
  const light = planes[0].map((red, i) => (red + planes[1][i] + planes[2][i]) / 765);
  const halved = planes.map((plane) => half(plane, side));
  const [red, green, blue] = halved;
  const sides = [side / 2];
  const levels = [[
    red.map((value, i) => (value + green[i] + blue[i]) / 765),
    red.map((value, i) => (value - green[i]) / 510),
    red.map((value, i) => (value / 4 + green[i] / 4 - blue[i] / 2) / 255),
  ]];
  while (sides.at(-1) > 4) {
    levels.push(levels.at(-1).map((plane) => half(plane, sides.at(-1))));
    sides.push(sides.at(-1) / 2);
  }
  const products = levels.map((level) => level.map((one) => level.map((other) => mean(one.map((value, i) => value * other[i])))));
  const finest = mean(light.map((value) => value * value)) - products[0][0][0];
  const detail = products.slice(1).map((coarser, i) => coarser.map((row, y) => row.map((value, x) => products[i][y][x] - value)));
  const amount = detail.map((scale) => [0, 1, 2].map((channel) => Math.max(scale[channel][channel], 0) + LEAST));
  const share = (holds) => mean(red.map((_, i) => Number(holds(red[i], green[i], blue[i]))));
  return [
    Math.log(Math.max(finest, 0) + LEAST),
    ...amount.flat().map(Math.log),
    ...detail.flatMap((scale, i) => PAIRS.map(([x, y]) => scale[x][y] / Math.sqrt(amount[i][x] * amount[i][y]))),
    ...colourAndLayout(levels.at(-1)),
    ...[[light, side], [levels[0][0], sides[0]], [levels[1][0], sides[1]]].flatMap(([plane, wide]) => texture(plane, wide)),
    share((r, g) => r >= g),
    share((_, g, b) => g >= b),
    share((r, g, b) => Math.max(r, g, b) > BRIGHT),
    share((r, g, b) => Math.max(r, g, b) < DARK),
  ];
}

/** Means of 2×2. */
function half(plane, side) {
  const small = side / 2;
  return new Float64Array(small * small).map((_, i) => {
    const at = 2 * side * Math.floor(i / small) + 2 * (i % small);
    return (plane[at] + plane[at + 1] + plane[at + side] + plane[at + side + 1]) / 4;
  });
}

/** What 4×4 squares of three channels say. */
function colourAndLayout(coarse) {
  const [middles, corners] = [[5, 6, 9, 10], [0, 3, 12, 15]];
  const of = (plane, places) => mean(places.map((at) => plane[at]));
  const between = coarse.map((plane) => (16 * mean(plane) - 4 * of(plane, middles) - 4 * of(plane, corners)) / 8);
  const lightness = mean(coarse[0]) + 0.02;
  return [
    Math.log(lightness), mean(coarse[1]) / lightness, mean(coarse[2]) / lightness,
    ...coarse.map((plane, i) => of(plane, middles) - between[i]),
    ...coarse.map((plane, i) => of(plane, corners) - between[i]),
  ];
}

/** How unlike detail is across and down, and how evenly it is spread over the frame. */
function texture(plane, side) {
  const steps = side * (side - 1);
  let [across, down, sum] = [0, 0, 0];
  for (let at = 0; at < plane.length; at++) {
    const right = at % side < side - 1 ? plane[at + 1] - plane[at] : 0;
    const below = at + side < plane.length ? plane[at + side] - plane[at] : 0;
    across += (right * right) / steps;
    down += (below * below) / steps;
    sum += (Math.abs(right) + Math.abs(below)) / steps;
  }
  return [
    Math.abs(Math.log((across + LEAST) / (down + LEAST))),
    Math.log((sum + 1e-4) ** 2 / (across + down + LEAST)),
  ];
}
