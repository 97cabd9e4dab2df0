"""The engine as WebAssembly, in Node and in the page of export.py --format=html: as ./run."""

import base64
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import EVERYTHING, PATIENCE_S, REPO, logits_of, random_model, refused, script

from configurator import UserError
from formats import webpage
from formats.modelbin import DTYPES, export_model
from model import ARCHS
from system import bootstrap, wasm
from system.browser import Chromium, Firefox
from text.orders import Order

NODE = shutil.which("node")
CAN_BUILD = bool(list(wasm.compilers()))
MODELS = {
    "plain": {"n_kv_heads": 2},
    "odd": {"dim": 72, "n_heads": 3, "hidden_dim": 352, "n_layers": 3},
    "modded": {**ARCHS["modded"], "bigram_rows": 500, "dim": 128, "n_heads": 2},
    "everything": EVERYTHING,
}
needs_toolchain = pytest.mark.skipif(not CAN_BUILD, reason="needs clang, lld and wasi-libc")
needs_node = pytest.mark.skipif(not NODE, reason="needs Node")
needs_browser = pytest.mark.skipif(not Chromium.path(), reason="needs Chromium")
needs_firefox = pytest.mark.skipif(not Firefox.path(), reason="needs Firefox")


@pytest.fixture(scope="session")
def engine():
    return wasm.build_engine()


def node(*jobs):
    """Return the results of jobs of tests/wasm.mjs."""
    lines = "\n".join(json.dumps(job) for job in jobs)
    command = [NODE, REPO / "tests" / "wasm.mjs"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=PATIENCE_S)
    assert not done.returncode, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


FLAGS = {"temperature": "-t", "topP": "-p", "topK": "-k", "minP": "--min-p", "seed": "-s"}
FLAGS |= {"repeatPenalty": "--repeat-penalty", "length": "-n", "prompt": "-i"}
FLAGS |= {name: f"--{name}" for name in ("words", "features", "sentence", "summary")}


def told_by_run(run, model, tokenizer, options):
    """Return the story that ./run tells with these options of tell()."""
    options = {**options, **options.get("order", {})}
    flags = [x for name in options if name != "order" for x in (FLAGS[name], str(options[name]))]
    command = [run, model, "-z", tokenizer, *flags]
    done = subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE_S)
    return done.stdout.decode().removesuffix("\n")


STORIES = [
    {"prompt": "Once upon a time", "seed": 1},
    {"prompt": "", "seed": 2, "temperature": 0.8},
    {"prompt": " Äpfel, 蘋果 and 🍎\n", "seed": 2**63, "topP": 1},
    {"prompt": "Lily", "seed": 3, "topK": 5, "length": 20},
    {"prompt": "A", "seed": 4, "minP": 0.3, "topP": 1, "repeatPenalty": 1.3},
    {"prompt": "The end", "temperature": 0, "seed": 1},
    {"prompt": "", "seed": 5, "order": {"words": " dragon,soup ,, big  cat", "summary": ""}},
    {"prompt": " One day", "seed": 6, "order": {"features": "Dialogue", "sentence": "Äh\nso."}},
]


@needs_toolchain
@needs_node
@pytest.mark.parametrize("name", MODELS)
def test_node_computes_the_same_bits_and_tells_the_same_stories(
    builds, engine, tokenizers, tmp_path, name
):
    tokenizer = tmp_path / "tokenizer.bin"
    tokenizers[512].export(tokenizer)
    model = random_model(**{**MODELS[name], "vocab_size": 512, "max_seq_len": 160, "orders": True})
    tokens = torch.randint(0, 512, (140,)).tolist()  # more than a batch of 128
    jobs = []
    for dtype in DTYPES:
        export_model(model, tmp_path / f"{dtype}.bin", dtype=dtype)
        job = {"model": str(tmp_path / f"{dtype}.bin"), "tokenizer": str(tokenizer)}
        stories = [{**story, "seed": str(story["seed"])} for story in STORIES]  # beyond 2^53
        jobs.append({**job, "tokens": tokens, "stories": stories})
    for dtype, result in zip(DTYPES, node(*jobs), strict=True):
        path = tmp_path / f"{dtype}.bin"
        logits = np.frombuffer(base64.b64decode(result["logits"]), np.float32).reshape(140, 512)
        assert (logits == logits_of(builds["harness", "fast"], path, tokens, 512)).all(), dtype
        told = [told_by_run(builds["run", "fast"], path, tokenizer, story) for story in STORIES]
        assert result["stories"] == told, dtype
        assert len(set(told)) == len(told) and max(map(len, told)) > 200


