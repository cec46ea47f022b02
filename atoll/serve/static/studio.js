/** The studio: what happens when someone presses a button. */

import { ApiError, Cancelled, file as fetchFile, models, runJob, token } from "./api.js";
import { $, blobOf, complain, el, release, say } from "./dom.js";
import { FormError, allModels, currentModel, drawSeed, fillForm, markField, previewEvery, readForm, restoreForm, sizeOf } from "./form.js";
import { attempt, deleteImage, showGallery, startGallery } from "./gallery.js";
import { PngError, readPngSettings } from "./png.js";
import { checkSettings, describeSettings } from "./settings.js";
import { beginSheet, failTile, finishTile, previewTile, previewsOf, select, selectedRecord, startSheet } from "./sheet.js";
import { addImage } from "./store.js";
import { tableOf } from "./strip.js";
import { byExpert, byModel, byRouting } from "./variants.js";

const AT_ONCE = 4; // jobs; a browser opens six connections, and their event streams keep them

let running = null; // the AbortController of what is being sampled
let downloadUrl = "";

/** Run an action; every failure is shown in words. */
async function guarded(action) {
  complain("");
  markField(null);
  try {
    await action();
  } catch (error) {
    if (error instanceof Cancelled) say("Cancelled.");
    else tell(error);
  }
}

function tell(error) {
  const words = error instanceof ApiError || error instanceof FormError || error instanceof PngError;
  complain(words ? sentence(error.message) : `The page failed: ${error.message}`);
  say("");
  if (error.status === 401) {
    complain(token.get() ? "The server does not accept this token." : "This server needs a token.");
    $("token-form").hidden = false;
    $("token").focus();
  } else if (error.param) markField(error.param);
}

/** A message of the server as a sentence. */
const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

async function connect() {
  say("Loading …");
  fillForm(await models());
  say("");
  $("token-form").hidden = !token.get();
  setRunning(null);
}

/** Enable what can be done now. */
function setRunning(controller) {
  running = controller;
  $("sample").disabled = Boolean(controller);
  $("side").disabled = Boolean(controller);
  $("run").hidden = !controller;
  $("sheet").setAttribute("aria-busy", String(Boolean(controller)));
}

/**
 * Sample jobs into a sheet.
 * @param {string} title
 * @param {Array<{card: Object, body: Object, first: number}>} jobs - `first` is the tile of a job's first image.
 * @param {Array<Object>} entries - of the sheet.
 */
async function sample(title, jobs, entries) {
  const controller = new AbortController();
  const steps = jobs[0].body.steps;
  const focused = document.activeElement;
  setRunning(controller);
  if (focused?.matches(":disabled")) $("cancel").focus({ preventScroll: true });
  beginSheet(title, entries, steps);
  // On a narrow page the images are below the form; on a wide one they may be scrolled away.
  const { top } = $("results").getBoundingClientRect();
  if (top < 0 || top > 0.5 * window.innerHeight) $("results").scrollIntoView();
  const done = new Array(jobs.length).fill(0);
  const errors = [];
  const dropped = new Set(); // experts that returned NaN or infinity
  const advance = (job, step) => {
    done[job] = step;
    $("progress").value = done.reduce((sum, one) => sum + one, 0) / (steps * jobs.length);
  };
  advance(0, 0);
  say("Sampling …");
  const run = async (number) => {
    try {
      const names = await sampleJob(jobs[number], controller.signal, (step) => advance(number, step));
      names.forEach((name) => dropped.add(name));
    } catch (error) {
      const message = error instanceof Cancelled ? "cancelled" : error.message;
      for (let i = 0; i < jobs[number].body.n; i += 1) failTile(jobs[number].first + i, message);
      if (!(error instanceof Cancelled)) errors.push(error);
    }
    advance(number, steps);
  };
  try {
    // A few at once, and the next as soon as one ends.
    const waiting = jobs.keys();
    const worker = async () => {
      for (const number of waiting) if (!controller.signal.aborted) await run(number);
    };
    await Promise.all(Array.from({ length: AT_ONCE }, worker));
  } finally {
    const back = document.activeElement === $("cancel") || document.activeElement === document.body;
    setRunning(null);
    if (back && focused?.isConnected) focused.focus({ preventScroll: true }); // the images stay in view
    await showGallery();
  }
  if (controller.signal.aborted) {
    for (let i = 0; i < entries.length; i += 1) failTile(i, "cancelled");
    throw new Cancelled();
  }
  if (errors.length) throw errors[0];
  const ready = entries.length === 1 ? "The image is ready." : `${entries.length} images are ready.`;
  say(dropped.size ? `${ready} Left out, because they returned NaN: ${[...dropped].join(", ")}.` : ready);
  if (entries.length === 1) select(0);
}

/** Sample one job into its tiles, and store its images; return the names of dropped experts. */
async function sampleJob({ card, body, first }, signal, advance) {
  const finished = await runJob(body, signal, (name, data) => {
    if (name === "progress") advance(data.step);
    if (name === "preview") previewTile(first + data.index, data.step, blobOf(data.b64_json, `image/${data.format}`));
  });
  for (const { index, url, settings } of finished.images) {
    const record = {
      blob: await fetchFile(url),
      settings,
      ...sizeOf(body.size ?? `${card.width}x${card.height}`),
      steps: previewsOf(first + index).filter((one) => one.step < body.steps),
      total: body.steps,
      experts: finished.experts,
      weights: finished.weights[index] ?? [],
      times: finished.times,
    };
    record.id = await attempt(() => addImage(record));
    finishTile(first + index, record);
  }
  return finished.dropped ?? [];
}

