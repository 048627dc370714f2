// What the server says of a photo.

/** The result in a JSON answer. Throws where it is no such answer. */
export function resultOf(document) {
  const { mask, lesion, model, threshold, clean, timings_ms: timingsMs, request_id: requestId } = document;
  const { width, height, format } = mask;
  let [bitmap, probability] = [null, null];
  if (format === "probabilities") {
    probability = probabilities(mask.probabilities, width * height);
    bitmap = Uint8Array.from(probability, (value) => Number(value > threshold));
  } else {
    bitmap = fromRle(mask.rle.counts, width, height);
  }
  if (![lesion?.area, threshold].every(Number.isFinite) || !model?.name || !requestId) {
    throw new TypeError("a member is missing");
  }
  return {
    mask: bitmap,
    probability,
    width,
    height,
    quality: document.quality ?? null,
    fitness: document.fitness ?? null,
    features: document.features ?? null,
    lesion,
    network: model,
    threshold,
    clean,
    timingsMs,
    requestId,
  };
}

/** Base64 of 16-bit integers, lower byte first → numbers from 0 to 1. */
function probabilities(base64, count) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  if (bytes.length !== 2 * count) throw new RangeError("the probabilities are not those of the photo");
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: count }, (_, i) => view.getUint16(2 * i, true) / 65535);
}

/** COCO's compressed run lengths, which go down the columns → 0 and 1, row by row. */
function fromRle(counts, width, height) {
  const mask = new Uint8Array(width * height);
  const runs = [];
  for (let at = 0; at < counts.length; ) {
    let [run, shift, more] = [0, 0, true];
    while (more) {
      const six = counts.charCodeAt(at++) - 48;
      if (!(six >= 0 && six < 64)) throw new RangeError("the run lengths are none");
      run |= (six & 31) << shift;
      shift += 5;
      more = (six & 32) !== 0;
      // The last group's highest bit is the sign.
      if (!more && six & 16) run |= -1 << shift;
    }
    // From the third on, each is told as its difference from the last but one.
    runs.push(runs.length > 2 ? run + runs[runs.length - 2] : run);
  }
  let at = 0;
  runs.forEach((run, i) => {
    const end = at + run;
    if (run < 0 || end > mask.length) throw new RangeError("the run lengths are not those of the photo");
    if (i % 2) for (; at < end; at++) mask[(at % height) * width + Math.floor(at / height)] = 1;
    at = end;
  });
  if (at !== mask.length) throw new RangeError("the run lengths are not those of the photo");
  return mask;
}