@needs_toolchain
@needs_node
def test_node_gets_one_sentence_for_a_wrong_file(engine, tokenizers, tmp_path):
    model, tokenizer, other = (tmp_path / f"{name}.bin" for name in ("model", "tok", "other"))
    tokenizers[512].export(tokenizer)
    tokenizers[105].export(other)
    export_model(random_model(vocab_size=512), model)
    short, empty = tmp_path / "short.bin", tmp_path / "empty.bin"
    short.write_bytes(model.read_bytes()[:-1])
    empty.touch()
    job = {"model": str(model), "tokenizer": str(tokenizer), "tokens": [], "stories": []}
    export_model(random_model(vocab_size=512, orders=True), tmp_path / "orders.bin")
    long = {"prompt": "a " * 1000, "seed": 1}
    to_order = {"prompt": "", "seed": 1, "order": {"words": "7," * 100}}
    n_tokens = len(tokenizers[512].encode(Order(("7",) * 100).prompt()))
    misspelt = {**to_order, "order": {"word": "7"}}
    wrong = [{"model": str(short)}, {"model": str(empty)}, {"tokenizer": str(other)}]
    wrong += [{"stories": [long]}, {"stories": [to_order]}]
    orders = [{"model": str(tmp_path / "orders.bin"), "stories": [x]} for x in (to_order, misspelt)]
    results = node(*({**job, **change} for change in [*wrong, *orders, {}]))
    reasons = ["truncated", "has no bytes", "105 pieces", "has room for 32: shorten it"]
    reasons += ["trained without orders", f"have {n_tokens} tokens", "an order has no word:"]
    for result, reason in zip(results, reasons, strict=False):
        assert reason in result["error"] and "\n" not in result["error"], result
    assert "error" not in results[-1]


@needs_toolchain
@needs_node
def test_node_notices_a_call_that_disturbs_a_story(engine, tokenizers, tmp_path):
    model, tokenizer = tmp_path / "model.bin", tmp_path / "tokenizer.bin"
    tokenizers[512].export(tokenizer)
    export_model(random_model(vocab_size=512), model)
    code = f"""
import {{ readFileSync }} from "node:fs";
import {{ load }} from {json.dumps((REPO / "lib" / "llama2.mjs").as_uri())};
const files = {json.dumps([str(REPO / "lib" / "llama2.wasm"), str(model), str(tokenizer)])};
const llama = await load(...files.map((path) => readFileSync(path)));
const other = () => llama.tell("A", {{ topP: 2 }}).next();
for (const disturb of [() => llama.forward([1]), other, () => {{}}])
  try {{
    for (const piece of llama.tell("Once", {{ length: 20, temperature: 0 }})) disturb();
    for (const piece of llama.tell("Once", {{ temperature: -1 }}));
  }} catch (e) {{
    console.log(e.message);
  }}
"""
    (tmp_path / "test.mjs").write_text(code)
    done = subprocess.run([NODE, tmp_path / "test.mjs"], capture_output=True, text=True)
    used = "the model was used while it told a story"
    wrong = "a setting of the sampling is out of range: expected a temperature from 0 to 100"
    assert not done.stderr and done.stdout.splitlines()[:2] == [used, used]
    assert done.stdout.splitlines()[2].startswith(wrong)


@needs_toolchain
@needs_node
def test_the_example_tells_a_story(builds, engine, tokenizers, tmp_path):
    model, tokenizer = tmp_path / "model.bin", tmp_path / "tokenizer.bin"
    tokenizers[512].export(tokenizer)
    export_model(random_model(vocab_size=512, max_seq_len=64), model)
    command = [NODE, REPO / "examples" / "llama2.mjs", model, tokenizer, "One day", "7"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE_S)
    story = {"prompt": "One day", "seed": 7}
    assert (
        done.stdout.decode() == told_by_run(builds["run", "fast"], model, tokenizer, story) + "\n"
    )


# ---- the page


