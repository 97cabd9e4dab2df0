"use strict";
const $ = (id) => document.getElementById(id);
const percent = (p) => p >= 0.99 ? `${(100 * p).toFixed(1)} %` : p >= 0.0995 ? `${Math.round(100 * p)} %`
  : p >= 0.0001 ? `${(100 * p).toPrecision(2)} %` : "< 0.01 %";
const columns = [];
let story = 0;  // the number of the story that is told
let asked = null;  // until that story starts: its values, and whether the address has them
let told = null;  // the values of FIELDS, once a story has started

// ---- a column: a model, its worker and the story it tells

class Column {
  constructor(model, i, n) {
    const root = $("column").content.cloneNode(true).firstElementChild;
    [this.heading, this.text, this.status, this.why, this.heard] = root.children;
    this.heading.textContent = `Model ${"AB"[i]}: ${model.name}`;
    this.heading.hidden = n === 1;
    const by = n === 1 ? "" : ` by model ${"AB"[i]}`;
    this.text.setAttribute("aria-label", `The story${by}; the left and right arrow keys go through its words`);
    $("columns").append(root);
    this.clear();
    this.status.textContent = "Loading the model …";
    const source = [$("llama2").textContent.replace(/^export /gm, ""), $("worker").textContent];
    this.worker = new Worker(URL.createObjectURL(new Blob(source, { type: "text/javascript" })));
    this.worker.onmessage = ({ data }) => this.receive(data);
    this.worker.onerror = (e) => this.fail(e.message || "this browser cannot run the engine");
    const load = ["engine", `model-${i}`, `tokenizer-${i}`].map(
      (id) => ({ base64: $(id).textContent, crc: Number($(id).dataset.crc) }));
    this.worker.postMessage({ load });
    $(`model-${i}`).remove();  // the worker has a copy
    this.listen();
  }

  listen() {
    this.text.addEventListener("pointerover", (e) => {
      if (e.pointerType !== "touch" && !this.is_pinned) this.choose(this.index_of(e.target));
    });
    this.text.addEventListener("focusout", () => this.close());
    this.text.addEventListener("pointerleave", () => { if (!this.is_pinned) this.close(); });
    document.addEventListener("click", (e) => {
      const i = this.index_of(e.target), is_again = this.is_pinned && i === this.chosen;
      if (this.why.contains(e.target)) return;
      if (i < 0 || is_again) this.close();
      else this.choose(i, true);
    });
    this.text.addEventListener("keydown", (e) => {
      const last = this.pieces.length - 1, i = this.chosen;
      const to = { ArrowRight: [i + 1, 1], ArrowLeft: [i - 1, -1], Home: [0, 1], End: [last, -1] }[e.key];
      if (e.key === "Escape") this.close();
      if (!to) return;
      e.preventDefault();
      let [next, step] = to;  // pieces without text are parts of a character
      while (this.pieces[next] && !this.pieces[next][1]) next += step;
      if (this.pieces[next]) this.choose(next, true);
    });
  }

  clear() {
    this.pieces = [];  // [token, text, whether it is part of the prompt]
    this.close();
    this.text.replaceChildren();
  }

  // The model cannot be used at all.
  fail(message) {
    this.has_failed = true;
    this.say(`This page cannot tell stories: ${message}`, true);
    ready();
  }

  // Say something instead of a story.
  say(message, is_error) {
    this.status.textContent = message;
    this.status.classList.toggle("error", is_error);
    this.is_telling = false;
    update_buttons();
  }

  tell(prompt, options) {
    this.say("Telling …", false);
    this.before = this.text.textContent;
    this.is_new = this.is_telling = true;  // the text of the last story stays until this one comes
    this.limit = Math.min(options.length, this.positions);
    this.worker.postMessage({ story, prompt, options });
  }

  receive(data) {
    if (data.ready) {
      this.positions = data.ready;
      this.knows_orders = data.knows_orders;
      this.say(`Ready in ${(performance.now() / 1000).toFixed(2)} s.`, false);
      ready();
    } else if (data.error && data.story === undefined) {
      this.fail(data.error);
    } else if (data.story === story) {
      if (data.error) {
        this.say(data.error, true);
        inform(data.error);  // the status may be out of sight
      }
      if (data.pieces) this.add(data.pieces);
      if (data.n !== undefined) this.finish(data);
      if (data.surprise && $("surprise").checked) this.color(data.surprise);
      if (data.why && data.at === this.chosen) this.show_why(data.why);
    }
  }

