/** The settings of an image, as a server or a file states them; from a file, anyone may have written them. */

import { PngError } from "./png.js";

const MAX_PROMPT = 65_536; // characters
const MAX_NAME = 300;

const whole = (low) => (value) => Number.isSafeInteger(value) && value >= low;
const word = (value) => typeof value === "string" && value.length > 0 && value.length <= MAX_NAME;
const text = (value) => typeof value === "string" && value.length <= MAX_PROMPT;

// What the form can restore, and what a value must be.
const FIELDS = {
  prompt: [text, "a text of at most 65,536 characters"],
  negative_prompt: [text, "a text of at most 65,536 characters"],
  seed: [whole(0), "a whole number from 0 to 9,007,199,254,740,991"],
  steps: [whole(1), "a whole number from 1"],
  guidance_scale: [(value) => Number.isFinite(value) && Math.abs(value) <= 100, "a number from -100 to 100"],
  guidance_range: [isRange, "two numbers between 0 and 1, the smaller one first"],
  size: [isSize, "width and height in pixels"],
  shift: [(value) => Number.isFinite(value) && value >= 0.01 && value <= 100, "a number from 0.01 to 100"],
  method: [word, "a name"],
  routing: [word, "a name"],
  alignment: [word, "a name"],
  ensemble: [word, "a name"],
  ensemble_sha256: [word, "a hash"],
};

function isRange(value) {
  const inside = (one) => Number.isFinite(one) && one >= 0 && one <= 1;
  return Array.isArray(value) && value.length === 2 && value.every(inside) && value[0] <= value[1];
}

function isSize(value) {
  return Array.isArray(value) && value.length === 2 && value.every((side) => whole(1)(side) && side < 2 ** 20);
}

/**
 * Check settings from a file.
 * @param {Object} content - JSON.
 * @returns {Object} the settings that the form can restore.
 */
export function checkSettings(content) {
  if (content.format !== 1) {
    const format = String(content.format).slice(0, 20);
    throw new PngError(`has settings of format ${format}, but this page reads format 1`);
  }
  // Images from before there was a shift have even times.
  const settings = { shift: 1 };
  for (const [name, [valid, expected]] of Object.entries(FIELDS)) {
    const value = Object.hasOwn(content, name) ? content[name] : null;
    if (value === null || value === undefined) continue;
    if (!valid(value)) throw new PngError(`cannot be used: ${name} is not ${expected}`);
    settings[name] = value;
  }
  if (settings.prompt === undefined) throw new PngError("has settings without a prompt");
  // In a file the routing names the cluster; in the form it has a field of its own.
  const oracle = /^oracle-(\d{1,6})$/.exec(settings.routing ?? "");
  return oracle ? { ...settings, routing: "oracle", cluster: Number(oracle[1]) } : settings;
}

const LABELS = {
  prompt: "Prompt",
  negative_prompt: "Negative prompt",
  seed: "Seed",
  steps: "Steps",
  guidance_scale: "Guidance",
  guidance_range: "Guidance range",
  shift: "Shift",
  method: "Method",
  routing: "Routing",
  alignment: "Alignment",
  weights: "Weights",
  size: "Size",
  ensemble: "Model",
  ensemble_sha256: "Hash of its card",
  missing_experts: "Missing experts",
  dropped_experts: "Dropped experts",
  version: "Version of Atoll",
};
const SEPARATORS = { guidance_range: " to ", size: " × " };

/** Settings as pairs of label and text; what is empty is left out. */
export function describeSettings(settings) {
  return Object.entries(LABELS)
    .map(([name, label]) => {
      const value = settings[name] ?? "";
      return [label, Array.isArray(value) ? value.join(SEPARATORS[name] ?? ", ") : String(value)];
    })
    .filter(([, text]) => text);
}
