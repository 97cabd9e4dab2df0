"use strict";
const $ = (id) => document.getElementById(id);
const percent = (p) => p >= 0.9995 ? "100 %" : p >= 0.0995 ? `${Math.round(100 * p)} %`
  : p >= 0.0001 ? `${(100 * p).toPrecision(2)} %` : "< 0.01 %";
const models = JSON.parse($("models").textContent);
const columns = [];
let story = 0;  // the number of the story that is told

// ---- a column: a model, its worker and the story it tells

class Column {
  constructor(model, i) {
    const root = $("column").content.cloneNode(true).firstElementChild;
    [this.heading, this.text, this.status, this.why] = root.children;
    this.heading.textContent = model.name;
    this.heading.hidden = models.length === 1;
    $("columns").append(root);
    this.pieces = [];  // [token, text, whether it is part of the prompt]
    this.chosen = -1;
    this.status.textContent = "Loading the model …";
    const source = [$("llama2").textContent.replace(/^export /gm, ""), $("worker").textContent];
    const url = URL.createObjectURL(new Blob(source, { type: "text/javascript" }));
    this.worker = new Worker(url);
    this.worker.onmessage = ({ data }) => this.receive(data);
    this.worker.onerror = (e) => this.fail(e.message || "this browser cannot run the engine");
    const load = ["engine", `model-${i}`, `tokenizer-${i}`].map(
      (id) => ({ base64: $(id).textContent, crc: Number($(id).dataset.crc) }));
    this.worker.postMessage({ load });
    $(`model-${i}`).remove();  // the worker has a copy
    this.text.addEventListener("pointerover", (e) => this.choose(this.index_of(e.target)));
    this.text.addEventListener("click", (e) => this.choose(this.index_of(e.target)));
    this.text.addEventListener("keydown", (e) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
      if (!by) return;
      e.preventDefault();
      this.choose(Math.min(Math.max(this.chosen + by, 0), this.pieces.length - 1));
    });
  }

  fail(message) {
    this.status.textContent = `This page cannot tell stories: ${message}`;
    this.status.classList.add("error");
    this.is_telling = false;
    update_buttons();
  }

  tell(prompt, options) {
    this.pieces = [];
    this.chosen = -1;
    this.text.replaceChildren();
    this.why.replaceChildren();
    this.status.classList.remove("error");
    this.status.textContent = "Telling …";
    this.is_telling = true;
    this.worker.postMessage({ story, prompt, options });
  }

  receive(data) {
    if (data.error) { this.fail(data.error); return; }
    if (data.ready) {
      this.positions = data.ready.positions;
      this.status.textContent = `Ready in ${(data.ready.ms / 1000).toFixed(2)} s.`;
      ready();
      return;
    }
    if (data.story !== story) return;
    if (data.pieces) this.add(data.pieces);
    if (data.n !== undefined) this.finish(data);
    if (data.surprise) this.colour(data.surprise);
    if (data.why && data.at === this.chosen) this.show_why(data.why);
  }

  add(pieces) {
    for (const piece of pieces) {
      const span = document.createElement("span"), space = /^ */.exec(piece[1])[0];
      span.textContent = piece[1].slice(space.length);
      if (piece[2]) span.className = "prompt";
      this.text.append(space, span);
      this.pieces.push(piece);
    }
  }

  finish({ n, seconds, stopped }) {
    this.is_telling = false;
    const speed = seconds > 0 ? `, ${Math.round(n / seconds).toLocaleString("en")} tokens per second` : "";
    const end = stopped ? "Stopped after" : this.pieces.length >= this.limit ? "Cut after" : "The end, after";
    this.status.textContent = `${end} ${n} tokens${speed}. Point at a word, or tap it, to see what else could have come.`;
    if ($("surprise").checked) this.ask_surprise();
    update_buttons();
  }

  tokens() { return this.pieces.map(([token]) => token).filter((token) => token >= 0); }

  ask_surprise() {
    if (this.pieces.length && !this.is_telling)
      this.worker.postMessage({ story, surprise: this.tokens() });
  }

  colour(probabilities) {
    probabilities.forEach((p, i) => {
      const surprise = Math.min(Math.max(-Math.log2(p) - 0.5, 0) / 7, 1);  // up to 7.5 bits
      const style = this.text.children[i].style;
      style.backgroundColor = `hsl(${55 - 55 * surprise} 90% 50% / ${0.65 * surprise ** 0.7})`;
      this.text.children[i].title = percent(p);
    });
  }

  plain() {
    for (const span of this.text.children) { span.style.backgroundColor = ""; span.title = ""; }
  }

  index_of(element) { return Array.prototype.indexOf.call(this.text.children, element); }

  choose(i) {
    if (i < 0 || i === this.chosen || this.is_telling || this.pieces[i][0] < 0) return;
    this.text.children[this.chosen]?.classList.remove("chosen");
    this.chosen = i;
    this.text.children[i].classList.add("chosen");
    this.worker.postMessage({ story, explain: i, tokens: this.tokens() });
  }

  show_why({ chosen, others }) {
    const readable = (text) => text === null ? "the end" : text.replace(/\n/g, "↵").trim() || "space";
    const intro = document.createElement("p"), table = document.createElement("table");
    intro.textContent = "How likely this word was, and what could have come instead:";
    for (const [text, p] of [chosen, ...others]) {
      const row = table.insertRow(), meter = document.createElement("meter");
      row.insertCell().textContent = readable(text);
      row.insertCell().textContent = percent(p);
      meter.value = p;
      meter.setAttribute("aria-hidden", "true");
      row.insertCell().append(meter);
    }
    this.why.replaceChildren(intro, table);
  }
}