  add(pieces) {
    if (this.is_new) {
      this.clear();
      started();
    }
    this.is_new = false;
    for (const piece of pieces) {
      const span = document.createElement("span"), space = /^ */.exec(piece[1])[0];
      span.textContent = piece[1].slice(space.length);
      if (piece[2]) span.className = "prompt";
      this.text.append(space, span);
      this.pieces.push(piece);
    }
  }

  finish({ n, length, seconds, stopped }) {
    const speed = seconds > 0 ? `, ${Math.round(n / seconds).toLocaleString("en")} tokens per second` : "";
    const cut = this.limit < this.positions ? "Cut at the length you set" : "Cut where the model’s context ends";
    const end = stopped ? "Stopped after" : length >= this.limit ? `${cut}, after` : "The end, after";
    if (this.text.textContent === this.before)
      inform(Number(told.t) > 0 ? "“Tell the story” told the same story again; “Another one” makes a new one."
        : "At temperature 0, the model always tells the same story.");
    if (stopped && columns.length === 1) {
      told.n = String(length);  // the link tells it up to here
      set_address("replaceState");
    }
    this.say(`${end} ${n.toLocaleString("en")} tokens${speed}.`, false);
    if ($("surprise").checked) this.ask_surprise();
  }

  tokens() { return this.pieces.map(([token]) => token).filter((token) => token >= 0); }

  ask_surprise() {
    if (this.pieces.length && !this.is_telling)
      this.worker.postMessage({ story, surprise: this.tokens() });
  }

  color(probabilities) {
    probabilities.forEach((p, i) => {
      if (this.pieces[i][2]) return;  // the reader wrote it
      const surprise = Math.min(Math.max(-Math.log2(p) - 0.5, 0) / 7, 1);  // up to 7.5 bits
      this.text.children[i].style.backgroundColor =
        `hsl(${55 - 55 * surprise} 90% 50% / ${0.65 * surprise ** 0.7})`;
    });
  }

  uncolor() {
    for (const span of this.text.children) span.style.backgroundColor = "";
  }

  index_of(element) { return Array.prototype.indexOf.call(this.text.children, element); }

