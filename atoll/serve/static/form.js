/** The form: filled from the models of the server, read as a job's body, restored from an image's settings. */

import { $, el } from "./dom.js";

const MAX_SEED = Number.MAX_SAFE_INTEGER;
const NUMBERS = ["steps", "guidance_scale", "shift"];
const CHOICES = { routing: "routings", method: "methods", alignment: "alignments" };
const LABELS = {
  seed: "Seed", n: "Images", steps: "Steps", guidance_scale: "Guidance", cluster: "Cluster",
  range_low: "Guidance range, from", range_high: "Guidance range, to", shift: "Shift",
};
const EVENTS_ABOUT = 8; // previews of "about eight"

/** A value of the form that cannot be sent; `param` names it. */
export class FormError extends Error {
  constructor(message, param) {
    super(message);
    this.param = param;
  }
}

let served = { data: [], limits: {} };

/** Fill the form from GET /v1/models. */
export function fillForm(answer) {
  served = answer;
  const chosen = $("model").value;
  $("model").replaceChildren(...served.data.map((card) => el("option", { value: card.id }, card.id)));
  if (served.data.some((card) => card.id === chosen)) $("model").value = chosen;
  $("model-field").hidden = served.data.length < 2;
  $("n").max = served.limits.n ?? "";
  $("steps").max = served.limits.steps ?? "";
  for (const name of Object.keys(CHOICES)) $(name).addEventListener("change", explain);
  $("model").addEventListener("change", fillModel);
  if (!$("seed").value) drawSeed();
  fillModel();
}

/** All models of the server. */
export const allModels = () => served.data;

/** The model that is chosen. */
export const currentModel = () => served.data.find((card) => card.id === $("model").value) ?? served.data[0];

/** Fill in what depends on the model, with its defaults. */
function fillModel() {
  const card = currentModel();
  for (const [name, list] of Object.entries(CHOICES)) {
    const options = card[list].map((choice) => el("option", { value: choice.name }, choice.name));
    if (name === "routing") options.push(...expertsAlone(card));
    $(name).replaceChildren(...options);
    $(name).value = card.defaults[name];
  }
  for (const name of NUMBERS) $(name).value = card.defaults[name];
  $("size").replaceChildren(...card.sizes.map((size) => el("option", { value: size }, size.replace("x", " × "))));
  $("size-field").hidden = card.sizes.length < 2;
  $("cluster").max = card.clusters - 1;
  for (const id of ["guidance_scale", "negative_prompt", "range_low", "range_high"]) $(id).disabled = !card.guidance;
  const alone = card.experts.filter((expert) => expert.routing);
  $("by-routing").disabled = card.routings.length < 2 || card.experts.length < 2;
  $("by-expert").disabled = alone.length < 2;
  $("by-model").disabled = served.data.length < 2;
  explain();
  describeModel(card);
}

function expertsAlone(card) {
  const experts = card.experts.filter((expert) => expert.routing && card.experts.length > 1);
  if (!experts.length) return [];
  const group = el("optgroup", { label: "One expert alone" });
  group.append(...experts.map((expert) => el("option", { value: expert.routing }, expert.name)));
  return [group];
}

/** Show the line of explanation of each choice. */
function explain() {
  const card = currentModel();
  for (const [name, list] of Object.entries(CHOICES)) {
    const value = $(name).value;
    const alone = card.experts.some((expert) => expert.routing === value);
    const choice = card[list].find((one) => one.name === value);
    const other = alone ? "This expert has all the weight at all times." : "As in the image that you opened.";
    $(`${name}-hint`).textContent = choice?.description ?? other;
  }
  $("cluster-field").hidden = $("routing").value !== "oracle";
}

function describeModel(card) {
  const facts = [
    ["Sizes", `${card.sizes.map((size) => size.replace("x", " × ")).join(", ")} pixels`],
    ["Clusters", String(card.clusters)],
    ["Licence", card.licence ?? "not stated"],
    ["Hash of its card", card.sha256],
    ["Hash of the router", card.router ?? "no router"],
  ];
  const pairs = facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]);
  const experts = card.experts.map((expert) =>
    el("li", {}, `${expert.name}: ${expert.prediction}, ${expert.schedule}, cluster ${expert.clusters.join(", ")}`),
  );
  $("about-text").replaceChildren(el("dl", {}, ...pairs), el("h3", {}, "Experts"), el("ul", {}, ...experts));
}

