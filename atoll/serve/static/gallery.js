/** The gallery: what this browser keeps, as small images that open in the sheet. */

import { $, complain, el, release, say } from "./dom.js";
import { MAX_IMAGES, clearImages, listImages, loadImage, removeImage } from "./store.js";

const PAGE = 48; // images shown at first, and with each "Show more"

let urls = [];
let limit = PAGE;
let onOpen = () => {};

/** Listen to the gallery's buttons; `open` is called with the record of a chosen image. */
export function startGallery(open) {
  onOpen = open;
  $("more-thumbs").addEventListener("click", () => {
    limit += PAGE;
    showGallery();
  });
  $("clear").addEventListener("click", () => $("confirm").showModal());
  $("confirm-no").addEventListener("click", () => $("confirm").close());
  $("confirm-yes").addEventListener("click", async () => {
    $("confirm").close();
    await attempt(clearImages);
    await showGallery();
    $("gallery-title").focus();
    say("The gallery is empty.");
  });
  showGallery();
}

/** Run an operation on the store; its failure is told and does no other harm. */
export async function attempt(operation) {
  try {
    return await operation();
  } catch (error) {
    complain(`This browser cannot keep the gallery (${error?.message ?? "unknown reason"}). Download what you need.`);
    return null;
  }
}

/** Show the stored images, the newest first. */
export async function showGallery() {
  const images = (await attempt(listImages)) ?? [];
  urls.forEach(release);
  const visible = images.slice(0, limit);
  urls = visible.map((image) => URL.createObjectURL(image.blob));
  $("thumbs").replaceChildren(...visible.map((image, i) => el("li", {}, thumbOf(image, urls[i]))));
  const bytes = images.reduce((sum, image) => sum + image.bytes, 0);
  $("gallery-text").textContent = images.length
    ? `${images.length} of at most ${MAX_IMAGES} images, ${sizeOf(bytes)}. They are in this browser only; the oldest go first.`
    : "Finished images stay here, in this browser only.";
  $("clear").hidden = !images.length;
  $("more-thumbs").hidden = images.length <= limit;
}

const sizeOf = (bytes) => (bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);

function thumbOf(image, url) {
  const { prompt, seed, routing } = image.settings;
  const alt = `${prompt || "without a prompt"}, seed ${seed}, ${routing}`;
  const small = el("img", { src: url, alt, title: alt, loading: "lazy", class: image.width < 128 ? "pixels" : "" });
  return el("button", { type: "button", class: "thumb", on: { click: () => openImage(image.id) } }, small);
}

async function openImage(id) {
  const record = await attempt(() => loadImage(id));
  if (record) onOpen(record);
  else await showGallery();
}

/** Delete an image, and move the focus to the gallery. */
export async function deleteImage(id) {
  await attempt(() => removeImage(id));
  await showGallery();
  $("gallery-title").focus();
  say("The image is deleted.");
}