  // The indices of the pieces of a word: [first, last].
  word_of(i) {
    const starts = (k) => k <= 0 || k >= this.pieces.length || !/^[\p{L}\p{M}']/u.test(this.pieces[k][1])
      || !/[\p{L}\p{M}']$/u.test(this.pieces[k - 1][1]);
    let first = i, last = i;
    while (!starts(first)) first -= 1;
    while (!starts(last + 1)) last += 1;
    return [first, last];
  }

  // Ask why piece i came; it stays chosen when the pointer leaves it if it is pinned.
  choose(i, is_pinned = false) {
    if (i < 0 || this.is_telling || this.pieces[i][0] < 0) return;
    this.is_pinned = is_pinned;
    this.why.classList.toggle("pinned", is_pinned);
    if (i === this.chosen) return;
    this.mark("remove");
    this.chosen = i;
    this.mark("add");
    if (is_pinned) this.text.children[i].scrollIntoView({ block: "nearest" });
    this.worker.postMessage({ story, explain: i, tokens: this.tokens() });
  }

  mark(change) {
    if (this.chosen < 0) return;
    const [first, last] = this.word_of(this.chosen);
    for (let k = first; k <= last && last > first; k++) this.text.children[k].classList[change]("word");
    this.text.children[this.chosen].classList[change]("chosen");
  }

  close() {
    if (this.chosen >= 0) this.mark("remove");
    this.chosen = -1;
    this.is_pinned = false;
    this.why.hidden = true;
    this.why.classList.remove("pinned");
  }

  show_why({ chosen, others }) {
    const [first, last] = this.word_of(this.chosen), is_prompt = this.pieces[this.chosen][2];
    const joined = (a, b) => this.pieces.slice(a, b).map(([, text]) => text).join("").trim();
    const readable = (text) => text === null ? "the end" : text.includes("\uFFFD") ? "part of a character"
      : text.replace(/\n/g, "↵").trim() || "space";
    const paragraph = document.createElement("p"), table = document.createElement("table");
    const rows = [chosen, ...others];
    let intro = chosen[1] > 0.995 ? "The model was almost certain of this."
      : "How likely this was, and what else could have come:";
    if (is_prompt) {
      rows.sort((a, b) => b[1] - a[1]);
      intro = chosen[1] > 0.5 ? "You wrote what the model expected."
        : `You wrote “${readable(chosen[0])}”. The model expected:`;
    }
    if (last > first) intro = `A piece of “${joined(first, last + 1)}”. ${intro}`;
    paragraph.textContent = intro;
    for (const [text, p] of rows) {
      if (text !== chosen[0] && p < 0.001) continue;
      const row = table.insertRow(), meter = document.createElement("meter");
      if (text === chosen[0]) row.className = "chosen";
      const start = first < this.chosen && text !== null && !/^\s/.test(text) ? joined(first, this.chosen) : "";
      row.insertCell().textContent = start + readable(text);
      row.insertCell().textContent = percent(p);
      meter.value = p;
      meter.setAttribute("aria-hidden", "true");
      row.insertCell().append(meter);
    }
    this.heard.textContent = `${readable(chosen[0])}, ${percent(chosen[1])}`;
    this.why.replaceChildren(paragraph, table);
    this.place_why();
  }

  // Put the explanation below the word, or above it where there is no room below.
  place_why() {
    const word = this.text.children[this.chosen].getClientRects(), box = this.why.parentElement.getBoundingClientRect();
    const { left, top, bottom } = word[0] || this.text.getBoundingClientRect(), gap = 6;
    this.why.hidden = false;
    const { width, height } = this.why.getBoundingClientRect();
    const is_above = bottom + gap + height > innerHeight && top - gap - height > 0;
    this.why.style.left = `${Math.max(0, Math.min(left - box.left, box.width - width))}px`;
    this.why.style.top = `${(is_above ? top - gap - height : bottom + gap) - box.top}px`;
    if (this.is_pinned) this.why.scrollIntoView({ block: "nearest" });
  }
}

// ---- the form, and the address that shares a story

const FIELDS = { i: "prompt", t: "temperature", p: "top-p", s: "seed", n: "length" };
const ORDER = { w: "words", f: "features", x: "sentence", y: "summary" };  // empty: not in the address

function show_values() {
  for (const id of ["temperature", "top-p"]) $(`${id}-value`).textContent = $(id).value;
}

// Fill the form from the address. Numbers out of range become the nearest that is allowed; what is
// not a number is left out. Returns whether the address names a story.
function read_address() {
  const values = new URLSearchParams(location.hash.slice(1));
  $("seed").value = "";
  for (const [name, id] of Object.entries(FIELDS)) {
    const field = $(id), before = field.value;
    let value = values.get(name);
    if (value === null) continue;
    if ("tpn".includes(name)) {
      value = value.trim() === "" ? NaN : Math.min(Math.max(Number(value), field.min), field.max);
      if (Number.isNaN(value)) continue;
    }
    field.value = value;
    if (!field.checkValidity()) field.value = before;
  }
  for (const [name, id] of Object.entries(ORDER)) $(id).value = values.get(name) ?? "";
  $("wishes").open ||= ["features", "sentence", "summary"].some((id) => $(id).value);
  show_values();
  return ["i", "s", ...Object.keys(ORDER)].some((name) => values.has(name));
}

function update_buttons() {
  const is_loading = !columns.every((c) => c.positions || c.has_failed);
  $("stop").disabled = !columns.some((c) => c.is_telling);
  $("tell").disabled = is_loading || !columns.some((c) => c.positions);
  for (const id of ["another", "copy", "link"]) $(id).disabled = !told;
}

function is_valid() {
  if ($("form").checkValidity()) return true;
  $("settings").open = true;  // its fields cannot show what is wrong while they are hidden
  $("form").reportValidity();
  return false;
}

// Tell the story of the form. is_linked: its address is already that of the page.
function tell(is_linked = false) {
  if (!is_valid()) return;
  if (!$("seed").value) $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 1000000;
  if (!$("length").value) $("length").value = $("length").placeholder;
  const values = Object.fromEntries(Object.entries(FIELDS).map(([name, id]) => [name, $(id).value]));
  values.i = values.i.trimEnd();
  const order = {};
  for (const [name, id] of Object.entries(ORDER)) {
    const text = $(id).value.trim();
    if (text && !$("order").hidden) values[name] = order[id] = text;
  }
  asked = { values, is_linked };
  story += 1;
  $("message").hidden = true;
  const options = { temperature: Number(values.t), topP: Number(values.p), seed: BigInt(values.s),
                    length: Number(values.n), order: Object.keys(order).length ? order : null };
  for (const c of columns) if (c.positions) c.tell(values.i, options);
  update_buttons();
}

// Called when a column has the start of a story; a refused one does not change the address.
function started() {
  if (!asked) return;
  told = asked.values;
  const is_there = asked.is_linked || address() === location.hash;
  asked = null;
  $("hint").hidden = false;
  set_address(is_there ? "replaceState" : "pushState");
  update_buttons();
}

function address() { return "#" + new URLSearchParams(told); }

// method: pushState, so that Back returns to the last story, or replaceState.
function set_address(method) {
  try {
    history[method](null, "", address());
  } catch {}  // not allowed in some frames
}

// Say something below the buttons.
function inform(message) {
  $("message").textContent = message;
  $("message").hidden = false;
}

function another() {
  $("seed").value = "";
  tell();
}

// Called when a model is ready or has failed.
function ready() {
  if (!columns.length || !columns.every((c) => c.positions || c.has_failed)) return;
  const positions = Math.min(...columns.filter((c) => c.positions).map((c) => c.positions));
  if (positions === Infinity) return;
  $("length").max = positions;
  $("length").placeholder = Math.min(256, positions);
  if (!$("length").value) $("length").value = $("length").placeholder;
  $("order").hidden = !columns.some((c) => c.knows_orders);
  update_buttons();
  if (read_address()) tell(true);
}

async function copy(text, message) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    message = "This browser does not allow copying: select the text, or the address above, instead.";
  }
  inform(message);
}

