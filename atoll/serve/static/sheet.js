/** The sheet: the images of one run side by side, their steps under one slider, and who draws what. */

import { $, el, release } from "./dom.js";
import { classesOf, inWords, legendOf, stripOf } from "./strip.js";

let tiles = []; // {caption, alt, blobs: Map(step -> Blob), record, nodes..., shown}
let selected = -1;
let following = true; // the slider follows the sampling until someone moves it
let onSelect = () => {};

/** Listen to the slider; `select` is called with the record of a chosen image, or null. */
export function startSheet(select) {
  onSelect = select;
  $("step").addEventListener("input", () => {
    following = Number($("step").value) === Number($("step").max);
    showStep();
  });
}

/**
 * Begin a sheet of empty tiles.
 * @param {string} title
 * @param {Array<{caption: string, alt: string, width: number, height: number}>} entries
 * @param {number} steps - of all images.
 */
export function beginSheet(title, entries, steps) {
  for (const tile of tiles) release(tile.url);
  tiles = entries.map((entry, index) => makeTile(entry, index));
  selected = -1;
  following = true;
  $("sheet-title").textContent = title;
  $("sheet-empty").hidden = entries.length > 0;
  $("tiles").className = `tiles ${["none", "one", "two"][tiles.length] ?? (tiles.length <= 4 ? "four" : "many")}`;
  $("tiles").replaceChildren(...tiles.map((tile) => tile.item));
  $("step").max = Math.max(1, steps);
  $("step").value = $("step").max;
  $("step-field").hidden = true;
  $("legend").hidden = true;
  $("sheet-hint").hidden = true;
  onSelect(null);
}

function makeTile({ caption, alt, width, height }, index) {
  const image = el("img", { alt, width, height, hidden: true, class: width < 128 ? "pixels" : "" });
  const waiting = el("span", { class: "waiting" }, "waiting");
  const button = el(
    "button",
    { type: "button", class: "tile-image", "aria-pressed": "false", "aria-label": `${alt}: waiting`, disabled: true,
      on: { click: () => select(index) } },
    waiting, image,
  );
  const strip = el("div", { class: "strip", hidden: true, role: "img" });
  const marker = el("span", { class: "marker", hidden: true });
  const item = el("li", { class: "tile" }, button, el("div", { class: "strip-box" }, strip, marker), el("p", { class: "caption" }, caption));
  button.style.aspectRatio = `${width} / ${height}`;
  return { alt, blobs: new Map(), record: null, url: "", shown: null, image, waiting, button, strip, marker, item };
}

/** Show a preview in a tile. */
export function previewTile(index, step, blob) {
  const tile = tiles[index];
  tile.blobs.set(step, blob);
  $("step-field").hidden = false;
  showTile(tile);
  showStepText();
}

/** Put a finished image into a tile. `record.steps` holds its previews, which may come from the gallery. */
export function finishTile(index, record) {
  const tile = tiles[index];
  tile.record = record;
  for (const { step, blob } of record.steps) tile.blobs.set(step, blob);
  tile.blobs.set(Number($("step").max), record.blob);
  tile.button.disabled = false;
  $("step-field").hidden = tile.blobs.size < 2 && $("step-field").hidden;
  showTile(tile);
  showStepText();
  drawStrips();
  $("sheet-hint").hidden = tiles.length < 2 || selected >= 0;
}

/** Write into a tile why it has no image. */
export function failTile(index, message) {
  const tile = tiles[index];
  if (tile.record) return;
  tile.image.hidden = true;
  tile.waiting.hidden = false;
  tile.waiting.textContent = message;
  tile.button.setAttribute("aria-label", `${tile.alt}: ${message}`);
  if (!tiles.some((one) => one.record)) $("step-field").hidden = true;
}

/** The previews of a tile so far, to be stored with its image. */
export function previewsOf(index) {
  return [...tiles[index].blobs].map(([step, blob]) => ({ step, blob })).sort((a, b) => a.step - b.step);
}

/** Choose an image; what the selection shows is the caller's. */
export function select(index) {
  selected = index;
  $("sheet-hint").hidden = true;
  tiles.forEach((tile, i) => tile.button.setAttribute("aria-pressed", String(i === index)));
  onSelect(tiles[index]?.record ?? null);
}

/** The record of the chosen image. */
export const selectedRecord = () => tiles[selected]?.record ?? null;

function showStep() {
  tiles.forEach(showTile);
  showStepText();
}

function showStepText() {
  const { value, max } = $("step");
  const finished = tiles.some((tile) => tile.record);
  const newest = Math.max(...tiles.flatMap((tile) => [...tile.blobs.keys()]));
  let text = `${value} of ${max}: the estimate of the image`;
  if (value === max) text = finished ? `${max} of ${max}: the image` : `${newest} of ${max}: the newest estimate`;
  $("step-text").textContent = text;
  $("step").setAttribute("aria-valuetext", text);
}

/** Show the newest preview up to the slider's step; before the first one, the first. */
function showTile(tile) {
  const steps = [...tile.blobs.keys()].sort((a, b) => a - b);
  const step = steps.filter((one) => one <= Number($("step").value)).at(-1) ?? steps[0];
  const blob = tile.blobs.get(step);
  if (blob && blob !== tile.shown) {
    release(tile.url);
    tile.url = URL.createObjectURL(blob);
    tile.image.src = tile.url;
    tile.shown = blob;
    tile.image.hidden = false;
    tile.waiting.hidden = true;
    tile.button.removeAttribute("aria-label"); // the image's own text names it now
  }
  const fraction = Number($("step").value) / Number($("step").max);
  tile.marker.hidden = !tile.record?.weights.length || following;
  tile.marker.style.insetInlineStart = `${100 * fraction}%`;
}

/** Draw the strips of all finished tiles with common colours. */
function drawStrips() {
  const finished = tiles.filter((tile) => tile.record?.weights.length);
  const traces = finished.map((tile) => tile.record);
  const classes = classesOf(traces);
  for (const { record, strip } of finished) {
    strip.hidden = false;
    strip.setAttribute("aria-label", `Mean weights: ${inWords(record)}`);
    strip.replaceChildren(stripOf(record, classes));
  }
  $("legend").hidden = !finished.length;
  $("legend-list").replaceChildren(...legendOf(traces, classes));
}
