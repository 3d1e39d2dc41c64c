// The page's state and events: one clip, one question at a time, and the questions asked about the clip.
import { AskError, apiKey, ask, baseUrl, getJson, readiness, setApiKey } from "./api.js";
import { Player, clock } from "./player.js";
import { startRecording } from "./recorder.js";
import { curl, python } from "./snippets.js";
import { AnswerView, make } from "./view.js";

const $ = (id) => document.getElementById(id);
const MIN_CHOICES = 2;
const THEMES = ["system", "light", "dark"];
const READY_EVERY_MS = 15_000;

const view = new AnswerView((startS, endS) => player.play(startS, endS));
const player = new Player({ frame: $("wave"), button: $("play"), time: $("play-time"), note: $("no-preview") });

/** The limits of /v1/info, or what most services have until it is read. */
let limits = { window_s: 30, max_choices: 26, max_audio_bytes: Infinity };
/** { file, sha256, isRecorded } or null. */
let clip = null;
/** Questions by clip: [{ fields, question, choices, events, error }]. */
const asked = new Map();
let shown = null;
let running = null;
let recording = null;

// --- the service -----------------------------------------------------------------------------------------------------

async function readInfo() {
  try {
    const info = await getJson("v1/info");
    limits = info.limits;
    $("formats").textContent = `${info.formats.slice(0, 6).join(", ")} and more, up to ${limits.window_s} s`;
    $("question").maxLength = limits.max_question_chars;
    const pauses = document.querySelector("select[name=pause]");
    pauses.length = 2;
    for (let n = 1; n <= info.pause.max_pauses; n += 1) pauses.append(make("option", { value: n }, `at most ${n}`));
    showService("checking", info.checkpoint.name);
    await readReadiness(info.checkpoint.name);
  } catch (error) {
    showService("down", error.code === "invalid_api_key" ? "needs an API key" : error.message);
  }
}

async function readReadiness(name) {
  try {
    const { ready, reasons } = await readiness();
    showService(ready ? "ready" : "waiting", ready ? name : `${name}: ${reasons.join(", ").replaceAll("_", " ")}`);
  } catch {
    showService("down", "no connection");
  }
  clearTimeout(readReadiness.timer);
  readReadiness.timer = setTimeout(() => readReadiness(name), READY_EVERY_MS);
}

function showService(state, text) {
  if ($("service").dataset.state === state && $("service-text").textContent === text) return;
  $("service").dataset.state = state;
  $("service-text").textContent = text;
}

// --- the clip --------------------------------------------------------------------------------------------------------

const longAudio = () => document.querySelector("select[name=long_audio]");

async function useClip(file, isRecorded = false) {
  notice("");
  leaveAnswer();
  clip = { file, sha256: await digest(file), isRecorded };
  $("drop").hidden = $("recording").hidden = true;
  $("player").hidden = $("clip-remove").hidden = false;
  $("clip-name").textContent = file.name;
  $("clip-size").textContent = size(file.size);
  $("clip-save").hidden = !isRecorded;
  if (isRecorded) {
    URL.revokeObjectURL($("clip-save").href);
    Object.assign($("clip-save"), { href: URL.createObjectURL(file), download: file.name });
  }
  $("windows").hidden = true;
  longAudio().value = "error";
  showHistory();
  showCode();
  $("live").textContent = `Clip ${file.name} is loaded.`;
  if (file.size > limits.max_audio_bytes) notice(`The clip has ${size(file.size)}; the service takes ${size(limits.max_audio_bytes)}.`);
  const durationS = await player.load(file);
  if (durationS !== null && clip?.file === file) {
    $("clip-size").textContent = `${durationS.toFixed(1)} s, ${size(file.size)}`;
    const isLong = durationS > limits.window_s;
    longAudio().value = isLong ? "chunk" : "error";
    if (isLong) notice(`The clip has ${durationS.toFixed(1)} s. The service asks about its windows of up to ${limits.window_s} s.`);
    showCode();
  }
}

function removeClip() {
  leaveAnswer();
  clip = null;
  player.clear();
  notice("");
  $("player").hidden = $("clip-remove").hidden = true;
  $("drop").hidden = false;
  $("file").value = "";
  showHistory();
  showCode();
  $("choose").focus();
}

/** Ends what belongs to the clip before: its running question and the answer on the page. */
function leaveAnswer() {
  running?.abort();
  shown = null;
  view.clear();
}