function copy_link() {
  const is_file = location.protocol === "file:";
  copy(location.href.split("#")[0] + address(), is_file
    ? "The link is copied. It opens this story from this file. To share it, send this file and the link: "
      + "your friend opens the file and pastes everything from # on at the end of its address."
    : "The link is copied. It opens this page with this story.");
}

function copy_story() {
  const texts = columns.filter((c) => c.pieces.length).map((c) => (
    columns.length > 1 ? `${c.heading.textContent}\n\n` : "") + c.text.textContent);
  copy(texts.join("\n\n"), columns.length > 1 ? "The stories are copied." : "The story is copied.");
}

function listen() {
  $("form").addEventListener("submit", (e) => { e.preventDefault(); tell(); });
  $("form").addEventListener("keydown", (e) => {
    if (e.key === "Enter" && (e.ctrlKey || e.metaKey) && !$("tell").disabled) tell();
  });
  $("tell").addEventListener("click", () => tell());
  $("another").addEventListener("click", another);
  $("stop").addEventListener("click", () => columns.forEach((c) => c.worker.postMessage({})));
  $("link").addEventListener("click", copy_link);
  $("copy").addEventListener("click", copy_story);
  $("surprise").addEventListener("change", () => {
    $("legend").hidden = !$("surprise").checked;
    for (const c of columns) $("surprise").checked ? c.ask_surprise() : c.uncolor();
  });
  for (const id of ["temperature", "top-p"]) $(id).addEventListener("input", show_values);
  addEventListener("hashchange", () => { if (!$("tell").disabled && read_address()) tell(true); });
}

// This script comes before the models, so that it can tell when the file ends too soon.
addEventListener("DOMContentLoaded", () => {
  const models = JSON.parse($("models").textContent), n = models.length;
  if (!$("complete")) {
    $("about").textContent = "This file is incomplete: download or copy it again.";
    $("about").className = "error";
    return;
  }
  document.body.classList.toggle("pair", n > 1);
  $("about").textContent = n > 1
    ? "Two language models tell a story from the same beginning, with the same seed. They run in this page; nothing leaves this device."
    : `A language model of ${models[0].parameters}. It runs in this page; nothing leaves this device.`;
  if (n > 1) {
    $("tell").textContent = "Tell the stories";
    $("copy").textContent = "Copy stories";
  }
  $("footer").textContent = models.map((m) => (n > 1 ? `${m.name}, ${m.parameters}: ` : "Weights: ")
    + `${m.dtype}, ${m.size}`).join("; ");
  show_values();
  listen();
  models.forEach((m, i) => columns.push(new Column(m, i, n)));
});
