// Calls the public API: /v1/info, /readyz and /v1/audio/qa. Addresses are relative, so that a proxy may add a prefix.
import { readEvents } from "./sse.js";

const KEY = "hyper.apiKey";

export const apiKey = () => sessionStorage.getItem(KEY) ?? "";

export function setApiKey(key) {
  if (key.trim()) sessionStorage.setItem(KEY, key.trim());
  else sessionStorage.removeItem(KEY);
}

/** Returns the headers that identify the caller; none without a key. */
export const authorization = () => (apiKey() ? { authorization: `Bearer ${apiKey()}` } : {});

/** The address of the service, without a slash at its end. */
export const baseUrl = () => new URL(".", location.href).href.replace(/\/$/, "");

/** An error of the service, of the connection or of the browser; the fields are those of the API's error object. */
export class AskError extends Error {
  constructor({ code, message, hint = null, request_id = null, retryable = false, retryAfterS = null, status = null }) {
    super(message);
    Object.assign(this, { code, hint, requestId: request_id, retryable, retryAfterS, status });
  }
}

/** Returns the JSON of a GET endpoint. Throws AskError. */
export async function getJson(path) {
  const response = await send(path, { headers: authorization() });
  if (!response.ok) throw await errorOf(response);
  return response.json();
}

/** Returns whether the service accepts questions, and its reasons if not. */
export async function readiness() {
  const response = await send("readyz", {});
  return response.json();
}

/**
 * Asks a question and yields the events of the reply. Throws AskError, also for an `error` event.
 *
 * @param {File} clip
 * @param {Array<[string, string]>} fields form fields in their order; `choices` may repeat
 * @param {string|null} sha256 the clip's digest, a routing hint
 * @param {AbortSignal} signal cancels the request
 */
export async function* ask(clip, fields, sha256, signal) {
  const form = new FormData();
  for (const [name, value] of fields) form.append(name, value);
  form.append("stream", "true");
  form.append("file", clip, clip.name);
  const headers = { ...authorization(), ...(sha256 ? { "x-hyper-clip": sha256 } : {}) };
  const response = await send("v1/audio/qa", { method: "POST", body: form, headers, signal });
  if (!response.ok) throw await errorOf(response);
  let isDone = false;
  try {
    for await (const event of readEvents(response.body)) {
      if (event.name === "error") throw new AskError(event.data.error);
      isDone = event.name === "done";
      yield event;
    }
  } catch (error) {
    if (error instanceof AskError || error.name === "AbortError") throw error;
    throw broken();
  }
  if (!isDone) throw broken();
}

const broken = () =>
  new AskError({
    code: "connection_lost",
    message: "The connection ended before the answer was complete.",
    hint: "Ask again.",
    retryable: true,
  });

async function send(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new AskError({
      code: "unreachable",
      message: `The service at ${baseUrl()} does not answer.`,
      hint: "Check that `hyper serve` is running.",
      retryable: true,
    });
  }
}

async function errorOf(response) {
  const retryAfterS = Number(response.headers.get("retry-after")) || null;
  try {
    return new AskError({ ...(await response.json()).error, retryAfterS, status: response.status });
  } catch {
    return new AskError({
      code: `http_${response.status}`,
      message: `The server replied with status ${response.status} and no error object.`,
      hint: "A proxy between the browser and the service may have replied.",
      retryable: response.status >= 500,
      retryAfterS,
      status: response.status,
    });
  }
}
