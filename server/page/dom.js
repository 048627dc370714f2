// What every part of the page uses of the document.

export const byId = (id) => document.getElementById(id);

export const whole = new Intl.NumberFormat("en");

/** An element with attributes and children. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** An element of an SVG. */
export function shape(name, attributes = {}) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/** A word for the person, where it is seen and heard; empty takes it away. */
export function note(text) {
  byId("note").textContent = text;
  byId("note").hidden = !text;
}

/** Hand a file to the browser to save. */
export function save(blob, name) {
  const url = URL.createObjectURL(blob);
  element("a", { href: url, download: name }).click();
  // The browser reads it after this task.
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