@pytest.fixture(scope="session")
def teller(tmp_path_factory, tokenizers, engine):
    """Write pages, and model.bin files of the same models; return page, model and tokenizer."""
    folder = tmp_path_factory.mktemp("pages")
    tokenizers[512].export(folder / "tokenizer.bin")
    made = {}

    def make(dtype="int8", beside=None, title="A <small> model & its page", **numbers):
        key = (dtype, beside, *sorted(numbers.items()))
        if key not in made:
            model = random_model(**{"max_seq_len": 200, **numbers, "vocab_size": 512})
            with torch.no_grad():
                model.output.weight[1:3] = 0  # at low temperatures no story ends
            page, path = folder / f"{len(made)}.html", folder / f"{len(made)}.bin"
            facts = {"title": title, "language": "en", "calibrate": "none"}  # as export_model()
            if beside:
                other = random_model(**{**numbers, "vocab_size": 512, "n_layers": 1})
                with torch.no_grad():
                    other.output.weight[1:3] = 0
                facts["beside"] = "the other", other, tokenizers[512]
            webpage.write_page(model, page, dtype, tokenizers[512], facts)
            export_model(model, path, dtype=dtype, fingerprint=tokenizers[512].fingerprint)
            made[key] = page, path, folder / "tokenizer.bin"
        return made[key]

    return make


TOLD = """((all) => all.length && all.every((x) => / tokens/.test(x.textContent)))(
    [...document.querySelectorAll('.status')])"""
TEXT = "document.querySelector('.story')?.textContent"


@needs_toolchain
def test_a_page_needs_nothing_from_the_network(teller):
    text = teller()[0].read_text()
    assert "default-src 'none'" in text and "unsafe-inline" not in text
    assert not re.search(r"(src|href)=|https?:|@import|url\(", text)
    assert "<title>A &lt;small&gt; model &amp; its page</title>" in text


@pytest.mark.slow
@needs_toolchain
@needs_browser
def test_a_page_tells_the_stories_of_run(builds, teller, tmp_path):
    sizes = {}, {"dim": 128, "n_layers": 4}
    archs = {}, {**ARCHS["modded"], "bigram_rows": 500}
    with Chromium() as browser:
        for size in sizes:
            for arch in archs:
                for dtype in ("int8", "int4", "fp32"):
                    page, model, tokenizer = teller(dtype, **{**size, **arch})
                    for seed in (1, 2, 3):
                        options = {"prompt": "Tom & Äpfel", "seed": seed, "temperature": 0.8}
                        address = f"#i=Tom+%26+%C3%84pfel&t=0.8&p=0.9&s={seed}&n=120"
                        browser.open("about:blank")
                        browser.open(f"{page.as_uri()}{address}")
                        browser.wait_until(TOLD, PATIENCE_S)
                        story = {**options, "length": 120}
                        told = told_by_run(builds["run", "fast"], model, tokenizer, story)
                        assert browser.evaluate(TEXT) == told, (size, arch, dtype, seed)
                        assert browser.evaluate("location.hash") == address


@pytest.mark.slow
@needs_toolchain
@needs_firefox
def test_firefox_tells_the_story_of_run_and_explains_it(builds, teller):
    page, model, tokenizer = teller("int8", **{**ARCHS["modded"], "bigram_rows": 500})
    options = {"prompt": "Tom & Äpfel", "seed": 1, "temperature": 0.8, "length": 120}
    with Firefox() as browser:
        browser.open(f"{page.as_uri()}#i=Tom+%26+%C3%84pfel&t=0.8&p=0.9&s=1&n=120")
        browser.wait_until(TOLD, PATIENCE_S)
        told = told_by_run(builds["run", "fast"], model, tokenizer, options)
        assert browser.evaluate(TEXT) == told
        browser.evaluate("document.querySelectorAll('.story span')[9].click()")
        browser.wait_until("!!document.querySelector('.why table')", PATIENCE_S)


