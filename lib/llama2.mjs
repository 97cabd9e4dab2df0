// run.c as a module for Node and the browser: make llama2.wasm builds the engine that it loads.
// examples/llama2.mjs uses it from Node; the page of export.py --format=html has it inside.
//
//     const llama = await load(wasm, model, tokenizer);      // three Uint8Arrays
//     for (const { text } of llama.tell("Once upon a time", { seed: 1 })) write(text);
//
// tell() gives the same story as ./run with the same options and seed, byte for byte. An order without
// fields stays in front of a prompt, while ./run leaves it out.

const FIELDS = ["words", "features", "sentence", "summary"];  // of an order
const OUT_OF_MEMORY = "not enough memory: use a smaller model or a smaller number format";

// Load a model.bin and its tokenizer.bin with the engine; all three are Uint8Arrays. positions: room
// for a story, in tokens (0: the whole context). Throws an Error with one sentence if they do not fit
// together or are damaged.
export async function load(wasm, model, tokenizer, { positions = 0 } = {}) {
  let exports;
  const fail = () => { throw new Error(text_at(exports, exports.llama_error())); };
  // the clock is never asked with one thread, and nothing is printed
  const system = new Proxy({}, { get: () => () => 52 });  // ENOSYS
  const { instance } = await WebAssembly.instantiate(
    wasm, { llama2: { fail }, wasi_snapshot_preview1: system });
  exports = instance.exports;
  exports._initialize?.();
  const place = (bytes) => {
    const at = exports.aligned_alloc(64, Math.ceil((bytes.length + 1) / 64) * 64) >>> 0;
    if (!at) throw new Error(OUT_OF_MEMORY);
    new Uint8Array(exports.memory.buffer).set(bytes, at);
    return at;
  };
  const model_at = place(model), tokenizer_at = place(tokenizer);
  const at = exports.llama_load_bytes(model_at, model.length, tokenizer_at, tokenizer.length,
                                      positions, 1);
  if (!at) fail();
  return new Llama(exports, at);
}

// The text that ends at a NUL in the memory of the engine.
function text_at(exports, at) {
  const bytes = new Uint8Array(exports.memory.buffer, at >>> 0);
  return new TextDecoder().decode(bytes.slice(0, bytes.indexOf(0)));
}

export class Llama {
  #c; #at; #scratch;  // the engine's functions, the model, room for tokens and settings
  #ran = [];          // the tokens that were run
  #n_runs = 0;        // how often forward() was called

  constructor(exports, at) {
    this.#c = exports;
    this.#at = at;
    this.vocab_size = exports.llama_vocab_size(at);
    this.positions = exports.llama_n_positions(at);
    this.bos = exports.llama_bos(at);
    this.eos = exports.llama_eos(at);
    this.knows_orders = exports.llama_knows_orders(at) === 1;
    this.#scratch = this.#room(4 * this.positions + 32);
  }

