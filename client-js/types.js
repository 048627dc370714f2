// Writes src/openapi.d.ts from an OpenAPI document: `node types.js openapi.json`, or the document's address.

import { readFile, writeFile } from "node:fs/promises";
import openapiTS, { astToString } from "openapi-typescript";

const [, , from] = process.argv;
const text = /^https?:/.test(from) ? await (await fetch(from)).text() : await readFile(from, "utf8");
const { openapi, info, components } = JSON.parse(text);

/** Those that an answer of `/segment/json` is made of; the rest is the client's own matter. */
const schemas = {};
function take(name) {
  if (name in schemas) return;
  schemas[name] = components.schemas[name];
  for (const [, inner] of JSON.stringify(schemas[name]).matchAll(/#\/components\/schemas\/(\w+)/g)) take(inner);
}
take("SegmentationAnswer");

const types = await openapiTS({ openapi, info, paths: {}, components: { schemas } });
await writeFile(
  new URL("src/openapi.d.ts", import.meta.url),
  `// Made by types.js from the server's OpenAPI document; not to be edited.\n\n${astToString(types)}`,
);