// ---- the form, and the address that shares a story

function options() {
  const length = Math.max(2, Number($("length").value) || 256);
  return { temperature: Number($("temperature").value), topP: Number($("top-p").value),
           seed: BigInt($("seed").value || 0), length };
}

function show_values() {
  $("temperature-value").textContent = $("temperature").value;
  $("top-p-value").textContent = $("top-p").value;
}

function address() {
  const values = { i: $("prompt").value, t: $("temperature").value, p: $("top-p").value,
                   s: $("seed").value, n: $("length").value };
  return "#" + new URLSearchParams(values);
}

// Fill the form from the address. Returns whether it names a story.
function read_address() {
  const values = new URLSearchParams(location.hash.slice(1));
  const fields = { i: "prompt", t: "temperature", p: "top-p", s: "seed", n: "length" };
  for (const [name, id] of Object.entries(fields)) if (values.has(name)) $(id).value = values.get(name);
  show_values();
  return values.has("s");
}

function new_seed() { $("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0] % 1000000); }

function update_buttons() {
  const telling = columns.some((c) => c.is_telling);
  $("stop").disabled = !telling;
}

function tell() {
  if (!$("form").reportValidity()) return;
  if (!$("seed").value) new_seed();
  history.replaceState(null, "", address());
  story += 1;
  for (const c of columns) {
    const chosen = options();
    c.limit = Math.min(chosen.length, c.positions);
    c.tell($("prompt").value, chosen);
  }
  update_buttons();
}

function ready() {
  if (!columns.every((c) => c.positions)) return;
  const positions = Math.min(...columns.map((c) => c.positions));
  $("length").max = positions;
  if (!$("length").value) $("length").value = Math.min(256, positions);
  for (const id of ["tell", "another", "link"]) $(id).disabled = false;
  if (read_address()) tell();
}

$("form").addEventListener("submit", (e) => { e.preventDefault(); tell(); });
$("another").addEventListener("click", () => { new_seed(); tell(); });
$("stop").addEventListener("click", () => columns.forEach((c) => c.worker.postMessage({})));
$("link").addEventListener("click", async () => {
  history.replaceState(null, "", address());
  try {
    await navigator.clipboard.writeText(location.href);
    $("link").textContent = "Copied";
  } catch {
    $("link").textContent = "Copy it from the address bar";
  }
  setTimeout(() => { $("link").textContent = "Copy link"; }, 2000);
});
$("surprise").addEventListener("change", () => {
  for (const c of columns) $("surprise").checked ? c.ask_surprise() : c.plain();
});
$("temperature").addEventListener("input", show_values);
$("top-p").addEventListener("input", show_values);
addEventListener("hashchange", () => { if (read_address() && columns.every((c) => c.positions)) tell(); });

document.body.classList.toggle("pair", models.length > 1);
$("about").textContent = models.length > 1
  ? "Two language models tell stories side by side. They run in this page; nothing leaves this device."
  : `A language model of ${models[0].parameters}. It runs in this page; nothing leaves this device.`;
$("footer").textContent = models.map((m) => `${m.name}: ${m.parameters}, ${m.dtype}, ${m.size}`).join("; ");
show_values();
models.forEach((m, i) => columns.push(new Column(m, i)));