async function digest(file) {
  // Browsers offer it on https and localhost alone.
  if (!crypto.subtle) return null;
  const bytes = new Uint8Array(await crypto.subtle.digest("SHA-256", await file.arrayBuffer()));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function notice(text) {
  $("clip-notice").textContent = text;
  $("clip-notice").hidden = !text;
}

function size(bytes) {
  return bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => $("file").files.length && useClip($("file").files[0]));
$("clip-remove").addEventListener("click", removeClip);
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    if (name !== "dragleave" && ![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    $("clip-card").classList.toggle("over", name === "dragenter" || name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length && !recording) useClip(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length && !recording) useClip(event.clipboardData.files[0]);
});

// --- recording -------------------------------------------------------------------------------------------------------

$("record").addEventListener("click", async () => {
  notice("");
  const levels = [];
  try {
    recording = await startRecording((level, seconds) => {
      levels.push(level);
      drawLevels(levels);
      $("recording-time").textContent = clock(seconds);
      if (seconds >= limits.window_s) stopRecording();
    });
  } catch (error) {
    const refused = error.name === "NotAllowedError" ? "The browser did not allow the microphone." : error.message;
    notice(`Recording is not possible. ${refused}`);
    return;
  }
  $("drop").hidden = true;
  $("recording").hidden = false;
  $("recording-limit").textContent = `stops at ${limits.window_s} s`;
  $("live").textContent = "Recording.";
  $("record-stop").focus();
});

async function stopRecording() {
  const current = recording;
  recording = null;
  if (!current) return;
  await useClip(await current.stop(), true);
  $("question").focus();
}

$("record-stop").addEventListener("click", stopRecording);
$("record-discard").addEventListener("click", async () => {
  const current = recording;
  recording = null;
  $("recording").hidden = true;
  $("drop").hidden = false;
  $("record").focus();
  await current?.discard();
});

function drawLevels(levels) {
  const canvas = $("level");
  const context = canvas.getContext("2d");
  const step = 6;
  const most = Math.floor(canvas.width / step);
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
  levels.slice(-most).forEach((level, i) => {
    const height = Math.max(3, Math.min(1, level * 1.6) * canvas.height);
    context.fillRect(i * step, (canvas.height - height) / 2, step - 2, height);
  });
}

// --- the question ----------------------------------------------------------------------------------------------------

const hasChoices = () => document.querySelector("input[name=kind]:checked").value === "choices";
const choiceInputs = () => [...$("choice-list").querySelectorAll("input")];
const letter = (index) => String.fromCharCode(65 + index);

function addChoice() {
  const input = make("input", { type: "text", maxLength: limits.max_choice_chars ?? 500, autocomplete: "off" });
  const remove = make("button", { type: "button", className: "quiet icon" }, "×");
  const item = make("li", {}, make("span", { className: "letter", ariaHidden: "true" }), input, remove);
  remove.addEventListener("click", () => {
    item.remove();
    numberChoices();
    choiceInputs().at(-1)?.focus();
    showCode();
  });
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const all = choiceInputs();
    const next = all[all.indexOf(input) + 1] ?? (all.length < limits.max_choices ? addChoice() : null);
    next?.focus();
  });
  $("choice-list").append(item);
  numberChoices();
  return input;
}

function numberChoices() {
  const items = [...$("choice-list").children];
  items.forEach((item, i) => {
    item.querySelector(".letter").textContent = letter(i);
    item.querySelector("input").setAttribute("aria-label", `Choice ${letter(i)}`);
    item.querySelector("button").setAttribute("aria-label", `Remove choice ${letter(i)}`);
    item.querySelector("button").disabled = items.length <= MIN_CHOICES;
  });
  $("choice-add").disabled = items.length >= limits.max_choices;
}

/** Returns the form fields of the request, without the clip. */
function readFields() {
  const fields = [["question", $("question").value.trim()]];
  if (hasChoices()) for (const input of choiceInputs()) if (input.value.trim()) fields.push(["choices", input.value.trim()]);
  for (const element of document.querySelectorAll(".options [name]")) {
    const isDefault = element.tagName === "SELECT" ? element.selectedIndex === 0 : element.value === "";
    if (!isDefault) fields.push([element.name, element.value]);
  }
  return fields;
}

for (const chip of $("suggestions").children) {
  chip.addEventListener("click", () => {
    $("question").value = chip.textContent;
    $("question").focus();
    showCode();
  });
}
for (const radio of document.querySelectorAll("input[name=kind]")) {
  radio.addEventListener("change", () => {
    while (hasChoices() && choiceInputs().length < MIN_CHOICES) addChoice();
    $("choices").hidden = !hasChoices();
  });
}
$("choice-add").addEventListener("click", () => addChoice().focus());
$("form").addEventListener("input", showCode);
$("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return;
  if (!clip) {
    notice("Choose or record a clip first.");
    $("choose").focus();
    return;
  }
  start();
});
$("cancel").addEventListener("click", () => running?.abort());
$("failure-retry").addEventListener("click", () => $("form").requestSubmit());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("key-dialog").open) running?.abort();
});

/** Shows a button in the place of another, with the focus if it had it. */
function swap(before, after) {
  const hasFocus = document.activeElement === before;
  before.hidden = true;
  after.hidden = false;
  if (hasFocus) after.focus({ preventScroll: true });
}

