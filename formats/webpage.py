"""
A page that tells stories: engine, model and tokenizer in one HTML file, for any browser.

The page works from disk and without a network. page.html is its template and page.js its script;
the engine runs in a worker, through lib/llama2.mjs. Its security policy allows only the script and
the style in the page, by their hashes, and workers made by that script.
"""

import base64
import hashlib
import html
import json
import os
import re
import tempfile
import zlib

from configurator import UserError
from formats.calibration import calibrate
from formats.modelbin import export_model
from system.files import atomic_write
from system.wasm import LIB, build_engine

DTYPES = ("int8", "int4", "fp32", "bf16")
FOLDER = os.path.dirname(os.path.abspath(__file__))
MARK = '<meta name="generator" content="modded-llama2.c">'


def is_page(path):
    """Whether a file is a page that write_page() wrote."""
    with open(path, "rb") as f:
        return MARK.encode() in f.read(1000)


def read_text(folder, name):
    with open(os.path.join(folder, name), encoding="utf-8") as f:
        return f.read()


def sha256_source(text):
    """Return the expression that allows an inline script or style in a security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def data_block(name, data):
    attributes = f'type="text/plain" id="{name}" data-crc="{zlib.crc32(data)}"'
    return f"<script {attributes}>{base64.b64encode(data).decode()}</script>\n"


def model_bin(model, dtype, tokenizer, text):
    """Return the bytes of model.bin; int4 is calibrated on a text."""
    rounded = calibrate(model, tokenizer, text) if dtype == "int4" else {}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.bin")
        export_model(model, path, None, dtype, tokenizer.fingerprint, rounded)
        with open(path, "rb") as f:
            return f.read()


def megabytes(n):
    return f"{n / 1e6:.1f} MB"


def page_of(model, dtype, tokenizer, facts):
    """
    Return the page (bytes), and print the sizes. facts: title, language, calibrate, and for two
    models name, of the first, and beside: the name, model and tokenizer of the second. Raises
    UserError if a tokenizer is missing or the engine cannot be compiled.
    """
    models = [(facts.get("name", facts["title"]), model, tokenizer)]
    if "beside" in facts:
        models.append(facts["beside"])
    blocks, summary = [data_block("engine", build_engine())], []
    for i, (name, each, its_tokenizer) in enumerate(models):
        if its_tokenizer is None:
            raise UserError("a page needs the tokenizer: pass --tokenizer=PATH, to its .model file")
        data = model_bin(each, dtype, its_tokenizer, facts.get("calibrate", ""))
        blocks.append(data_block(f"model-{i}", data))
        blocks.append(data_block(f"tokenizer-{i}", its_tokenizer.c_file()))
        n = each.n_params()
        summary.append({"name": name, "parameters": f"{n:,} parameters", "dtype": dtype})
        summary[i]["size"] = megabytes(len(data))
        print(f"{name}: {megabytes(4 * n)} in fp32, {megabytes(len(data))} in {dtype}")
    page, script = read_text(FOLDER, "page.html"), read_text(FOLDER, "page.js").rstrip("\n")
    style = page[page.index("<style>") + len("<style>") : page.index("</style>")]
    policy = (
        f"default-src 'none'; script-src 'wasm-unsafe-eval' {sha256_source(script)}; "
        f"style-src {sha256_source(style)}; worker-src blob:; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "mark": MARK,
        "policy": policy,
        "title": html.escape(facts["title"]),
        "language": html.escape(facts["language"]),
        "models": json.dumps(summary).replace("<", "\\u003c"),  # no name may end the script
        "llama2": read_text(LIB, "llama2.mjs"),
        "script": script,
        "data": "".join(blocks),
    }
    page = re.sub(r"%%(\w+)%%", lambda match: parts[match[1]], page).encode()
    print(f"the page has {megabytes(len(page))} and opens in any browser")
    return page


def write_page(model, path, dtype, tokenizer, facts):
    """Write the page; for the arguments and errors see page_of()."""
    page = page_of(model, dtype, tokenizer, facts)
    with atomic_write(path) as f:
        f.write(page)
