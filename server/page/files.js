// What is saved of several photos: a table, COCO's JSON, and a ZIP of masks.

import { crc } from "./mask.js";

const COLUMNS = [
  "photo", "width", "height", "threshold", "edited", "area_px", "area_percent", "diameter_px", "perimeter_px",
  "mm_per_px", "area_mm2", "diameter_mm", "perimeter_mm", "expected_jaccard", "unfit", "refused",
];

/**
 * The table as CSV (RFC 4180).
 *
 * A row has `name` and either `refused`, why there is no mask, or `width` and `height` of the mask,
 * `figures` (of `measure`), `threshold`, `edited`, `scale` (millimetres a pixel), `quality` and `fitness`; the
 * last three may be null.
 */
export function csv(rows) {
  const lines = rows.map(({ name, refused, width, height, figures, threshold, edited, scale, quality, fitness }) => {
    if (refused) return { photo: name, refused };
    const { area, share, diameter, perimeter } = figures;
    const pixels = {
      photo: name, width, height, threshold: edited ? "" : threshold,
      edited: edited ? "yes" : "no", area_px: area, area_percent: (share * 100).toFixed(3),
      diameter_px: diameter.toFixed(1), perimeter_px: perimeter.toFixed(1),
      expected_jaccard: quality?.jaccard, unfit: fitness && (fitness.unfit ? "yes" : "no"),
    };
    if (!scale) return pixels;
    return {
      ...pixels, mm_per_px: scale.toPrecision(5), area_mm2: (area * scale * scale).toFixed(3),
      diameter_mm: (diameter * scale).toFixed(3), perimeter_mm: (perimeter * scale).toFixed(3),
    };
  });
  const text = [COLUMNS, ...lines.map((line) => COLUMNS.map((column) => line[column] ?? ""))]
    .map((cells) => cells.map(cell).join(","))
    .join("\r\n");
  // The mark at the start tells spreadsheets that it is UTF-8.
  return new Blob(["\ufeff", text, "\r\n"], { type: "text/csv" });
}

function cell(value) {
  // A spreadsheet would compute a name that begins like a formula.
  const text = typeof value === "string" && /^[=+\-@\t\r']/.test(value) ? `'${value}` : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** All masks as one COCO data set; rows as in `csv`, with `rle`. Photos without a lesion have no annotation. */
export function coco(rows) {
  const found = rows.filter(({ refused }) => !refused);
  const images = found.map(({ name, width, height }, i) => ({ id: i + 1, file_name: name, width, height }));
  const annotations = found.flatMap(({ figures: { area, box }, rle }, i) =>
    area ? [{ id: i + 1, image_id: i + 1, category_id: 1, iscrowd: 0, area, bbox: box, segmentation: rle }] : [],
  );
  const categories = [{ id: 1, name: "lesion", supercategory: "skin" }];
  return new Blob([JSON.stringify({ images, annotations, categories })], { type: "application/json" });
}

/** Names without their ends, each once: `a.jpg`, `a.png` → `a`, `a-2`. */
export function stems(names) {
  const taken = new Set();
  return names.map((name) => {
    const stem = name.replace(/\.[^.]*$/, "").replace(/[\\/:*?"<>|\0-\x1f]/g, "_") || "photo";
    let free = stem;
    for (let i = 2; taken.has(free.toLowerCase()); i++) free = `${stem}-${i}`;
    taken.add(free.toLowerCase());
    return free;
  });
}

/** A ZIP of `[name, Blob]`, stored as they are: masks are PNG, which is compressed already. */
export async function zip(files) {
  const [parts, central] = [[], []];
  let [offset, length] = [0, 0];
  for (const [name, blob] of files) {
    const title = new TextEncoder().encode(name);
    const body = new Uint8Array(await blob.arrayBuffer());
    // Version 2.0, names in UTF-8, stored, 1 January 1980; then the sum and the sizes.
    const common = [[2, 20], [2, 1 << 11], [2, 0], [2, 0], [2, 33], [4, crc(body)], [4, body.length],
                    [4, body.length], [2, title.length], [2, 0]];
    const local = record([[4, 0x04034b50], ...common]);
    parts.push(local, title, body);
    const entry = record([[4, 0x02014b50], [2, 20], ...common, [2, 0], [2, 0], [2, 0], [4, 0], [4, offset]]);
    central.push(entry, title);
    offset += local.length + title.length + body.length;
    length += entry.length + title.length;
  }
  const end = record([[4, 0x06054b50], [2, 0], [2, 0], [2, files.length], [2, files.length], [4, length],
                      [4, offset], [2, 0]]);
  return new Blob([...parts, ...central, end], { type: "application/zip" });
}

/** Numbers as bytes, the lowest first: `[bytes, value]` each. */
function record(fields) {
  const bytes = new Uint8Array(fields.reduce((sum, [size]) => sum + size, 0));
  let at = 0;
  for (const [size, value] of fields) {
    for (let i = 0; i < size; i++) bytes[at++] = (value >>> (8 * i)) & 255;
  }
  return bytes;
}