@pytest.mark.slow
@needs_toolchain
@needs_browser
def test_a_page_explains_each_word(builds, teller, tmp_path):
    page, model, _ = teller("fp32")
    with Chromium(width=390, height=800, dark=True) as browser:
        browser.open(f"{page.as_uri()}#i=One+day&s=5&n=40&t=1")
        browser.wait_until(TOLD, PATIENCE_S)
        tokens = [1, *browser.evaluate("columns[0].tokens()")]  # after BOS
        logits = logits_of(builds["harness", "fast"], model, tokens, 512).astype(np.float64)
        browser.evaluate("document.getElementById('surprise').click()")
        spans = "[...document.querySelectorAll('.story span')]"
        colored = f"{spans}.map((x) => !!x.style.backgroundColor)"
        browser.wait_until(f"{colored}.some((x) => x)", PATIENCE_S)
        assert browser.evaluate(f"{colored}[0]") is False  # the reader wrote it
        browser.evaluate(
            "columns[0].worker.addEventListener('message', (e) => { window.last = e.data; })"
        )
        hover = "dispatchEvent(new PointerEvent('pointerover', { bubbles: true }))"
        browser.evaluate(f"document.querySelectorAll('.story span')[9].{hover}")
        browser.wait_until("!!document.querySelector('.why table')", PATIENCE_S)
        why = browser.evaluate("window.last.why")
        at = browser.evaluate("window.last.at")
        assert at == 9
        expected = np.exp(logits[at] - logits[at].max())
        expected /= expected.sum()
        order = np.argsort(-expected, kind="stable")
        others = [t for t in order if t != tokens[at + 1]][:5]
        assert math.isclose(why["chosen"][1], expected[tokens[at + 1]], rel_tol=1e-5)
        assert np.allclose([p for _, p in why["others"]], expected[others], rtol=1e-5)
        rows = browser.evaluate("document.querySelectorAll('.why tr').length")
        assert rows == 1 + sum(p >= 0.001 for _, p in why["others"]) > 3
        assert "%" in browser.evaluate("document.querySelector('.why').textContent")
        browser.evaluate("document.querySelectorAll('.story span')[9].click()")
        is_beside = """(() => {
            const word = document.querySelector('.story .chosen').getBoundingClientRect();
            const why = document.querySelector('.why').getBoundingClientRect();
            return why.top >= word.bottom || why.bottom <= word.top;
        })()"""
        assert browser.evaluate(is_beside)
        width = browser.evaluate("document.documentElement.scrollWidth")
        assert width <= 390
        # the arrow keys do the same
        browser.evaluate("document.querySelector('.story').focus()")
        browser.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
        browser.wait_until("window.last.at > 9", PATIENCE_S)
        browser.call("Input.dispatchKeyEvent", type="keyDown", key="Escape")
        browser.wait_until("document.querySelector('.why').hidden", PATIENCE_S)
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000


@pytest.mark.slow
@needs_toolchain
@needs_browser
def test_a_page_tells_stories_to_order(builds, teller, tokenizers):
    page, model, tokenizer = teller("fp32", orders=True)
    plain = teller("int8")[0]
    order = {"words": "dragon, soup", "features": "Dialogue", "sentence": "It was hot."}
    options = {"prompt": "One day", "seed": 5, "temperature": 0.8, "length": 150, "order": order}
    told = told_by_run(builds["run", "fast"], model, tokenizer, options)
    ordered = Order(("dragon", "soup"), ("Dialogue",), "It was hot.")
    shown = "getComputedStyle(document.getElementById('words')).height !== 'auto'"
    set_value = "document.getElementById('{}').value = {!r}"
    address = "#i=One+day&t=0.8&p=0.9&s=5&n=150"
    with Chromium(width=390, height=800) as browser:
        browser.open(f"{plain.as_uri()}#i=One+day&s=5&n=20")
        browser.wait_until(TOLD, PATIENCE_S)
        assert not browser.evaluate(shown)
        browser.open("about:blank")
        browser.open(page.as_uri() + address)
        browser.wait_until(TOLD, PATIENCE_S)
        assert browser.evaluate(shown) and browser.evaluate(TEXT) != told
        for name, text in order.items():
            browser.evaluate(set_value.format(name, text))
        browser.evaluate("document.getElementById('tell').click()")
        browser.wait_until(f"{TEXT} === {json.dumps(told)}", PATIENCE_S)
        assert browser.evaluate("location.hash") == (
            f"{address}&w=dragon%2C+soup&f=Dialogue&x=It+was+hot."
        )
        tokens = [*browser.evaluate("columns[0].tokens()")]
        hover = "dispatchEvent(new PointerEvent('pointerover', { bubbles: true }))"
        browser.evaluate(
            "columns[0].worker.addEventListener('message', (e) => { window.last = e.data; })"
        )
        browser.evaluate(f"document.querySelectorAll('.story span')[9].{hover}")
        browser.wait_until("!!window.last?.why", PATIENCE_S)
        why = browser.evaluate("window.last.why")
        assert why["chosen"][1] > 0
        all_tokens = [*tokenizers[512].encode(ordered.prompt()), *tokens]
        logits = logits_of(builds["harness", "fast"], model, all_tokens, 512).astype(np.float64)
        at = len(all_tokens) - len(tokens) + 9
        expected = np.exp(logits[at - 1] - logits[at - 1].max())
        expected = expected[tokens[9]] / expected.sum()
        assert math.isclose(why["chosen"][1], expected, rel_tol=1e-5)
        browser.open(f"{page.as_uri()}#w=dragon&s=1")  # a new address only
        browser.wait_until("document.getElementById('words').value === 'dragon'", PATIENCE_S)
        assert browser.evaluate("document.getElementById('sentence').value") == ""