  // The address of n new bytes. Addresses are unsigned, but JavaScript gets them as signed numbers.
  #room(n) {
    const at = this.#c.malloc(n) >>> 0;
    if (!at) throw new Error(OUT_OF_MEMORY);
    return at;
  }

  // The result of a call of the engine; -1 and NULL are errors.
  #check(result, failure = -1) {
    if (result === failure) throw new Error(text_at(this.#c, this.#c.llama_error()));
    return result;
  }

  #view(Type, at, n) { return new Type(this.#c.memory.buffer, at, n); }

  // Encode texts: encode() gets their addresses, each with a NUL at its end, and the room for tokens.
  #tokens_of(texts, encode) {
    const all = texts.map((text) => new TextEncoder().encode(`${text}\0`));
    const n_bytes = all.reduce((n, bytes) => n + bytes.length, 0);
    const room = 2 * n_bytes + 100;  // an order also has names, and spaces after its commas
    const at = this.#room(4 * room + n_bytes);
    let end = at + 4 * room;
    try {
      for (const bytes of all) {
        this.#view(Uint8Array, end, bytes.length).set(bytes);
        bytes.at = end;
        end += bytes.length;
      }
      const n = this.#check(encode(all, at, room));
      return Array.from(this.#view(Int32Array, at, n));
    } finally {
      this.#c.free(at);
    }
  }

  // The tokens of a text, after a BOS: an Array.
  encode(text) {
    return this.#tokens_of([text], ([bytes], tokens, room) =>
      this.#c.llama_encode(this.#at, bytes.at, bytes.length - 1, tokens, room));
  }

  // The tokens of an order, an object with texts words, features, sentence and summary, each of
  // which may be missing, and of how its story begins: {tokens, n_order}, where the first n_order
  // are the order's. Without any field, it is the order of any story.
  encode_order(order, beginning = "") {
    if (!this.knows_orders) throw new Error("the model was trained without orders");
    const n_at = this.#scratch + 16;
    const tokens = this.#with_order(order, beginning, (order_at, begin_at, at, room) =>
      this.#c.llama_encode_order(this.#at, order_at, begin_at, at, room, n_at));
    return { tokens, n_order: this.#view(Int32Array, n_at, 1)[0] };
  }

  #with_order(order, beginning, call) {
    for (const name of Object.keys(order))
      if (!FIELDS.includes(name))
        throw new Error(`an order has no ${name}: expected ${FIELDS.join(", ")}`);
    const texts = FIELDS.map((name) => order[name] ?? "");
    return this.#tokens_of([...texts, beginning], (all, at, room) => {
      this.#view(Uint32Array, this.#scratch, 4).set(all.slice(0, 4).map((bytes) => bytes.at));
      return call(this.#scratch, all[4].at, at, room);
    });
  }

  // Favor what an order asks for, or nothing if it is null, as ./run does.
  #bias(order, bias) {
    if (order) this.#with_order(order, "", (at) => this.#c.llama_bias(this.#at, at, bias));
    else this.#check(this.#c.llama_bias(this.#at, 0, 0));
  }

  // The text of tokens (an Array), which may start with a BOS.
  decode(tokens) {
    const tokens_at = this.#room(4 * tokens.length + 4);
    let at = 0;
    try {
      this.#view(Int32Array, tokens_at, tokens.length).set(tokens);
      const n = this.#check(this.#c.llama_decode(this.#at, tokens_at, tokens.length, 0, 0));
      at = this.#room(n + 1);
      this.#check(this.#c.llama_decode(this.#at, tokens_at, tokens.length, at, n));
      return new TextDecoder("utf-8", { ignoreBOM: true }).decode(this.#view(Uint8Array, at, n));
    } finally {
      this.#c.free(tokens_at);
      this.#c.free(at);
    }
  }

  // Run tokens (an Array that starts with a BOS) from position `start` on; those before it must
  // have been run. Returns the logits (vocab_size) for the next token, valid until the next call.
  forward(tokens, start = 0) {
    const n = tokens.length - start;
    if (!(n > 0)) throw new Error("there are no tokens to run");
    if (!(tokens.length <= this.positions))
      throw new Error(`the text has ${tokens.length} tokens, and the model's context ` +
                      `${this.positions}: shorten it`);
    this.#view(Int32Array, this.#scratch, n).set(tokens.slice(start));
    const logits = this.#check(this.#c.llama_forward(this.#at, this.#scratch, n, start) >>> 0, 0);
    this.#ran = tokens.slice();
    this.#n_runs += 1;
    return this.#view(Float32Array, logits, this.vocab_size);
  }

  // The probabilities (vocab_size) of the token after these, at temperature 1. Runs only what has
  // changed since the last call.
  probabilities(tokens) {
    let start = 0;
    while (start < tokens.length - 1 && tokens[start] === this.#ran[start]) start++;
    const logits = Float64Array.from(this.forward(tokens, start));
    const max = logits.reduce((a, b) => Math.max(a, b));
    const sum = logits.reduce((total, x, i) => total + (logits[i] = Math.exp(x - max)), 0);
    return logits.map((x) => x / sum);
  }

  // Tell a story: yields {token, text} for the prompt and each token after it; the texts joined are
  // the story. A text is "" inside a character; isPrompt says whose it is. Options as those of ./run:
  // seed is a BigInt or a whole number, order is as in encode_order(). A model that knows orders would
  // make one up if the prompt were empty; it gets one without fields.
  *tell(prompt = "", { temperature = 1, topP = 0.9, topK = 0, minP = 0, repeatPenalty = 1,
                       seed = 0, length = 256, order = null, orderBias = 3 } = {}) {
    if (this.knows_orders && !prompt) order ??= {};
    const { tokens, n_order } = order ? this.encode_order(order, prompt)
      : { tokens: this.encode(prompt), n_order: 0 };
    const end = Math.min(length || this.positions, this.positions);  // tokens that are run
    if (tokens.length > end)
      throw new Error(`the ${order ? "order and the beginning have" : "beginning has"} ` +
                      `${tokens.length} tokens, but the story has room for ${end}: shorten it` +
                      (end < this.positions ? " or allow a longer story" : ""));
    this.forward(tokens);
    let n_runs = this.#n_runs, shown = [];
    this.#bias(order, orderBias);
    this.#check(this.#c.llama_seed(this.#at, BigInt.asUintN(64, BigInt(seed))));
    const settings = this.#scratch;
    let space = n_order ? /^ / : "";  // separates the order from the story
    if (!n_order) shown = [tokens[0]];
    const text_of = (token) => {  // characters may be made of several tokens
      shown.push(token);
      const text = this.decode(shown).replace(space, "");
      if (text.endsWith("\uFFFD")) return "";
      shown = [];
      space = "";
      return text;
    };
    for (const token of tokens.slice(n_order || 1))
      yield { token, text: text_of(token), isPrompt: true };
    for (;;) {
      if (n_runs !== this.#n_runs) throw new Error("the model was used while it told a story");
      this.#view(Float32Array, settings, 4).set([temperature, topP, minP, repeatPenalty]);
      this.#view(Int32Array, settings + 16, 1)[0] = topK;
      const token = this.#check(this.#c.llama_sample(this.#at, settings));
      if (token === this.bos || token === this.eos) break;
      tokens.push(token);
      yield { token, text: text_of(token), isPrompt: false };
      if (tokens.length > end) break;
      this.forward(tokens, tokens.length - 1);
      n_runs = this.#n_runs;
    }
    if (shown.length)
      yield { token: -1, text: this.decode(shown).replace(space, ""), isPrompt: false };
  }
}
