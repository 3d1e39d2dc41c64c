// Records the microphone and returns the recording as a WAV file: mono, 16 kHz, 16 bits, as the model takes it.

const SAMPLE_RATE_HZ = 16000;
const CONTAINERS = ["audio/webm;codecs=opus", "audio/ogg;codecs=opus", "audio/mp4"];
// The model names background sounds, so the browser must not remove them.
const CONSTRAINTS = { audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false } };

/**
 * Starts to record. Throws a DOMException if the browser or the person refuses.
 *
 * @param {(level: number, seconds: number) => void} onLevel receives the peak of the last moment, 0 to 1, and the time
 * @returns {Promise<{stop: () => Promise<File>, discard: () => void}>}
 */
export async function startRecording(onLevel) {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new DOMException("The microphone needs https or localhost.", "NotSupportedError");
  }
  const stream = await navigator.mediaDevices.getUserMedia(CONSTRAINTS);
  const container = CONTAINERS.find((type) => MediaRecorder.isTypeSupported(type));
  const recorder = new MediaRecorder(stream, container ? { mimeType: container } : {});
  const parts = [];
  recorder.addEventListener("dataavailable", (event) => parts.push(event.data));
  const context = new AudioContext();
  const analyser = context.createAnalyser();
  context.createMediaStreamSource(stream).connect(analyser);
  const samples = new Float32Array(analyser.fftSize);
  const startedMs = performance.now();
  let frame = requestAnimationFrame(function measure() {
    analyser.getFloatTimeDomainData(samples);
    let peak = 0;
    for (const sample of samples) peak = Math.max(peak, Math.abs(sample));
    onLevel(peak, (performance.now() - startedMs) / 1000);
    frame = requestAnimationFrame(measure);
  });
  recorder.start(250);

  const end = () =>
    new Promise((resolve) => {
      cancelAnimationFrame(frame);
      recorder.addEventListener("stop", resolve, { once: true });
      recorder.stop();
      for (const track of stream.getTracks()) track.stop();
    });
  return {
    async stop() {
      await end();
      const blob = new Blob(parts, { type: recorder.mimeType });
      try {
        return toWav(await context.decodeAudioData(await blob.arrayBuffer()));
      } catch {
        // The service decodes the browser's own container too.
        const suffix = /^audio\/(\w+)/.exec(recorder.mimeType)?.[1] ?? "webm";
        return new File([blob], `recording.${suffix}`, { type: recorder.mimeType });
      } finally {
        context.close();
      }
    },
    async discard() {
      await end();
      context.close();
    },
  };
}

async function toWav(decoded) {
  const length = Math.max(1, Math.round(decoded.duration * SAMPLE_RATE_HZ));
  const offline = new OfflineAudioContext(1, length, SAMPLE_RATE_HZ);
  const source = offline.createBufferSource();
  source.buffer = decoded;
  source.connect(offline.destination);
  source.start();
  const samples = (await offline.startRendering()).getChannelData(0);
  const file = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (offset, letters) => [...letters].forEach((each, i) => file.setUint8(offset + i, each.charCodeAt(0)));
  text(0, "RIFF");
  file.setUint32(4, 36 + 2 * samples.length, true);
  text(8, "WAVEfmt ");
  file.setUint32(16, 16, true);
  file.setUint16(20, 1, true); // integer samples
  file.setUint16(22, 1, true); // channels
  file.setUint32(24, SAMPLE_RATE_HZ, true);
  file.setUint32(28, 2 * SAMPLE_RATE_HZ, true); // bytes per second
  file.setUint16(32, 2, true); // bytes per frame
  file.setUint16(34, 16, true); // bits per sample
  text(36, "data");
  file.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, i) => file.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, sample)) * 32767, true));
  return new File([file.buffer], "recording.wav", { type: "audio/wav" });
}
