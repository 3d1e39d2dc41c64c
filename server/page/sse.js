// Reads server-sent events from the body of a fetch response.

/** Yields { name, data } for every event; comments are skipped. `data` is parsed JSON. */
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let name = "message";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { name, data: JSON.parse(data.join("\n")) };
          name = "message";
          data = [];
          continue;
        }
        const [, field, text] = /^([^:]*):? ?(.*)$/.exec(line);
        if (field === "event") name = text;
        if (field === "data") data.push(text);
      }
    }
  } finally {
    // Ends the request too when the caller leaves early.
    reader.cancel().catch(() => {});
  }
}
