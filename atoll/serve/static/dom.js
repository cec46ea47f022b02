/** Elements of the page. Text from elsewhere becomes text nodes only; nothing here parses HTML. */

/** The element with an id. */
export const $ = (id) => document.getElementById(id);

/**
 * A new element.
 * @param {string} tag
 * @param {Object} attributes - null and false are left out; `on` holds listeners by event.
 * @param {...(Node|string)} children
 */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(...children);
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** A new SVG element. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...children);
  return element;
}

/** The bytes of a base64 text as a Blob. */
export function blobOf(base64, type) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
  return new Blob([bytes], { type });
}

/** Release a Blob's URL, but not while the browser may still load it: that would be an error in the console. */
export function release(url) {
  if (url) setTimeout(() => URL.revokeObjectURL(url), 30_000);
}

/** Say something in the status line, which screen readers announce. */
export function say(text) {
  $("status").textContent = text;
}

/** Show an error in words; "" hides it. */
export function complain(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}
