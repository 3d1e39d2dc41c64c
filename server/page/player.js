// Shows a clip as a waveform with a play button. wavesurfer.js draws and plays; it has no roles and no keys, so the
// waveform's frame is a slider of its own.
import Regions from "./vendor/wavesurfer-regions.js";
import WaveSurfer from "./vendor/wavesurfer.js";

const STEP_S = 1;

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colors = () => ({ waveColor: color("--wave"), progressColor: color("--accent"), cursorColor: color("--ink") });

/** Writes seconds as minutes, seconds and tenths. */
export function clock(seconds) {
  const tenths = Math.round(10 * seconds);
  return `${Math.floor(tenths / 600)}:${((tenths % 600) / 10).toFixed(1).padStart(4, "0")}`;
}

export class Player {
  /** @param {{frame: HTMLElement, button: HTMLElement, time: HTMLElement, note: HTMLElement}} parts */
  constructor(parts) {
    this.parts = parts;
    this.wave = null;
    this.regions = null;
    parts.button.addEventListener("click", () => this.wave?.playPause());
    parts.frame.addEventListener("keydown", (event) => this.#onKey(event));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.recolor());
  }

  /** Draws a clip. Returns its seconds, or null if the browser cannot decode it. */
  async load(file) {
    this.clear();
    this.regions = Regions.create();
    const wave = WaveSurfer.create({
      container: this.parts.frame,
      height: 88,
      barWidth: 3,
      barGap: 2,
      barRadius: 3,
      cursorWidth: 2,
      normalize: true,
      dragToSeek: true,
      plugins: [this.regions],
      cspNonce: document.documentElement.dataset.styleNonce,
      ...colors(),
    });
    this.wave = wave;
    wave.on("timeupdate", () => this.#showTime());
    wave.on("play", () => this.#showPlaying(true));
    wave.on("pause", () => this.#showPlaying(false));
    wave.on("finish", () => wave.setTime(0));
    try {
      // A file that the media element refuses is reported by the event alone.
      await Promise.race([wave.loadBlob(file), new Promise((_, reject) => wave.on("error", reject))]);
    } catch {
      if (this.wave !== wave) return null;
      this.clear();
      this.parts.note.hidden = false;
      return null;
    }
    if (this.wave !== wave) return null;
    this.parts.button.disabled = false;
    this.#showTime();
    return wave.getDuration();
  }

  /** Plays from a moment; a part of the clip ends at `endS`. */
  play(startS, endS) {
    this.wave?.play(startS, endS);
  }

  /** Marks parts of the clip, as [{start_s, end_s, index}]; those in the set `cited` are marked as evidence. */
  mark(parts, cited = new Set()) {
    this.regions?.clearRegions();
    for (const part of parts) {
      const shade = cited.has(part.index) ? "--shade-cited" : part.index % 2 ? "--shade-a" : "--shade-b";
      this.regions?.addRegion({ start: part.start_s, end: part.end_s, drag: false, resize: false, color: color(shade) });
    }
  }

  recolor() {
    this.wave?.setOptions(colors());
  }

  clear() {
    this.wave?.destroy();
    this.wave = null;
    this.regions = null;
    this.parts.button.disabled = true;
    this.parts.note.hidden = true;
    this.#showPlaying(false);
  }

  #onKey(event) {
    const wave = this.wave;
    if (!wave) return;
    const now = wave.getCurrentTime();
    const end = wave.getDuration();
    const moves = {
      ArrowLeft: now - STEP_S,
      ArrowDown: now - STEP_S,
      ArrowRight: now + STEP_S,
      ArrowUp: now + STEP_S,
      Home: 0,
      End: end,
    };
    if (event.key === " ") wave.playPause();
    else if (event.key in moves) wave.setTime(Math.max(0, Math.min(end, moves[event.key])));
    else return;
    event.preventDefault();
  }

  #showTime() {
    const { frame, time } = this.parts;
    const now = this.wave.getCurrentTime();
    const end = this.wave.getDuration();
    time.textContent = `${clock(now)} / ${clock(end)}`;
    frame.setAttribute("aria-valuemax", end.toFixed(1));
    frame.setAttribute("aria-valuenow", now.toFixed(1));
    frame.setAttribute("aria-valuetext", `${now.toFixed(1)} of ${end.toFixed(1)} seconds`);
  }

  #showPlaying(isPlaying) {
    this.parts.button.dataset.playing = isPlaying;
    this.parts.button.setAttribute("aria-label", isPlaying ? "Pause the clip" : "Play the clip");
  }
}
