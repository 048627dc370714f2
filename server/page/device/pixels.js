// A photo's bytes → the network's square pixels, as the server makes them (photos/image.py): stored
// pixels without colour management, a JPEG at reduced scale, EXIF's orientation, Pillow's BOX.

/** Side of the network's square input, pixels. */
export const SIDE = 128;

const MAX_PIXELS = 64_000_000;
const MAX_SIDE = 65_535;

/** As in photos/image.py: so many pixels of a reduced JPEG for one of the network's, at least. */
const JPEG_MARGIN = 2;

/** So many pixels are read from the browser at a time. */
const STRIP_PIXELS = 1_000_000;

/** Bits after the point of Pillow's weights (Resample.c). */
const PRECISION = 22;

/** A photo that cannot be used; `status` is the one that the server would answer with. */
export class PhotoError extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

/**
 * Decode a photo, and average it to the network's size.
 *
 * @param {Blob} photo
 * @returns {{square: Uint8Array, width: number, height: number, orientation: number}} RGB, row by row;
 *   the size is upright, in pixels.
 */
export async function squareOf(photo) {
  const { name, parts, orientation, size } = await bare(new Uint8Array(await photo.arrayBuffer()));
  if (size) checkSize(...size);
  let bitmap;
  try {
    const type = `image/${name.toLowerCase()}`;
    // In one piece: Firefox decodes no Blob of several.
    const whole = new Blob([await new Blob(parts).arrayBuffer()], { type });
    bitmap = await createImageBitmap(whole, { colorSpaceConversion: "none" });
  } catch {
    throw new PhotoError(
      422,
      `This browser does not decode the ${name} image (it is damaged, or an unusual variant of the` +
        " format): take the original file, or save it anew as JPEG or PNG.",
    );
  }
  const { width, height } = bitmap;
  checkSize(width, height);
  const stored = reduced(bitmap, name === "JPEG" ? jpegScale(width, height) : 1);
  bitmap.close();
  const square = squash(stored, orientation);
  const turned = orientation >= 5;
  return { square, width: turned ? height : width, height: turned ? width : height, orientation };
}

function checkSize(width, height) {
  if (width * height > MAX_PIXELS || Math.max(width, height) > MAX_SIDE) {
    throw new PhotoError(
      413,
      `The image has ${width}×${height} pixels, ${MAX_PIXELS} and ${MAX_SIDE} a side are allowed:` +
        " take a smaller version of it.",
    );
  }
}

/** By how much libjpeg reduces a picture of this size, as Pillow asks it to. */
export function jpegScale(width, height) {
  const enough = JPEG_MARGIN * SIDE;
  const most = Math.min(Math.floor(width / enough), Math.floor(height / enough));
  return [8, 4, 2].find((scale) => scale <= most) ?? 1;
}

/**
 * The pixels of a bitmap over white, each the mean of `by`×`by`: libjpeg's reduced transforms give
 * just these means of what the file holds, but for rounding.
 */
function reduced(bitmap, by) {
  const { width, height } = bitmap;
  const [wide, high] = [Math.ceil(width / by), Math.ceil(height / by)];
  const pixels = new Uint8Array(3 * wide * high);
  const rows = by * Math.max(1, Math.floor(STRIP_PIXELS / (width * by)));
  const context = canvas(width, Math.min(rows, height));
  for (let top = 0; top < height; top += rows) {
    const count = Math.min(rows, height - top);
    context.fillRect(0, 0, width, count);
    context.drawImage(bitmap, 0, top, width, count, 0, 0, width, count);
    const strip = context.getImageData(0, 0, width, count).data;
    means(strip, width, count, by, pixels.subarray(3 * wide * (top / by)));
  }
  return { pixels, width: wide, height: high };
}

function canvas(width, height) {
  if (typeof OffscreenCanvas === "undefined") {
    throw new PhotoError(501, "This browser is too old to compute here: let the server compute.");
  }
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  if (!context) {
    throw new PhotoError(413, "The image takes more memory than this browser has: take a smaller one.");
  }
  context.fillStyle = "white";
  context.imageSmoothingEnabled = false;
  return context;
}