@pytest.mark.slow
@needs_toolchain
@needs_browser
def test_a_link_tells_a_stopped_story_up_to_its_end(teller):
    page = teller("int8", max_seq_len=4000, dim=128, n_layers=4)[0]
    with Chromium() as browser:
        browser.open(f"{page.as_uri()}#i=One&s=1&n=4000&t=0.2")
        browser.wait_until(f"{TEXT}?.length > 20", PATIENCE_S)
        browser.evaluate("document.getElementById('stop').click()")
        browser.wait_until(TOLD, PATIENCE_S)
        told, address = browser.evaluate(TEXT), browser.evaluate("location.href")
        assert 0 < int(re.search(r"n=(\d+)$", address)[1]) < 4000
        browser.open("about:blank")
        browser.open(address)
        browser.wait_until(TOLD, PATIENCE_S)
        assert browser.evaluate(TEXT) == told


@pytest.mark.slow
@needs_toolchain
@needs_browser
def test_a_page_shares_stops_and_compares(teller):
    page = teller("int8", beside=True, max_seq_len=4000, dim=128, n_layers=4)[0]
    click = "document.getElementById('{}').click()"
    with Chromium() as browser:
        browser.open(page.as_uri())
        browser.wait_until("document.getElementById('tell')?.disabled === false", PATIENCE_S)
        assert browser.evaluate("document.querySelectorAll('.story').length") == 2
        browser.evaluate("document.getElementById('length').value = 4000")
        browser.evaluate("document.getElementById('temperature').value = 0.2")
        browser.evaluate("document.getElementById('seed').value = 1")
        browser.evaluate(click.format("tell"))
        browser.wait_until(f"{TEXT}?.length > 20", PATIENCE_S)
        browser.evaluate(click.format("stop"))
        browser.wait_until(TOLD, PATIENCE_S)
        first = browser.evaluate("document.querySelector('.status').textContent")
        assert first.startswith("Stopped after")
        browser.evaluate("document.getElementById('length').value = 30")
        browser.evaluate(click.format("another"))
        stopped = "/Stopped/.test(document.getElementById('columns').textContent)"
        browser.wait_until(f"{TOLD} && !{stopped}", PATIENCE_S)
        address, told = browser.evaluate("location.href"), browser.evaluate(TEXT)
        browser.open("about:blank")
        browser.open(address)
        browser.wait_until(TOLD, PATIENCE_S)
        assert browser.evaluate(TEXT) == told


@pytest.mark.slow
@needs_toolchain
@needs_browser
def test_a_damaged_page_says_so(teller, tmp_path):
    text = teller()[0].read_text()
    place = text.index('id="model-0"') + 5000
    for change in ("!", "A" if text[place] != "A" else "B"):
        (tmp_path / "bad.html").write_text(text[:place] + change + text[place + 1 :])
        with Chromium() as browser:
            browser.open((tmp_path / "bad.html").as_uri())
            browser.wait_until("!!document.querySelector('.error')", PATIENCE_S)
            status = browser.evaluate("document.querySelector('.error').textContent")
        assert "damaged" in status and "download or copy the file again" in status


