// Renders one question's events, its reply or its error.
import { clock } from "./player.js";

const TITLES = {
  PLANNING: "Plan",
  ENV: "Background",
  SPEAKER: "Voices",
  ASR: "Words",
  DESCRIPTION: "Description",
  REASONING: "Reasoning",
  SUMMARY: "Summary",
  RESPONSE: "Response",
  REFLECT: "Second thought",
  THINK: "Thoughts",
  CAPTION: "Caption",
};
const PERCEPTION = new Set(["ENV", "SPEAKER", "ASR", "DESCRIPTION", "CAPTION"]);
// These hold other sections, and rarely text of their own.
const CONTAINERS = new Set(["THINK", "CAPTION"]);

const ABSENT = { ENV: "No background sound", SPEAKER: "No voices", ASR: "No words" };

/** Makes an element; text is never parsed as HTML. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const percent = (share) => `${(100 * share).toFixed(share > 0.0995 || share === 0 ? 0 : 1)} %`;
const seconds = (ms) => (ms === null ? "-" : ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);

export class AnswerView {
  /** @param {(startS: number, endS: number) => void} play plays a part of the clip */
  constructor(play) {
    this.play = play;
    const names = "answer-card empty asked stage stage-text answer-text scores evidence failure warnings trace facts fact-list elapsed live";
    this.parts = Object.fromEntries(names.split(" ").map((name) => [name, document.getElementById(name)]));
  }

  /** Shows the empty card. */
  clear() {
    this.begin({ question: "", choices: [] });
    this.parts.empty.hidden = false;
    this.parts.stage.hidden = this.parts.asked.hidden = true;
    this.parts["answer-card"].dataset.state = "empty";
  }

  /** Clears the card for a question. */
  begin({ question, choices }) {
    const { parts } = this;
    this.choices = choices;
    this.sections = new Map();
    this.pauses = [];
    this.answer = "";
    for (const name of ["trace", "scores", "evidence", "warnings", "fact-list"]) parts[name].replaceChildren();
    for (const name of ["empty", "scores", "evidence", "failure", "warnings", "trace", "facts", "answer-text"]) parts[name].hidden = true;
    parts["answer-text"].textContent = "";
    parts.asked.textContent = choices.length ? `${question} (${choices.join(" / ")})` : question;
    parts.asked.hidden = false;
    parts.elapsed.textContent = "";
  }

  /** Shows and announces the current step of a running question. */
  stage(text) {
    this.parts["answer-card"].dataset.state = "running";
    this.parts.stage.hidden = false;
    this.#say(this.parts["stage-text"], text);
    this.parts.live.textContent = text;
  }

  /** Shows one event of the stream. */
  show({ name, data }) {
    switch (name) {
      case "section.start":
        if (!CONTAINERS.has(data.section)) {
          this.#section(data.section);
          this.stage(`Writing: ${TITLES[data.section] ?? data.section}`);
        }
        break;
      case "section.delta":
        if (!CONTAINERS.has(data.section) || data.text.trim()) this.#section(data.section).text.append(data.text);
        break;
      case "section.end":
        this.sections.get(data.section)?.item.classList.add("ended");
        break;
      case "pause":
        this.#pause(data);
        break;
      case "window.done":
        this.stage(`Windows: ${data.done} of ${data.of}`);
        break;
      case "answer.delta":
        this.answer += data.text;
        this.#say(this.parts["answer-text"], this.answer);
        break;
      case "done":
        this.#finish(data);
        break;
    }
  }

  fail(error) {
    const { parts } = this;
    this.#end("failed");
    parts.failure.hidden = false;
    this.#put("failure-code", error.code);
    this.#put("failure-message", error.message);
    this.#put("failure-hint", error.hint ?? "");
    this.#put("failure-request", error.requestId ? `Request ${error.requestId}` : "");
    document.getElementById("failure-retry").hidden = !error.retryable;
    document.getElementById("failure-retry").textContent = error.retryAfterS
      ? `Try again (the service asks for ${error.retryAfterS} s)`
      : "Try again";
    document.getElementById("failure-key").hidden = error.code !== "invalid_api_key";
  }

  cancel() {
    this.#end("cancelled");
    this.parts.elapsed.textContent = "cancelled";
    this.parts.live.textContent = "Cancelled.";
  }

  #end(state) {
    this.parts["answer-card"].dataset.state = state;
    this.parts.stage.hidden = true;
    for (const { item } of this.sections.values()) item.classList.add("ended");
  }

  #finish(reply) {
    const { parts } = this;
    this.#end("done");
    this.#say(parts["answer-text"], reply.answer.text || "No answer");
    this.#showScores(reply.answer);
    this.#showEvidence(reply.answer);
    this.#showPerception(reply.perception);
    reply.pause.at.forEach(({ confidence }, i) => {
      if (confidence !== null && this.pauses[i]) this.pauses[i].append(`, confidence ${percent(confidence)}`);
    });
    for (const { code, message } of reply.warnings) {
      parts.warnings.append(make("li", {}, make("code", {}, code), ` ${message}`));
    }
    parts.warnings.hidden = !reply.warnings.length;
    this.#showFacts(reply);
    parts.elapsed.textContent = seconds(reply.timings_ms.total);
    parts.live.textContent = `Answer: ${reply.answer.text || "none"}`;
  }

  #section(section) {
    const found = this.sections.get(section);
    if (found) return found;
    const text = make("p", { className: "section-text" });
    const kind = PERCEPTION.has(section) ? "perception" : "thought";
    const item = make("li", { className: kind }, make("h3", {}, TITLES[section] ?? section), text);
    item.dataset.section = section;
    this.parts.trace.append(item);
    this.parts.trace.hidden = false;
    this.sections.set(section, { item, text });
    return this.sections.get(section);
  }

  #pause({ section, latent_tokens: tokens }) {
    const mark = make("span", { className: "pause" }, `paused for ${tokens} tokens`);
    this.pauses.push(mark);
    const inside = section && !CONTAINERS.has(section) ? this.#section(section).text : null;
    if (inside) inside.append(" ", mark, " ");
    else {
      this.parts.trace.append(make("li", { className: "between" }, mark));
      this.parts.trace.hidden = false;
    }
  }

  #showScores(answer) {
    if (!answer.scores) return;
    answer.scores.forEach((score, i) => {
      const fill = make("span", { className: "fill" });
      fill.style.width = `${100 * score}%`;
      const line = make("li", {}, make("span", { className: "choice" }, this.choices[i]));
      line.append(make("span", { className: "score" }, percent(score)));
      line.append(make("span", { className: "track", ariaHidden: "true" }, fill));
      if (i === answer.choice_index) {
        line.classList.add("chosen");
        line.prepend(make("span", { className: "visually-hidden" }, "Chosen: "));
      }
      this.parts.scores.append(line);
    });
    this.parts.scores.hidden = false;
  }

  /** Lists the windows of a recording that the answer rests on; a button plays its window. */
  #showEvidence({ evidence }) {
    for (const { start_s: startS, end_s: endS, quote } of evidence) {
      const span = make("strong", {}, `${clock(startS)} to ${clock(endS)}`);
      const button = make("button", { type: "button" }, span, make("span", {}, quote ?? "no words"));
      button.addEventListener("click", () => this.play(startS, endS));
      this.parts.evidence.append(make("li", {}, button));
    }
    this.parts.evidence.hidden = !evidence.length;
  }

  /** Replaces the model's notation by labels and quotes, once they are parsed. */
  #showPerception(perception) {
    if (!perception) return;
    const environment = this.sections.get("ENV");
    if (environment && perception.environment.length) {
      const tags = perception.environment.map((label) => make("span", { className: "tag" }, label));
      environment.text.replaceChildren(...tags, ...environment.text.querySelectorAll(".pause"));
    }
    const voices = this.sections.get("SPEAKER");
    if (voices && perception.speakers.length) {
      const pauses = voices.text.querySelectorAll(".pause");
      voices.text.replaceChildren(...pauses);
      for (const { id, description, quotes } of perception.speakers) {
        const said = quotes.map((quote) => make("q", {}, quote));
        voices.item.append(make("div", { className: "voice" }, make("strong", {}, id), ` ${description}`, ...said));
      }
      voices.text.hidden = !pauses.length;
    }
    for (const [section, text] of Object.entries(ABSENT)) {
      const part = this.sections.get(section);
      if (part && !part.text.hidden && !part.text.textContent.trim()) part.text.textContent = text;
    }
  }

  #showFacts(reply) {
    const { usage, timings_ms: timings, pause, trace } = reply;
    const [audio] = reply.audio;
    const facts = [
      ["Model", reply.model],
      ["Clip", `${audio.duration_s.toFixed(1)} s, ${audio.codec}, ${audio.sample_rate_hz} Hz, ${audio.channels} channel(s)`],
      ["Trace", trace ? `${reply.termination}, ${trace.format} format` : "none; code read the answer from the timeline"],
      ["Tokens", `${usage.prompt_tokens} prompt (${usage.audio_tokens} audio, ${usage.cached_tokens} cached), ${usage.completion_tokens} written`],
      ["Pauses", pause.mode === "off" ? "off" : `${pause.count} of ${pause.budget}, ${pause.latent_tokens} latent tokens`],
      ["First token", seconds(timings.first_token)],
      ["First word of the answer", seconds(timings.first_answer_token)],
      ["Total", seconds(timings.total)],
      ["Reply", reply.id],
    ];
    if (audio.windows > 1) facts.splice(2, 0, ["Windows", audio.windows]);
    if (trace?.missing_sections.length) facts.splice(-5, 0, ["Missing sections", trace.missing_sections.join(", ")]);
    for (const [name, value] of facts) this.parts["fact-list"].append(make("dt", {}, name), make("dd", {}, value));
    this.parts.facts.hidden = false;
  }

  #say(element, text) {
    element.textContent = text;
    element.hidden = !text;
  }

  #put(id, text) {
    this.#say(document.getElementById(id), text);
  }
}