/** RGBA → RGB, each pixel the mean of `by`×`by`, of fewer at the right and lower edges. */
export function means(strip, width, height, by, out) {
  const wide = Math.ceil(width / by);
  for (let y = 0; y < Math.ceil(height / by); y++) {
    const lines = Math.min(by, height - y * by);
    for (let x = 0; x < wide; x++) {
      const columns = Math.min(by, width - x * by);
      let [red, green, blue] = [0, 0, 0];
      for (let line = 0; line < lines; line++) {
        let at = 4 * ((y * by + line) * width + x * by);
        for (let column = 0; column < columns; column++, at += 4) {
          red += strip[at];
          green += strip[at + 1];
          blue += strip[at + 2];
        }
      }
      const [count, to] = [lines * columns, 3 * (y * wide + x)];
      out[to] = Math.floor(red / count + 0.5);
      out[to + 1] = Math.floor(green / count + 0.5);
      out[to + 2] = Math.floor(blue / count + 0.5);
    }
  }
}

/**
 * Pillow's BOX of the upright picture, to the bit.
 *
 * @param stored {{pixels: Uint8Array, width: number, height: number}} RGB, row by row, as it is stored.
 * @param orientation EXIF's, 1 to 8.
 * @returns {Uint8Array} RGB, `size`×`size`, row by row.
 */
export function squash({ pixels, width, height }, orientation = 1, size = SIDE) {
  // Steps through the stored pixels along an upright row (right) and column (down).
  const [w, h] = [width, height];
  const [start, right, down] = {
    1: [0, 1, w],
    2: [w - 1, -1, w],
    3: [w * h - 1, -1, -w],
    4: [w * (h - 1), 1, -w],
    5: [0, w, 1],
    6: [w * (h - 1), -w, 1],
    7: [w * h - 1, -w, -1],
    8: [w - 1, w, -1],
  }[orientation];
  const [columns, rows] = orientation >= 5 ? [h, w] : [w, h];
  const along = windows(columns, size);
  const across = windows(rows, size);
  const square = new Uint8Array(3 * size * size);
  // Pillow averages the columns of a tall picture first.
  if (2 * columns < rows + size) {
    average(pixels, start, [down, across], [right, columns, along], (x, y) => 3 * (x * size + y), square);
  } else {
    average(pixels, start, [right, along], [down, rows, across], (x, y) => 3 * (y * size + x), square);
  }
  return square;
}

/** For each output: its first sample, the number of samples, and Pillow's weight of each. */
function windows(length, size) {
  const scale = length / size;
  const filterScale = Math.max(scale, 1);
  const [support, each] = [0.5 * filterScale, 1 / filterScale];
  return Array.from({ length: size }, (_, index) => {
    const centre = (index + 0.5) * scale;
    const from = Math.max(0, Math.trunc(centre - support + 0.5));
    const to = Math.min(length, Math.trunc(centre + support + 0.5));
    let [first, count] = [0, 0];
    for (let at = from; at < to; at++) {
      const x = (at - centre + 0.5) * each;
      if (x > -0.5 && x <= 0.5 && !count++) first = at;
    }
    return { first, count, weight: count ? Math.floor(0.5 + (1 / count) * 2 ** PRECISION) : 0 };
  });
}

/** Average each of `lines` lines along `step`, round, then average those across, and round again. */
function average(pixels, start, [step, along], [lineStep, , across], place, square) {
  const rounded = (sum, weight) => Math.min(255, (sum * weight + 2 ** (PRECISION - 1)) >>> PRECISION);
  const sums = new Int32Array(3 * along.length);
  across.forEach(({ first, count, weight }, y) => {
    sums.fill(0);
    for (let line = first; line < first + count; line++) {
      const head = start + line * lineStep;
      along.forEach((window, x) => {
        let [red, green, blue] = [0, 0, 0];
        let at = 3 * (head + window.first * step);
        for (let i = 0; i < window.count; i++, at += 3 * step) {
          red += pixels[at];
          green += pixels[at + 1];
          blue += pixels[at + 2];
        }
        sums[3 * x] += rounded(red, window.weight);
        sums[3 * x + 1] += rounded(green, window.weight);
        sums[3 * x + 2] += rounded(blue, window.weight);
      });
    }
    for (let x = 0; x < along.length; x++) {
      const to = place(x, y);
      for (let i = 0; i < 3; i++) square[to + i] = rounded(sums[3 * x + i], weight);
    }
  });
}

/** As photos/heif.py. */
const MOST_COMPATIBLE = " An iPhone stores JPEG with Settings, Camera, Formats, Most Compatible.";

