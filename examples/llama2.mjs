// A story from Node, by the engine as WebAssembly: make llama2.wasm builds it.
//     node examples/llama2.mjs out/model.bin out/tokenizer.bin "Once upon a time"
import { readFileSync } from "node:fs";
import { load } from "../lib/llama2.mjs";

const [model, tokenizer, prompt = "Once upon a time", seed = "1"] = process.argv.slice(2);
const wasm = new URL("../lib/llama2.wasm", import.meta.url);
const llama = await load(...[wasm, model, tokenizer].map((path) => readFileSync(path)));
for (const { text } of llama.tell(prompt, { seed: BigInt(seed) })) process.stdout.write(text);
console.log();
