"""
The engine for browsers and Node: run.c, through lib/libllama2.c, compiled to WebAssembly.

    make llama2.wasm

It is compiled by clang with lld and wasi-libc, or by the zig of `pip install '.[page]'`, when it is
first needed and after a change to its sources.
"""

import glob
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile

from configurator import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIB = os.path.join(ROOT, "lib")
SOURCES = [
    os.path.join(ROOT, "run.c"),
    *glob.glob(os.path.join(ROOT, "engine", "*.h")),
    *(os.path.join(LIB, name) for name in ("libllama2.c", "llama2.h", "wasm/setjmp.h")),
]
ENGINE = os.path.join(LIB, "llama2.wasm")
EXPORTS = (
    "llama_load_bytes llama_error llama_vocab_size llama_n_positions llama_bos llama_eos "
    "llama_knows_orders llama_encode llama_encode_order llama_bias llama_decode llama_forward "
    "llama_seed llama_sample malloc free aligned_alloc"
).split()
# as in the Makefile: products and sums are not fused, so that results are the same bits everywhere
COMPILE = [
    "-std=c11",
    "-O3",
    "-ffp-contract=off",
    "-msimd128",
    "-Wall",
    "-Wno-psabi",
    "-Wno-unused-function",
    f"-I{os.path.join(LIB, 'wasm')}",
]
LINK = ["-mexec-model=reactor", "-Wl,--gc-sections", "-Wl,--strip-all", "-Wl,-z,stack-size=262144"]
LINK += [f"-Wl,--export={name}" for name in EXPORTS]


def compilers():
    """The command lines that may compile for WebAssembly, the fastest one first."""
    if shutil.which("clang") and shutil.which("wasm-ld"):
        yield ["clang", "--target=wasm32-wasi"]
    if importlib.util.find_spec("ziglang"):
        yield [sys.executable, "-m", "ziglang", "cc", "--target=wasm32-wasi"]


def compile_with(compiler, out, folder):
    """
    Compile and link in two steps, since a single one would run wasm-opt where binaryen is
    installed, which refuses SIMD. Returns the first error; "" on success.
    """
    made = os.path.join(folder, "llama2.o")
    source = os.path.join(LIB, "libllama2.c")
    for arguments in ([*COMPILE, "-c", source, "-o", made], [*LINK, made, "-lm", "-o", out]):
        run = subprocess.run([*compiler, *arguments], capture_output=True, text=True)
        if run.returncode:
            lines = [f"{compiler[0]} failed", *run.stderr.splitlines()]
            return next((line for line in lines if "error" in line), lines[-1])
    return ""


def build_engine():
    """Build lib/llama2.wasm unless it is up to date. Returns its bytes; raises UserError."""
    if not os.path.exists(ENGINE) or os.path.getmtime(ENGINE) < max(map(os.path.getmtime, SOURCES)):
        errors = []
        for compiler in compilers():
            with tempfile.TemporaryDirectory(dir=LIB) as folder:
                out = os.path.join(folder, "llama2.wasm")
                error = compile_with(compiler, out, folder)
                if not error:
                    os.replace(out, ENGINE)
                    break
            errors.append(f" ({error.strip()[-200:]})")
        else:
            raise UserError(
                f"cannot compile the engine for browsers{''.join(errors)}: run pip install "
                f"'.[page]' or, on Debian and Ubuntu, apt install clang lld wasi-libc "
                f"libclang-rt-dev-wasm32"
            )
    with open(ENGINE, "rb") as f:
        return f.read()