/** The name of a format that servers read; null where it is none. */
function foreignName(bytes) {
  if (["II*\0", "MM\0*", "II+\0"].includes(text(bytes, 0, 4))) return "TIFF";
  if (text(bytes, 128, 132) === "DICM") return "DICOM";
  if (text(bytes, 4, 8) !== "ftyp") return null;
  // As photos/formats.py.
  const brand = text(bytes, 8, 12);
  if (["avif", "avis"].includes(brand) || text(bytes, 8, 64).includes("avif")) return "AVIF";
  return /^(hei|hev|mif1|msf1)/.test(brand) ? "HEIC" : null;
}

/**
 * A photo without its metadata, so that no browser turns it or converts its colours, and what they say.
 *
 * @returns {{name, parts: Uint8Array[], orientation: number, size: number[] | null}} the format, the
 *   file's bytes, EXIF's orientation, and the stored width and height.
 */
export async function bare(bytes) {
  const starts = (...magic) => magic.every((byte, i) => bytes[i] === byte);
  if (!bytes.length) throw new PhotoError(400, "The image is empty (0 bytes): take a file of a photo.");
  const read = [
    ["JPEG", bareJpeg, starts(0xff, 0xd8, 0xff)],
    ["PNG", barePng, starts(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a)],
    ["WEBP", bareWebp, starts(0x52, 0x49, 0x46, 0x46) && text(bytes, 8, 12) === "WEBP"],
    ["BMP", () => ({ parts: [bytes], said: null, size: null }), starts(0x42, 0x4d)],
  ].find(([, , fits]) => fits);
  if (!read) {
    const foreign = foreignName(bytes);
    throw new PhotoError(
      415,
      foreign
        ? `This is a file of the format ${foreign}, which the page cannot read by itself: save the photo as JPEG` +
            ` or PNG, or let a server compute.${foreign === "HEIC" ? MOST_COMPATIBLE : ""}`
        : "The bytes are not an image of a known format: take JPEG, PNG, WEBP or BMP.",
    );
  }
  const [name, bared] = read;
  try {
    const { said, ...rest } = await bared(bytes);
    return { name, ...rest, orientation: said >= 2 && said <= 8 ? said : 1 };
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    throw new PhotoError(422, `The ${name} image ends too early (truncated): take the whole file.`);
  }
}

function text(bytes, from, to) {
  return String.fromCharCode(...bytes.subarray(from, to));
}