async function start() {
  const fields = readFields();
  const choices = fields.filter(([name]) => name === "choices").map(([, value]) => value);
  const entry = { fields, question: fields[0][1], choices, events: [], error: null };
  const key = clip.sha256 ?? clip.file;
  const controller = new AbortController();
  running = controller;
  const startedMs = performance.now();
  shown = entry;
  view.begin(entry);
  view.stage("Sending the clip");
  // On a phone the answer stands below the question.
  if ($("answer-card").getBoundingClientRect().top > innerHeight - 120) $("answer-card").scrollIntoView();
  swap($("ask"), $("cancel"));
  const timer = setInterval(() => {
    if (shown === entry) $("elapsed").textContent = `${((performance.now() - startedMs) / 1000).toFixed(1)} s`;
  }, 100);
  const isShown = () => shown === entry;
  let isCancelled = false;
  try {
    for await (const event of ask(clip.file, fields, clip.sha256, controller.signal)) {
      entry.events.push(event);
      if (event.name === "done") clearInterval(timer);
      if (isShown()) view.show(event);
      if (event.name === "done" && isShown()) showWindows(event.data);
    }
  } catch (error) {
    isCancelled = error.name === "AbortError";
    if (isCancelled) {
      if (isShown()) view.cancel();
    } else {
      if (!(error instanceof AskError)) console.error(error);
      entry.error = error instanceof AskError ? error : new AskError({ code: "page_error", message: error.message });
      clearInterval(timer);
      if (isShown()) view.fail(entry.error);
    }
  } finally {
    clearInterval(timer);
    running = null;
    swap($("cancel"), $("ask"));
  }
  if (!isCancelled) {
    asked.set(key, [entry, ...(asked.get(key) ?? [])]);
    showHistory();
  }
}

// --- answers ---------------------------------------------------------------------------------------------------------

function replay(entry) {
  shown = entry;
  view.begin(entry);
  for (const event of entry.events) view.show(event);
  if (entry.error) view.fail(entry.error);
  showWindows(entry.events.at(-1)?.data);
  showHistory();
}

function showHistory() {
  const entries = (clip && asked.get(clip.sha256 ?? clip.file)) ?? [];
  $("history-card").hidden = !entries.length;
  $("history").replaceChildren(
    ...entries.map((entry) => {
      const result = entry.error ? entry.error.code : entry.events.at(-1).data.answer.text || "no answer";
      const button = make("button", { type: "button" }, make("span", {}, entry.question), make("strong", {}, result));
      button.classList.toggle("failed", entry.error !== null);
      if (entry === shown) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => replay(entry));
      return make("li", {}, button);
    }),
  );
}

/** Lists the windows of a recording that the reply describes; a button plays its window, and evidence is marked. */
function showWindows(reply) {
  const timeline = reply?.timeline ?? [];
  const cited = new Set((reply?.answer?.evidence ?? []).map(({ window }) => window));
  $("windows").hidden = !timeline.length;
  player.mark(timeline, cited);
  $("windows").replaceChildren(
    ...timeline.map((part) => {
      const span = `${clock(part.start_s)} to ${clock(part.end_s)}`;
      const heard = [...(part.environment ?? []), part.transcript].filter(Boolean).join(" · ") || part.error || part.status;
      const button = make("button", { type: "button" }, make("strong", {}, span), make("span", {}, heard));
      if (cited.has(part.index)) {
        button.classList.add("cited");
        button.append(make("span", { className: "visually-hidden" }, "evidence"));
      }
      button.addEventListener("click", () => player.play(part.start_s, part.end_s));
      return make("li", {}, button);
    }),
  );
}

$("copy-reply").addEventListener("click", () => {
  copy(JSON.stringify(shown.events.at(-1).data, null, 2), $("copy-reply"));
});

// --- code ------------------------------------------------------------------------------------------------------------

const language = () => document.querySelector("input[name=language]:checked").value;

function showCode() {
  const write = language() === "curl" ? curl : python;
  $("code").textContent = write({
    url: baseUrl(),
    clipName: clip?.file.name ?? "clip.wav",
    fields: readFields(),
    hasKey: apiKey() !== "",
  });
  $("copy").textContent = language() === "curl" ? "Copy as curl" : "Copy as Python";
}

async function copy(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
    $("live").textContent = "Copied.";
  } catch {
    getSelection().selectAllChildren($("code"));
    button.textContent = "Press Ctrl + C";
  }
  setTimeout(() => (button.textContent = label), 1600);
}

$("copy").addEventListener("click", () => copy($("code").textContent, $("copy")));
for (const radio of document.querySelectorAll("input[name=language]")) radio.addEventListener("change", showCode);

// --- key and theme ---------------------------------------------------------------------------------------------------

function openKey() {
  $("key").value = apiKey();
  $("key-dialog").showModal();
}

$("key-open").addEventListener("click", openKey);
$("failure-key").addEventListener("click", openKey);
$("key-dialog").addEventListener("close", () => {
  if ($("key-dialog").returnValue !== "save") return;
  setApiKey($("key").value);
  showCode();
  readInfo();
});

function showTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").setAttribute("aria-label", `Theme: ${theme === "system" ? "as the system" : theme}`);
  player.recolor();
}

$("theme").addEventListener("click", () => {
  const theme = THEMES[(THEMES.indexOf(localStorage.getItem("hyper.theme") ?? "system") + 1) % THEMES.length];
  localStorage.setItem("hyper.theme", theme);
  showTheme(theme);
});

showTheme(localStorage.getItem("hyper.theme") ?? "system");
showCode();
readInfo();
