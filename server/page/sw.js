// Keeps the page's own files, so that it opens without the network. Photos, masks and all other
// requests pass by: they are not looked at, and nothing of them is kept.

const CACHE = "slsnet-page";
const FILES = [
  "./",
  "page/app.js",
  "page/dom.js",
  "page/edit.js",
  "page/example.jpg",
  "page/files.js",
  "page/icon.png",
  "page/icon.svg",
  "page/live.js",
  "page/manifest.webmanifest",
  "page/mask.js",
  "page/measure.js",
  "page/segment.js",
  "page/server.js",
  "page/stream.js",
  "page/strip.js",
  "page/style.css",
  "page/view.js",
];
const HOME = new URL("./", self.location).href;

self.addEventListener("install", (event) => {
  self.skipWaiting();
  event.waitUntil(
    caches.open(CACHE).then((cache) => cache.addAll(FILES.map((name) => new Request(name, { cache: "no-cache" })))),
  );
});

self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && (url === HOME || url.startsWith(`${HOME}page/`))) event.respondWith(answer(event));
});

/** The server's file; what was kept of it where the server, or the way to it, fails. */
async function answer(event) {
  const cache = await caches.open(CACHE);
  const kept = () => cache.match(event.request, { ignoreVary: true });
  // What lies in a folder that is named by its digest never changes.
  const fixed = /\/page\/device\/[0-9a-f]{16}\//.test(event.request.url) && (await kept());
  if (fixed) return fixed;
  let response;
  try {
    response = await fetch(event.request);
  } catch (error) {
    return (await kept()) ?? Promise.reject(error);
  }
  if (response.status >= 500) return (await kept()) ?? response;
  if (response.ok) event.waitUntil(cache.put(event.request, response.clone()));
  return response;
}
