// For tests/test_page.py: each line of stdin is a job, {model, tokenizer, tokens, stories}; prints a
// line with the logits after each of the tokens (float32, base64) and the texts of the stories.
import { readFileSync } from "node:fs";
import { load } from "../lib/llama2.mjs";

const read = (path) => readFileSync(path);
const wasm = read(new URL("../lib/llama2.wasm", import.meta.url));
for (const line of read(0).toString().trim().split("\n")) {
  const job = JSON.parse(line);
  try {
    const llama = await load(wasm, read(job.model), read(job.tokenizer));
    const logits = job.tokens.map((_, i) =>
      Buffer.from(llama.forward(job.tokens.slice(0, i + 1), i).slice().buffer));
    const stories = job.stories.map(({ prompt, ...options }) =>
      Array.from(llama.tell(prompt, options), ({ text }) => text).join(""));
    console.log(JSON.stringify({ logits: Buffer.concat(logits).toString("base64"), stories }));
  } catch (e) {
    console.log(JSON.stringify({ error: e.message }));
  }
}