/** Draw a new seed. */
export function drawSeed() {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
}

/** The body of a job; throws FormError. */
export function readForm() {
  const card = currentModel();
  const { width, height } = sizeOf($("size").value);
  const body = {
    model: card.id,
    prompt: $("prompt").value,
    n: number("n", 1, served.limits.n, true),
    seed: number("seed", 0, MAX_SEED, true),
    size: $("size").value,
    steps: number("steps", 1, served.limits.steps, true),
    shift: number("shift", 0.01, 100, false),
    method: $("method").value,
    routing: $("routing").value,
    alignment: $("alignment").value,
    preview_format: width * height > 2 ** 16 ? "jpeg" : "png",
  };
  if (card.guidance) {
    body.guidance_scale = number("guidance_scale", -100, 100, false);
    body.guidance_range = [number("range_low", 0, 1, false), number("range_high", 0, 1, false)];
    if ($("negative_prompt").value) body.negative_prompt = $("negative_prompt").value;
  }
  if (!$("cluster-field").hidden) body.cluster = number("cluster", 0, card.clusters - 1, true);
  return body;
}

/** The sides of a size such as 1024x768. */
export function sizeOf(text) {
  const [width, height] = text.split("x").map(Number);
  return { width, height };
}

/** The steps between previews for a number of images, within the server's limit. */
export function previewEvery(steps, images) {
  const kind = $("previews").value;
  if (kind === "none") return 0;
  const limit = served.limits.previews ?? Infinity;
  const wanted = kind === "every" ? 1 : Math.max(1, Math.round(steps / EVENTS_ABOUT));
  const per = Math.floor(limit / images);
  return per < 1 ? 0 : Math.max(wanted, Math.ceil(steps / per));
}

function number(id, low, high = Infinity, whole) {
  const value = $(id).value.trim() === "" ? NaN : Number($(id).value);
  if (!Number.isFinite(value) || value < low || value > high || (whole && !Number.isInteger(value))) {
    const kind = whole ? "a whole number" : "a number";
    const range = Number.isFinite(high) ? `from ${low} to ${high.toLocaleString("en")}` : `from ${low}`;
    throw new FormError(`${LABELS[id]}: expected ${kind} ${range}.`, id);
  }
  return value;
}

/** Mark the setting that is wrong, and move the focus there; null clears all marks. */
export function markField(param) {
  for (const field of document.querySelectorAll("#form [aria-invalid]")) field.removeAttribute("aria-invalid");
  const id = { guidance_range: "range_low", seeds: "seed", preview_every: "previews" }[param] ?? param;
  const field = id && document.querySelector(`#form #${CSS.escape(id)}`);
  if (!field) return;
  if ($("more").contains(field)) $("more").open = true;
  field.setAttribute("aria-invalid", "true");
  field.focus();
}

/**
 * Restore an image's settings, and lock its seed.
 * @param {Object} settings - from `checkSettings`.
 * @returns {string} what differs now, in words; "" if nothing does.
 */
export function restoreForm(settings) {
  const { ensemble, ensemble_sha256: hash } = settings;
  const named = served.data.filter((card) => card.id === ensemble);
  const card = [...named, ...served.data].find((one) => one.sha256 === hash) ?? named[0];
  if (card) $("model").value = card.id;
  fillModel();
  for (const name of Object.keys(CHOICES)) if (settings[name]) choose($(name), settings[name]);
  $("prompt").value = settings.prompt;
  $("negative_prompt").value = settings.negative_prompt ?? "";
  for (const name of [...NUMBERS, "seed", "cluster"]) if (settings[name] !== undefined) $(name).value = settings[name];
  if (settings.size) choose($("size"), settings.size.join("x"));
  [$("range_low").value, $("range_high").value] = settings.guidance_range ?? [0, 1];
  if (settings.seed !== undefined) $("lock").checked = true;
  $("n").value = 1;
  explain();
  if (!hash || currentModel().sha256 === hash) return "";
  return `They are of another model (${ensemble ?? "without a name"}), so the image will differ.`;
}

/** Choose a value of a list; one that is not in it is added. */
function choose(select, value) {
  if (![...select.options].some((option) => option.value === value)) select.append(el("option", { value }, value));
  select.value = value;
}
