// Writes the question on the page as a command for a shell and as a Python program.

const quoteShell = (text) => (/^[\w./:=@-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);
// A JSON string is a Python string too.
const quotePython = (text) => JSON.stringify(text);
// curl reads commas and semicolons in a file's name unless it is in double quotes.
const quoteFile = (name) => (/[",;\\]/.test(name) ? `"${name.replaceAll(/["\\]/g, "\\$&")}"` : name);

/**
 * @param {{url: string, clipName: string, fields: Array<[string, string]>, hasKey: boolean}} request
 */
export function curl({ url, clipName, fields, hasKey }) {
  // --form-string sends a text as it is; with -F a leading @ or < would name a file.
  const lines = fields.map(([name, value]) => `--form-string ${quoteShell(`${name}=${value}`)}`);
  if (hasKey) lines.push(`-H "Authorization: Bearer $HYPER_API_KEY"`);
  return [`curl -sS -F ${quoteShell(`file=@${quoteFile(clipName)}`)}`, ...lines, `${url}/v1/audio/qa`].join(" \\\n  ");
}

/** The same with the `hyper` package. */
export function python({ url, clipName, fields, hasKey }) {
  const choices = fields.filter(([name]) => name === "choices").map(([, value]) => quotePython(value));
  const others = fields.filter(([name]) => name !== "choices" && name !== "question");
  const values = others.map(([name, value]) => `${name}=${Number.isNaN(Number(value)) ? quotePython(value) : value}`);
  const question = fields.find(([name]) => name === "question")?.[1] ?? "";
  const parts = [quotePython(clipName), quotePython(question)];
  if (choices.length) parts.push(`choices=[${choices.join(", ")}]`);
  parts.push(...values);
  const key = hasKey ? "  # the key is in HYPER_API_KEY" : "";
  return [
    "import hyper",
    "",
    `with hyper.Client(${quotePython(url)}) as client:${key}`,
    `    reply = client.ask(${parts.length > 2 ? `\n        ${parts.join(",\n        ")},\n    ` : parts.join(", ")})`,
    "    print(reply.answer.text)",
    "",
  ].join("\n");
}