@pytest.mark.slow
@needs_toolchain
@needs_browser
def test_an_incomplete_page_and_wrong_values_in_a_link_say_so(teller, tmp_path):
    page = teller(max_seq_len=64)[0]
    text = page.read_text()
    with Chromium() as browser:
        for place in ('id="engine"', 'id="model-0"', 'id="complete"'):
            (tmp_path / "cut.html").write_text(text[: text.index(place)])
            browser.open((tmp_path / "cut.html").as_uri())
            about = "document.getElementById('about')?.textContent"
            browser.wait_until(f"/incomplete: download or copy/.test({about})", PATIENCE_S)
        # what the form refuses is left out
        browser.open(f"{page.as_uri()}#i=One+day&s=abc&n=5000&t=NaN&p=7")
        browser.wait_until(TOLD, PATIENCE_S)
        values = "[...document.querySelectorAll('#settings input')].map((x) => x.value)"
        values = browser.evaluate(values)
        assert values[:2] == ["0.8", "1"]
        assert values[2].isdigit() and values[3] == "64", values
        # a wrong value in a closed part of the form is shown
        browser.evaluate("document.getElementById('seed').value = 'abc'")
        browser.evaluate("document.getElementById('tell').click()")
        assert browser.evaluate("document.getElementById('settings').open")
        # a beginning that is too long is refused, and the next one works
        browser.evaluate("document.getElementById('seed').value = '1'")
        browser.evaluate("document.getElementById('prompt').value = 'a '.repeat(200)")
        before, story = browser.evaluate("location.href"), browser.evaluate(TEXT)
        browser.evaluate("document.getElementById('tell').click()")
        status = "document.querySelector('.status').textContent"
        browser.wait_until(f"/has room for 64: shorten it$/.test({status})", PATIENCE_S)
        assert browser.evaluate("location.href") == before and browser.evaluate(TEXT) == story
        browser.evaluate("document.getElementById('prompt').value = 'One day'")
        browser.evaluate("document.getElementById('tell').click()")
        browser.wait_until(f"/ after [0-9]+ tokens/.test({status})", PATIENCE_S)


# ---- export.py and make


@needs_toolchain
def test_export_writes_a_page(tmp_path, tokenizers):
    tokenizers[512].export(tmp_path / "tokenizer.bin")
    (tmp_path / "tokenizer.model").write_bytes(tokenizers[512].proto)
    export_model(random_model(vocab_size=512), tmp_path / "model.bin")
    page = tmp_path / "story.html"
    done = script("export.py", page, f"--checkpoint={tmp_path / 'model.bin'}", "--title=Mine")
    assert not done.returncode, done.stderr
    assert re.search(r"Mine: .* MB in fp32, .* MB in int8\nthe page has .* MB", done.stdout)
    done = script("export.py", page, f"--checkpoint={tmp_path / 'model.bin'}", "--dtype=int4")
    assert not done.returncode and "in int4" in done.stdout  # over a page of ours
    page.write_text("<html>not ours</html>")
    done = script("export.py", page, f"--checkpoint={tmp_path / 'model.bin'}")
    refused(done, "already exists and is not a model of --format=html")
    flags = [f"--checkpoint={tmp_path / 'model.bin'}", "--tokenizer=none"]
    refused(script("export.py", tmp_path / "b.html", *flags), "a page needs the tokenizer")
    flags = [f"--checkpoint={tmp_path / 'model.bin'}", "--page", "--license=mit"]
    refused(script("export.py", tmp_path / "b.bin", *flags), "--page cannot be used with")
    for _ in range(2):  # also over a folder of ours
        done = script("export.py", tmp_path / "hf", "--format=hf", *flags)
        assert not done.returncode, done.stderr
        assert webpage.is_page(tmp_path / "hf" / "story.html")
        assert "[story.html](story.html)" in (tmp_path / "hf" / "README.md").read_text()
    flags = [f"--checkpoint={tmp_path / 'model.bin'}", f"--beside={tmp_path}"]
    refused(script("export.py", tmp_path / "b.bin", *flags), "--beside cannot be used with")


def test_without_a_compiler_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wasm, "ENGINE", str(tmp_path / "llama2.wasm"))
    monkeypatch.setattr(wasm, "compilers", lambda: iter(()))
    with pytest.raises(UserError, match=r"pip install '\.\[page\]' or.* apt install clang lld"):
        wasm.build_engine()
    monkeypatch.setattr(wasm, "compilers", lambda: iter([["sh", "-c", "echo error: no; exit 1"]]))
    with pytest.raises(UserError, match="cannot compile the engine for browsers"):
        wasm.build_engine()
    assert not (tmp_path / "llama2.wasm").exists()


def test_make_story_ends_well_without_a_page(tmp_path, monkeypatch, capsys):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'error: cannot compile: run x' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(bootstrap, "venv_python", lambda: str(fake))
    assert bootstrap.write_page("model.bin") == ""
    assert capsys.readouterr().out.endswith("story.html was not written: cannot compile: run x\n")