async function sampleImages() {
  if ($("sample").disabled) return;
  if (!$("lock").checked) drawSeed();
  const body = readForm();
  const card = currentModel();
  body.preview_every = previewEvery(body.steps, body.n);
  const entries = Array.from({ length: body.n }, (_, i) => ({
    caption: `seed ${body.seed + i}`,
    alt: `Image ${i + 1} of ${body.n}, seed ${body.seed + i}`,
    ...sizeOf(body.size),
  }));
  await sample(body.prompt || "Without a prompt", [{ card, body, first: 0 }], entries);
}

async function sampleSideBySide(kind) {
  const body = { ...readForm(), n: 1 };
  const card = currentModel();
  const variants = {
    routing: () => byRouting(card, body),
    expert: () => byExpert(card, body),
    model: () => byModel(allModels(), card, body),
  }[kind]();
  const jobs = variants.map((variant, first) => ({ ...variant, first }));
  for (const job of jobs) job.body.preview_every = previewEvery(body.steps, 1);
  const entries = variants.map((one) => ({
    caption: one.caption,
    alt: one.caption,
    ...sizeOf(one.body.size ?? `${one.card.width}x${one.card.height}`),
  }));
  const names = { routing: "by each routing", expert: "by each expert alone", model: "by each model" };
  await sample(`${body.prompt || "Without a prompt"}, ${names[kind]}`, jobs, entries);
}

/** Show the settings of the chosen image, and what can be done with it. */
function showDetail(record) {
  $("detail").hidden = !record;
  release(downloadUrl);
  if (!record) return;
  downloadUrl = URL.createObjectURL(record.blob);
  $("download").href = downloadUrl;
  $("download").download = `${nameOf(record.settings)}.png`;
  $("remove").hidden = !record.id;
  const pairs = describeSettings(record.settings);
  $("settings").replaceChildren(...pairs.flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]));
  $("weights").hidden = !record.weights.length;
  $("weights-table").replaceChildren(...(record.weights.length ? tableOf(record) : []));
}

/** A file's name without signs that a file system may refuse. */
function nameOf({ prompt, seed }) {
  const words = String(prompt).toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 60);
  return `${words.replace(/-$/, "") || "atoll"}-seed-${seed}`;
}

/** Show an image of the gallery in the sheet. */
function openRecord(record) {
  if (running) {
    say("Open it when the sampling has ended, or cancel first.");
    return;
  }
  const { settings, width, height, total } = record;
  const entry = { caption: `seed ${settings.seed}, ${settings.routing}`, alt: `Image of the gallery, seed ${settings.seed}`, width, height };
  beginSheet(settings.prompt || "Without a prompt", [entry], total);
  finishTile(0, record);
  select(0);
  $("sheet").scrollIntoView({ block: "nearest" });
  say("The image is open.");
}

/** Restore the settings in a file that someone chose or dropped. */
async function openFile(file) {
  try {
    const settings = checkSettings(await readPngSettings(file));
    restore(settings, `The settings of ${file.name} are restored.`);
  } catch (error) {
    if (error instanceof PngError) throw new PngError(`The file ${file.name} ${error.message}`);
    throw error;
  }
}

function restore(settings, message) {
  const notes = restoreForm(settings);
  say(`${message} ${notes}`.trim());
  $("prompt").focus();
}

function listen() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    guarded(sampleImages);
  });
  $("form").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault(); // in a field of one line it would submit the form as well
    guarded(sampleImages);
  });
  // Whoever corrects a setting has read the error.
  $("form").addEventListener("input", () => {
    complain("");
    markField(null);
  });
  $("cancel").addEventListener("click", () => running?.abort());
  for (const kind of ["routing", "expert", "model"]) {
    $(`by-${kind}`).addEventListener("click", () => guarded(() => sampleSideBySide(kind)));
  }
  $("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    token.set($("token").value.trim());
    $("token").value = "";
    guarded(connect);
  });
  $("token-forget").addEventListener("click", () => {
    token.set("");
    guarded(connect);
  });
  $("reuse").addEventListener("click", () =>
    guarded(async () => restore(checkSettings(selectedRecord().settings), "The settings are restored.")),
  );
  $("remove").addEventListener("click", () =>
    guarded(async () => {
      const record = selectedRecord();
      await deleteImage(record.id);
      record.id = null; // it stays in the sheet, where it can still be downloaded
      showDetail(record);
    }),
  );
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    if (file) guarded(() => openFile(file));
    $("file").value = "";
  });
  listenToDrops();
}

function listenToDrops() {
  const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
  let depth = 0; // of elements that the pointer has entered
  const mark = (change) => {
    depth = change ? Math.max(0, depth + change) : 0;
    document.body.classList.toggle("dropping", depth > 0);
  };
  window.addEventListener("dragenter", (event) => holdsFiles(event) && mark(1));
  window.addEventListener("dragleave", (event) => holdsFiles(event) && mark(-1));
  // Without this the browser would leave the page and show the file.
  window.addEventListener("dragover", (event) => holdsFiles(event) && event.preventDefault());
  window.addEventListener("drop", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    mark(0);
    const [file] = event.dataTransfer.files;
    if (file) guarded(() => openFile(file));
  });
}

listen();
startSheet(showDetail);
startGallery(openRecord);
guarded(connect);
