// The client against real servers: live, killed and started again, full, slow, and of another kind.
// It starts them itself, with the Python in SLSNET_PYTHON, from the repository's root.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { after, before, test } from "node:test";
import { fileURLToPath, pathToFileURL } from "node:url";
import {
  Client,
  DeadlinePassed,
  KeyRefused,
  RequestRefused,
  ServerBusy,
  ServerFailed,
  SlsnetError,
  Unreachable,
  overlay,
} from "../src/index.js";

const ROOT = fileURLToPath(new URL("../../", import.meta.url));
const PHOTO = `${ROOT}docs/lesion.jpg`;
const photo = await readFile(PHOTO);

/** A real server; it can be killed and started again on its port. */
class Server {
  constructor(port, ...options) {
    this.port = port;
    this.options = options;
    this.url = `http://127.0.0.1:${port}`;
  }

  async start() {
    const flags = ["-m", "server", "--port", String(this.port), "--log-level", "error", ...this.options];
    this.process = spawn(process.env.SLSNET_PYTHON ?? "python3", flags, { cwd: ROOT, stdio: "ignore" });
  }

  async ready() {
    for (;;) {
      if (this.process.exitCode !== null) throw new Error("the server ended");
      try {
        if ((await fetch(`${this.url}/health/ready`)).ok) return;
      } catch {
        // It does not listen yet.
      }
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }

  async kill() {
    const ended = once(this.process, "exit");
    this.process.kill("SIGKILL");
    await ended;
  }
}

async function freePort() {
  const probe = createServer().listen(0, "127.0.0.1");
  await once(probe, "listening");
  const { port } = probe.address();
  probe.close();
  return port;
}

/** A server of other manners: `answer` makes each answer, from the request's number and headers. */
async function stub(answer) {
  const told = { headers: [], atWork: 0, most: 0 };
  const server = createServer(async (request, response) => {
    for await (const _ of request);
    const number = told.headers.push(request.headers) - 1;
    told.most = Math.max(told.most, ++told.atWork);
    const [status, headers, body] = await answer(number);
    told.atWork--;
    response.writeHead(status, headers).end(body);
  }).listen(0, "127.0.0.1");
  await once(server, "listening");
  const stop = () => (server.closeAllConnections(), server.close());
  return { ...told, told, url: `http://127.0.0.1:${server.address().port}`, stop };
}

let server;
let whole;

before(async () => {
  server = new Server(await freePort());
  await server.start();
  await server.ready();
  const answer = await fetch(`${server.url}/segment/json?mask=rle`, { method: "POST", body: photo });
  whole = await answer.text();
});

after(() => server?.kill());

const rejected = async (work) => {
  try {
    await work;
  } catch (error) {
    return error;
  }
  assert.fail("it was not rejected");
};

test("an option that there is not is refused", async () => {
  const client = new Client(server.url);
  const misspelt = { thresold: 0.4 };
  assert.throws(() => new Client(server.url, { apikey: "x" }), /no option apikey: there are apiKey/);
  const works = [
    () => client.segment(photo, misspelt),
    () => client.segmentAs(photo, "png", { probability: true }),
    () => client.segmentMany([photo], { ordered: true, ...misspelt }).next(),
    () => client.stream([photo], { bulk: true }).next(),
  ];
  for (const work of works) {
    const error = await rejected(work());
    assert.ok(error instanceof TypeError);
    assert.match(error.message, /no option (thresold|probability|bulk): there are/);
  }
});

test("every kind of photo gets the server's mask", async () => {
  const client = new Client(server.url);
  const { lesion } = JSON.parse(whole);
  const kinds = [PHOTO, pathToFileURL(PHOTO), photo, new Blob([photo]), new Uint8Array(photo).buffer];
  for (const kind of kinds) {
    const result = await client.segment(kind);
    assert.deepEqual([result.width, result.height], [600, 450]);
    assert.equal(result.mask.length, 600 * 450);
    assert.deepEqual(result.lesion, lesion);
    assert.equal(result.network.name, "slsnet");
    assert.ok(result.requestId && result.timingsMs.infer >= 0);
    assert.equal(result.probability, null);
    let [area, left, right, top, bottom] = [0, 600, 0, 450, 0];
    result.mask.forEach((value, i) => {
      if (!value) return;
      const [x, y] = [i % 600, Math.floor(i / 600)];
      area++;
      [left, right, top, bottom] = [Math.min(left, x), Math.max(right, x), Math.min(top, y), Math.max(bottom, y)];
    });
    assert.equal(area, lesion.area);
    assert.deepEqual([left, top, right - left + 1, bottom - top + 1], lesion.bounding_box);
  }
});

test("options reach the network", async () => {
  const client = new Client(`${server.url}/`);
  const options = { threshold: 0.3, clean: true };
  const plain = await client.segment(photo, options);
  const result = await client.segment(photo, { ...options, probability: true, bulk: true });
  assert.equal(result.threshold, 0.3);
  assert.equal(result.clean, true);
  assert.equal(result.probability.length, result.mask.length);
  const differing = plain.mask.filter((value, i) => value !== result.mask[i]).length;
  assert.ok(differing < 1e-4 * plain.mask.length, `${differing} pixels`);
  const named = await client.segment(photo, { ...options, model: "slsnet" });
  assert.deepEqual(named.mask, plain.mask);
  await assert.rejects(client.segment(photo, { model: "resnet" }), /no network 'resnet'/);
});

test("a refusal says what the server said", async () => {
  const client = new Client(server.url);
  const cut = photo.subarray(0, photo.length / 2);
  for (const [bytes, status] of [[Buffer.from("no photo"), 415], [cut, 422], [Buffer.alloc(0), 400]]) {
    const error = await rejected(client.segment(bytes));
    assert.ok(error instanceof RequestRefused && error instanceof SlsnetError);
    assert.equal(error.status, status);
    assert.ok(error.title && error.detail && error.message.includes(error.requestId));
    assert.equal(error.name, "RequestRefused");
  }
});

test("what is no photo is not sent", async () => {
  const nowhere = new Client(`http://127.0.0.1:${await freePort()}`, { retries: 1 });
  assert.equal((await rejected(nowhere.segment(`${ROOT}absent.jpg`))).code, "ENOENT");
  for (const wrong of [5, null, [1, 2]]) assert.ok((await rejected(nowhere.segment(wrong))) instanceof TypeError);
  const lost = await rejected(nowhere.segment(photo));
  assert.ok(lost instanceof Unreachable && lost.status === null && lost.requestId);
  assert.throws(() => new Client("no address"), TypeError);
});

test("a server killed and started again is not noticed", async () => {
  const client = new Client(server.url, { deadlineMs: 300_000, retries: 1000 });
  const expected = (await client.segment(photo)).mask;
  await server.kill();
  const asked = client.segment(photo);
  await server.start();
  assert.deepEqual((await asked).mask, expected);
  assert.deepEqual((await client.segment(photo)).mask, expected);
});

for (const [said, least] of [["1", 1000], [new Date(Date.now() + 3000).toUTCString(), 0]]) {
  test(`a full server is asked again when it says (${said})`, async () => {
    const full = await stub((number) => (number ? [200, {}, whole] : [429, { "Retry-After": said }, "{}"]));
    try {
      const asked = performance.now();
      await new Client(full.url, { deadlineMs: 60_000, apiKey: "k" }).segment(photo);
      assert.ok(performance.now() - asked >= least);
      const [first, second] = full.headers;
      assert.equal(first["x-request-id"], second["x-request-id"]);
      assert.equal(first.authorization, "Bearer k");
      const left = [first, second].map((headers) => Number(headers["x-request-timeout-ms"]));
      assert.ok(left[0] <= 60_000 && left[1] <= left[0] - least);
    } finally {
      full.stop();
    }
  });
}

test("nothing is repeated that cannot help", async () => {
  const said = JSON.stringify({ title: "Oh", detail: "It failed.", type: "urn:x", request_id: "7" });
  const kinds = [[500, ServerFailed], [422, RequestRefused], [504, DeadlinePassed], [401, KeyRefused], [302, ServerFailed]];
  for (const [status, Kind] of kinds) {
    const other = await stub(() => [status, {}, said]);
    const error = await rejected(new Client(other.url).segment(photo));
    other.stop();
    assert.ok(error instanceof Kind);
    assert.deepEqual([error.title, error.type, error.detail, error.requestId], ["Oh", "urn:x", "It failed.", "7"]);
    assert.equal(other.headers.length, 1);
  }
  // Where the pause would end after the deadline, nobody waits for it.
  const busy = await stub(() => [503, { "Retry-After": "3600" }, "<html>"]);
  const error = await rejected(new Client(busy.url).segment(photo));
  busy.stop();
  assert.ok(error instanceof ServerBusy && error.retryAfterMs === 3_600_000 && busy.headers.length === 1);
});

test("an answer of something else is told", async () => {
  const short = JSON.parse(whole);
  short.mask.rle.counts = short.mask.rle.counts.slice(4);
  for (const body of ["<html>", "[]", "{}", "null", '{"mask": {"format": "rle"}}', JSON.stringify(short)]) {
    const other = await stub(() => [200, {}, body]);
    const error = await rejected(new Client(other.url).segment(photo));
    other.stop();
    assert.ok(error instanceof ServerFailed && /address/.test(error.detail), body);
  }
});

test("deadline and signal end a request wherever it is", async () => {
  const asleep = await stub(() => new Promise(() => {}));
  const client = new Client(asleep.url, { deadlineMs: 60_000 });
  const late = await rejected(client.segment(photo, { deadlineMs: 50 }));
  assert.ok(late instanceof DeadlinePassed && late.requestId);
  const stop = new AbortController();
  const asked = rejected(client.segment(photo, { signal: stop.signal }));
  stop.abort(new Error("enough"));
  assert.equal((await asked).message, "enough");
  assert.equal((await rejected(client.segment(photo, { signal: stop.signal }))).message, "enough");
  asleep.stop();
});

test("a deadline may be infinite", async () => {
  const client = new Client(server.url);
  assert.ok((await client.segment(photo, { deadlineMs: Infinity })).lesion.area);
  for await (const { error } of client.stream([photo], { deadlineMs: Infinity })) assert.equal(error, null);
});

test("no more are at work than allowed, and they come in order", async () => {
  let free;
  const three = new Promise((resolve) => (free = resolve));
  const counted = await stub(async (number) => {
    // Three get here before any is answered, or it hangs.
    if (number === 2) free();
    await three;
    return [200, {}, whole];
  });
  let taken = 0;
  function* photos() {
    for (; taken < 9; taken++) yield photo;
  }
  const indices = [];
  for await (const { index, result } of new Client(counted.url).segmentMany(photos(), { concurrency: 3 })) {
    assert.ok(result);
    if (!indices.length) assert.ok(taken <= 3);
    indices.push(index);
  }
  counted.stop();
  assert.deepEqual(indices, [...Array(9).keys()]);
  assert.equal(counted.told.most, 3);
  assert.deepEqual([...new Set(counted.headers.map(({ priority }) => priority))], ["bulk"]);
});

test("unordered, they come as they get done", async () => {
  let oneCame;
  const came = new Promise((resolve) => (oneCame = resolve));
  // The first to ask is answered once another's outcome is there.
  const other = await stub(async (number) => (number || (await came), [200, {}, whole]));
  const indices = [];
  const many = new Client(other.url).segmentMany([photo, photo, photo], { concurrency: 2, ordered: false });
  for await (const { index } of many) {
    indices.push(index);
    oneCame();
  }
  other.stop();
  assert.deepEqual(indices.toSorted(), [0, 1, 2]);
});

test("one of many fails alone, and who leaves early leaves nothing running", async () => {
  const client = new Client(server.url);
  const outcomes = [];
  const photos = (async function* () {
    yield* [photo, Buffer.from("no photo"), `${ROOT}absent`, PHOTO];
  })();
  for await (const outcome of client.segmentMany(photos)) outcomes.push(outcome);
  assert.deepEqual(outcomes.map(({ result }) => Boolean(result)), [true, false, false, true]);
  assert.ok(outcomes[1].error instanceof RequestRefused && outcomes[2].error.code === "ENOENT");
  await assert.rejects(client.segmentMany([photo], { concurrency: 0 }).next(), RangeError);

  let [closed, asked] = [false, 0];
  const half = await stub((number) => (asked++, number ? new Promise(() => {}) : [200, {}, whole]));
  function* endless() {
    try {
      for (;;) yield photo;
    } finally {
      closed = true;
    }
  }
  for await (const { result } of new Client(half.url).segmentMany(endless(), { concurrency: 2 })) {
    assert.ok(result);
    break;
  }
  half.stop();
  assert.ok(closed && asked <= 3);
});

test("other forms are files", async () => {
  const client = new Client(server.url);
  const png = await client.segmentAs(photo, "png", { threshold: 0.4 });
  assert.equal(png.type, "image/png");
  assert.equal(Buffer.from(await png.arrayBuffer()).subarray(1, 4).toString(), "PNG");
  const coco = JSON.parse(await (await client.segmentAs(photo, "coco")).text());
  assert.deepEqual(coco.segmentation.size, [450, 600]);
  assert.ok((await rejected(client.segmentAs(photo, "gif"))) instanceof RequestRefused);
  const page = await stub(() => [200, { "Content-Type": "text/html" }, "<html>"]);
  const other = await rejected(new Client(page.url).segmentAs(photo, "png"));
  page.stop();
  assert.ok(other instanceof ServerFailed && /address/.test(other.detail));
});

test("features come where they are asked for", async () => {
  const client = new Client(server.url);
  const result = await client.segment(photo, { features: true });
  assert.ok(result.features.asymmetry >= 0 || Object.keys(result.features).length > 3);
  assert.equal((await client.segment(photo)).features, null);
});

/** A black picture, as BMP: what a camera sees through its cap. */
function cap(side = 64) {
  const bytes = Buffer.alloc(54 + 3 * side * side);
  bytes.write("BM");
  for (const [at, value] of [[2, bytes.length], [10, 54], [14, 40], [18, side], [22, side]]) bytes.writeUInt32LE(value, at);
  bytes.writeUInt16LE(1, 26);
  bytes.writeUInt16LE(24, 28);
  return bytes;
}

test("a picture that is no dermoscopic photo is told of, or refused", async () => {
  const client = new Client(server.url);
  const { fitness, quality } = await client.segment(cap());
  assert.ok(fitness.unfit && fitness.distance > 1 && quality.grade);
  // One after another: nobody would wait for the second while it is refused.
  for (const ask of [() => client.segment(cap(), { rejectUnfit: true }), () => client.segmentAs(cap(), "svg", { rejectUnfit: true })]) {
    const error = await rejected(ask());
    assert.ok(error instanceof RequestRefused && /no dermoscopic photo/.test(error.detail));
  }
  assert.equal((await client.segment(photo, { rejectUnfit: true })).fitness.unfit, false);
});

test("the outline is drawn over the picture", async () => {
  const [width, height] = [30, 20];
  const mask = new Uint8Array(width * height);
  for (let y = 5; y < 15; y++) mask.fill(1, y * width + 8, y * width + 22);
  const picture = { data: new Uint8ClampedArray(4 * width * height).fill(200), width, height };
  const drawn = overlay(picture, { mask, width, height }, { colour: [255, 0, 0] });
  const at = (x, y) => [...drawn.data.subarray(4 * (y * width + x), 4 * (y * width + x) + 3)];
  assert.deepEqual(at(8, 5), [255, 0, 0]);
  assert.deepEqual(at(7, 4), [255, 0, 0]);
  assert.deepEqual(at(6, 3), [0, 0, 0]);
  assert.deepEqual(at(15, 10), [200, 200, 200]);
  assert.deepEqual(at(0, 0), [200, 200, 200]);
  assert.ok(picture.data.every((value) => value === 200));
  // At the picture's rim the lesion ends too.
  assert.deepEqual([...overlay(picture, { mask: mask.fill(1), width, height }).data.subarray(0, 3)], [0, 235, 200]);
  assert.throws(() => overlay(picture, { mask, width: 20, height: 30 }), RangeError);
});

const streamOptions = { deadlineMs: 30_000 };
const noSocket = typeof WebSocket === "undefined" && "needs Node 22, or --experimental-websocket";

async function collected(stream) {
  const answers = [];
  for await (const answer of stream) answers.push(answer);
  return answers;
}

test("frames of a stream get the masks of photos", { skip: noSocket }, async () => {
  const client = new Client(server.url);
  const expected = await client.segment(photo, { threshold: 0.4 });
  const frames = [photo, Buffer.from("no photo"), new Blob([photo]), PHOTO];
  const answers = await collected(client.stream(frames, { ...streamOptions, threshold: 0.4, inFlight: 1 }));
  assert.deepEqual(answers.map(({ index }) => index), [0, 1, 2, 3]);
  assert.deepEqual(answers[0].result.fitness, expected.fitness);
  const strict = { ...streamOptions, rejectUnfit: true, inFlight: 1 };
  const [refused, taken] = await collected(client.stream([cap(), photo], strict));
  assert.ok(/no dermoscopic photo/.test(refused.error.detail) && taken.result);
  assert.ok(answers[1].error instanceof RequestRefused && answers[1].error.status === 415);
  for (const { result, error, dropped, latencyMs } of [answers[0], answers[2], answers[3]]) {
    assert.deepEqual(result.mask, expected.mask);
    assert.deepEqual([error, dropped], [null, 0]);
    assert.ok(latencyMs > 0);
  }
});

test("no frame is taken before there is room, and who leaves a stream ends it", { skip: noSocket }, async () => {
  const client = new Client(server.url);
  let [taken, closed] = [0, false];
  async function* camera() {
    try {
      for (;;) yield (taken++, photo);
    } finally {
      closed = true;
    }
  }
  for await (const { index } of client.stream(camera(), { ...streamOptions, inFlight: 2 })) {
    assert.ok(taken <= index + 3);
    if (index === 4) break;
  }
  assert.ok(closed);
  const stop = new AbortController();
  const left = await rejected(
    (async () => {
      for await (const _ of client.stream(camera(), { ...streamOptions, signal: stop.signal })) stop.abort(new Error("enough"));
    })(),
  );
  assert.equal(left.message, "enough");
  await rejected(collected(client.stream(["absent.jpg"], streamOptions)));
  await assert.rejects(client.stream([photo], { inFlight: 0 }).next(), RangeError);
  await assert.rejects(new Client(server.url, { WebSocket: null }).stream([photo]).next(), TypeError);
});

test("a stream outlives its server", { skip: noSocket }, async () => {
  const client = new Client(server.url, { retries: 1000 });
  const answers = [];
  for await (const answer of client.stream(Array(6).fill(photo), { ...streamOptions, inFlight: 1 })) {
    answers.push(answer);
    if (answers.length === 2) {
      await server.kill();
      await server.start();
    }
  }
  const [mask] = answers.map(({ result }) => result.mask);
  assert.ok(answers.every(({ result }) => result.mask.length === mask.length));
  // Where the next frame was on its way already, it is dropped, and counted.
  assert.equal(answers.length + answers.at(-1).dropped, 6);
  assert.equal(answers.at(-1).index, 5);
  await server.ready();
});

test("what ends a stream is told", { skip: noSocket }, async () => {
  const client = new Client(server.url);
  const error = await rejected(collected(client.stream([photo], { threshold: 2 })));
  assert.ok(error instanceof RequestRefused && error.status === 422 && /threshold/.test(error.detail));
  const nowhere = new Client(`http://127.0.0.1:${await freePort()}`, { retries: 1 });
  assert.ok((await rejected(collected(nowhere.stream([photo])))) instanceof Unreachable);
});

test("a browser without Node's modules can load it", async () => {
  for (const name of ["client", "errors", "overlay", "result", "stream"]) {
    const code = await readFile(new URL(`../src/${name}.js`, import.meta.url), "utf8");
    assert.ok(!/^import .* from "(node:|[^.])/m.test(code));
  }
});
