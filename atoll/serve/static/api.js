/** The server: its models, and jobs with their events. */

const TOKEN = "atoll-token"; // key in this tab's storage
const MAX_EVENT = 2 ** 27; // characters of one event
const RETRIES = 4; // of a busy server, and of a stream without any event

/** An answer that is an error, or no answer. `param` names the setting that is wrong. */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null, code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, param, code, retryAfter });
  }
}

/** Someone pressed Cancel. */
export class Cancelled extends Error {}

export const token = {
  get: () => sessionStorage.getItem(TOKEN) ?? "",
  set: (value) => (value ? sessionStorage.setItem(TOKEN, value) : sessionStorage.removeItem(TOKEN)),
};

/** Fetch a path of the server; throws ApiError for every answer that is no success. */
async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (token.get()) headers.authorization = `Bearer ${token.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw new Cancelled();
    throw new ApiError("The server does not answer. Is it running?", { code: "unreachable" });
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const error = body?.error ?? {};
  const retryAfter = Number(response.headers.get("retry-after")) || null;
  const message = typeof error.message === "string" ? error.message : `The server answered with ${response.status}.`;
  throw new ApiError(message, { status: response.status, param: error.param, code: error.code, retryAfter });
}

/** The models and the limits of the server. */
export async function models() {
  return (await call("/v1/models")).json();
}

/** A finished image as a Blob. */
export async function file(url) {
  return (await call(url)).blob();
}

/**
 * Run a job to its end.
 * @param {Object} body - of POST /v1/jobs.
 * @param {AbortSignal} signal - cancels the job on the server too.
 * @param {function(string, Object)} on - called with each event's name and data.
 * @returns {Promise<Object>} the data of the event "finished".
 */
export async function runJob(body, signal, on) {
  const job = await start(body, signal);
  const path = `/v1/jobs/${encodeURIComponent(job.id)}`;
  const leave = () => call(path, { method: "DELETE", keepalive: true }).catch(() => {});
  // A page that goes away has nobody left to look at the images.
  window.addEventListener("pagehide", leave);
  let over = false;
  try {
    for await (const { name, data } of events(`${path}/events`, signal)) {
      over = name === "finished" || name === "failed";
      if (name === "finished") return data;
      if (name === "failed") throw new ApiError(String(data.message), { code: data.reason });
      on(name, data);
    }
    throw new ApiError("The connection to the server was lost.", { code: "cut" });
  } catch (error) {
    if (!over) await leave();
    if (signal.aborted || error.code === "cancelled") throw new Cancelled();
    throw error;
  } finally {
    window.removeEventListener("pagehide", leave);
  }
}

/** Start a job; a busy server is tried again when it says so. */
async function start(body, signal) {
  const options = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  for (let attempt = 0; ; attempt += 1) {
    if (signal.aborted) throw new Cancelled();
    try {
      // Not abortable: a job whose answer is lost could not be cancelled.
      return await (await call("/v1/jobs", options)).json();
    } catch (error) {
      if (error.status === 404 && error.code !== "model_not_found") {
        throw new ApiError("This server has no jobs, which the studio needs. Its API for images works.", error);
      }
      if (attempt >= RETRIES || !error.retryAfter) throw error;
      await pause(error.retryAfter * 1000, signal);
    }
  }
}

/** Wait, or throw Cancelled as soon as the signal says so. */
function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => reject(new Cancelled());
    if (signal.aborted) stop();
    signal.addEventListener("abort", stop, { once: true });
    setTimeout(() => {
      signal.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
  });
}

/** The events of a job; a stream that was cut is opened again after its last event. */
async function* events(path, signal) {
  let last = "";
  for (let silent = 0; silent < RETRIES; silent += 1) {
    if (silent) await pause(500 * silent, signal);
    let response;
    try {
      const headers = last ? { "last-event-id": last } : {};
      response = await call(path, { headers, signal });
      if (response.status === 204) return;
      for await (const event of parse(response.body)) {
        silent = 0;
        last = event.id || last;
        yield event;
        if (event.name === "finished" || event.name === "failed") return;
      }
    } catch (error) {
      // Only a lost connection is worth another try: an answer of the server stays the same.
      if (signal.aborted) throw new Cancelled();
      if (error instanceof ApiError && error.status && !error.retryAfter) throw error;
      if (!(error instanceof ApiError) && !(error instanceof TypeError)) throw error;
    }
  }
}

/** Parse server-sent events; EventSource itself cannot send a token. */
export async function* parse(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = { id: "", name: "message", lines: [] };
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return; // an event without its empty line is incomplete
      rest += value;
      if (rest.length > MAX_EVENT) throw new ApiError("The server sent an event that is too large.", { status: 502 });
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const line of lines.map((text) => text.replace(/\r$/, ""))) {
        if (line) read(line, event);
        else {
          if (event.lines.length) yield { id: event.id, name: event.name, data: JSON.parse(event.lines.join("\n")) };
          event = { id: event.id, name: "message", lines: [] };
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function read(line, event) {
  const [, field, value] = /^([^:]*):? ?(.*)$/s.exec(line);
  if (field === "event") event.name = value;
  else if (field === "data") event.lines.push(value);
  else if (field === "id") event.id = value;
}