function viewOf(bytes) {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** What the metadata say of the orientation: EXIF's word, or XMP's where EXIF is silent. */
class Said {
  exif = null;
  xmp = null;

  takeExif(block) {
    this.exif ??= orientationIn(block);
  }

  takeXmp(block) {
    const found = /tiff:Orientation(?:="|>)([0-9])/.exec(new TextDecoder("latin1").decode(block));
    if (found) this.xmp ??= Number(found[1]);
  }

  get orientation() {
    return this.exif ?? this.xmp;
  }
}

/** The orientation in a block of EXIF (EXIF 2.32, tag 0x0112); null if there is none. */
function orientationIn(block) {
  const at = text(block, 0, 6) === "Exif\0\0" ? 6 : 0;
  const tiff = viewOf(block.subarray(at));
  try {
    const little = tiff.getUint16(0) === 0x4949;
    const directory = tiff.getUint32(4, little);
    for (let i = 0; i < tiff.getUint16(directory, little); i++) {
      const entry = directory + 2 + 12 * i;
      if (tiff.getUint16(entry, little) !== 0x0112) continue;
      return tiff.getUint16(entry + 2, little) === 4
        ? tiff.getUint32(entry + 8, little)
        : tiff.getUint16(entry + 8, little);
    }
  } catch {
    // EXIF is damaged and the pixels are sound: take the picture as it is stored.
  }
  return null;
}

/** ITU-T T.81, B.1.1: segments up to the first scan. */
function bareJpeg(bytes) {
  const view = viewOf(bytes);
  const said = new Said();
  const parts = [bytes.subarray(0, 2)];
  let [at, size] = [2, null];
  while (bytes[at + 1] !== 0xda || bytes[at] !== 0xff) {
    const marker = view.getUint16(at);
    const alone = marker <= 0xff01 || (marker >= 0xffd0 && marker <= 0xffd9) || marker === 0xffff;
    if (alone) {
      // Fill bytes and what belongs to no segment: decoders pass over them, one by one.
      at += marker === 0xffff || marker < 0xff00 ? 1 : 2;
      continue;
    }
    const end = at + 2 + Math.max(2, view.getUint16(at + 2));
    const body = bytes.subarray(at + 4, end);
    const kind = text(body, 0, 29);
    const isFrame = marker >= 0xffc0 && marker <= 0xffcf && ![0xffc4, 0xffc8, 0xffcc].includes(marker);
    if (isFrame) size ??= [view.getUint16(at + 7), view.getUint16(at + 5)];
    const isExif = marker === 0xffe1 && kind.startsWith("Exif\0\0");
    const isXmp = marker === 0xffe1 && kind.startsWith("http://ns.adobe.com/xap/1.0/");
    const isProfile = marker === 0xffe2 && kind.startsWith("ICC_PROFILE\0");
    if (isExif) said.takeExif(body);
    if (isXmp) said.takeXmp(body);
    if (!isExif && !isXmp && !isProfile) parts.push(bytes.subarray(at, end));
    at = end;
  }
  // Browsers leave the rest of a cut photo grey.
  let last = bytes.indexOf(0xff, at + 2);
  while (last >= 0 && bytes[last + 1] !== 0xd9) last = bytes.indexOf(0xff, last + 1);
  if (last < 0) throw new RangeError("no end of image");
  parts.push(bytes.subarray(at));
  return { parts, said: said.orientation, size };
}

/** Chunks of a PNG that change its colours, turn it, or only say something. */
const PNG_ASIDES = ["eXIf", "iCCP", "gAMA", "cHRM", "sRGB", "cICP", "tEXt", "zTXt", "iTXt"];

async function barePng(bytes) {
  const view = viewOf(bytes);
  const said = new Said();
  const parts = [bytes.subarray(0, 8)];
  let [at, kind] = [8, ""];
  while (kind !== "IEND") {
    const end = at + 12 + view.getUint32(at);
    kind = text(bytes, at + 4, at + 8);
    if (end > bytes.length) throw new RangeError("no end of chunk");
    const body = bytes.subarray(at + 8, end - 4);
    if (kind === "eXIf") said.takeExif(body);
    if (kind === "iTXt" && text(body, 0, 18) === "XML:com.adobe.xmp\0") said.takeXmp(body);
    if (text(body, 0, 22) === "Raw profile type exif\0") said.takeExif(await rawProfile(kind, body.subarray(22)));
    if (!PNG_ASIDES.includes(kind)) parts.push(bytes.subarray(at, end));
    at = end;
  }
  return { parts, said: said.orientation, size: [view.getUint32(16), view.getUint32(20)] };
}

/** EXIF as ImageMagick writes it into a PNG's text: hexadecimal, after three lines. */
async function rawProfile(kind, body) {
  try {
    const stream = new Blob([kind === "zTXt" ? body.subarray(1) : body]).stream();
    const plain = kind === "zTXt" ? stream.pipeThrough(new DecompressionStream("deflate")) : stream;
    const lines = (await new Response(plain).text()).split("\n").slice(3).join("");
    return Uint8Array.from(lines.match(/../g) ?? [], (digits) => parseInt(digits, 16));
  } catch {
    return new Uint8Array();
  }
}

/** Bits of VP8X that announce a colour profile, EXIF and XMP (RFC 9649). */
const WEBP_ASIDES = 0x20 | 0x08 | 0x04;

function bareWebp(bytes) {
  const view = viewOf(bytes);
  const said = new Said();
  const end = 8 + view.getUint32(4, true);
  if (end > bytes.length) throw new RangeError("no end of file");
  const parts = [];
  for (let at = 12; at + 8 <= end; ) {
    const kind = text(bytes, at, at + 4);
    const length = view.getUint32(at + 4, true);
    const next = at + 8 + length + (length & 1);
    const body = bytes.subarray(at + 8, at + 8 + length);
    if (kind === "EXIF") said.takeExif(body);
    else if (kind === "XMP ") said.takeXmp(body);
    else if (kind === "VP8X") {
      const chunk = bytes.slice(at, next);
      chunk[8] &= ~WEBP_ASIDES;
      parts.push(chunk);
    } else if (kind !== "ICCP") parts.push(bytes.subarray(at, Math.min(next, end)));
    at = next;
  }
  const head = bytes.slice(0, 12);
  viewOf(head).setUint32(4, parts.reduce((sum, part) => sum + part.length, 4), true);
  return { parts: [head, ...parts], said: said.orientation, size: null };
}
