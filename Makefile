# make story   from nothing to a story: environment, practice corpus, vocabulary, training, text
# make test    the quick tests; make test-slow: all others
# make run     the C engine; make debug: run_debug, with sanitizers; make libllama2: the engine as
#              a shared library, see lib/llama2.h and examples/llama2.py
# make page    out/story/story.html, the model of make story as a web page; make llama2.wasm: the
#              engine for browsers and Node, see lib/llama2.mjs and examples/llama2.mjs
# make test-peers   run the GGUF files of export.py with llama.cpp (llama-cpp-python)
# make fuzz    random models, tokenizers, texts and tables of guesses for the engine, with clang;
#              FUZZ_SECONDS=60 for each
# make test-arm   the engine's numerical tests under qemu-user, for 64-bit ARM with and without dot
#              products, with a cross compiler for aarch64
# make bench   training speed (10 minutes), the loader, checkpoints (10 minutes), two processes (4),
#              the engine (5), and with TEXT=PATH, a .txt file with <|endoftext|> between documents,
#              the tokenizers (3). For comparison, LLAMA2C=PATH adds a checkout of llama2.c, and
#              LLAMA_BENCH=PATH llama.cpp's llama-bench. `python -m bench` lists the benchmarks;
#              experiments/speedrun.py measures the recipe
# make lint    ruff; make clean: remove build outputs, but not data, models or the environment
#
# PYTHON=...   the Python to start from; its torch is reused if it has the right version
# CC=... CFLAGS=...   another compiler, other flags

PYTHON ?= python3
CC ?= cc

# On x86 run.c picks its instructions at run time, so one binary serves all machines. Sums and
# products are not fused, so that they round alike everywhere
has = $(shell echo 'int main(void) { return 0; }' | $(CC) $(1) -x c - -o /dev/null 2>/dev/null && echo $(1))
STRICT = -std=c11 -ffp-contract=off -Wall -Wextra -Wno-psabi
CFLAGS ?= $(STRICT) -O3 $(if $(filter x86_64,$(shell uname -m)),,$(call has,-mcpu=native)) \
          $(call has,-fopenmp)
SANITIZE = $(STRICT) -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
FUZZ_SECONDS ?= 60

.PHONY: story test test-slow test-arm test-peers bench fuzz lint clean debug libllama2 dev page \
        llama2.wasm

run: run.c engine/*.h
	$(CC) $(CFLAGS) run.c -o run -lm

debug: run_debug
run_debug: run.c engine/*.h
	$(CC) $(SANITIZE) run.c -o run_debug -lm

libllama2: libllama2.so
libllama2.so: lib/libllama2.c lib/llama2.h run.c engine/*.h
	$(CC) $(CFLAGS) -shared -fPIC -fvisibility=hidden lib/libllama2.c -o libllama2.so -lm

llama2.wasm: dev
	@.venv/bin/python -c "from system.wasm import build_engine; build_engine()"
	@echo "lib/llama2.wasm is up to date"

page: dev
	.venv/bin/python export.py out/story/story.html --checkpoint=out/story --title="A storyteller"

story:
	@$(PYTHON) system/bootstrap.py story

dev:
	@echo "Python environment in .venv"
	@$(PYTHON) system/bootstrap.py venv requirements-dev.txt

test: dev
	.venv/bin/python -m pytest

test-slow: dev
	.venv/bin/python -m pytest -m "slow and not peers"

# only the numerical tests: everything else is the same C on every machine
test-arm: dev
	for arch in armv8.2-a+dotprod armv8-a; do \
	  ENGINE_CC=aarch64-linux-gnu-gcc ENGINE_FLAGS="-march=$$arch -static" \
	  ENGINE_EMULATOR=qemu-aarch64 .venv/bin/python -m pytest -m "not peers" tests/test_run.py \
	  -k "logits or bits" || exit 1; done

PEER = llama-cpp-python==0.3.36

test-peers: dev
	@.venv/bin/python -c "import llama_cpp" 2>/dev/null || { \
	  echo "error: llama.cpp is missing. To compile it (ten to twenty minutes):"; \
	  echo "    .venv/bin/python -m pip install $(PEER)"; exit 1; }
	.venv/bin/python -m pytest -m peers tests/test_peers.py

fuzz: dev
	.venv/bin/python tests/fuzz.py --seconds=$(FUZZ_SECONDS)

bench: dev run
	.venv/bin/python -m bench.train --llama2c=$(LLAMA2C)
	.venv/bin/python -m bench.loader
	.venv/bin/python -m bench.checkpoint
	.venv/bin/python -m bench.scaling
	.venv/bin/python -m bench.infer --llama2c=$(LLAMA2C) --peer=$(LLAMA_BENCH)
	$(if $(TEXT),.venv/bin/python -m bench.tokenizer --source=$(TEXT) --llama2c=$(LLAMA2C))

lint: dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:
	rm -rf run run_debug libllama2.so lib/llama2.wasm .pytest_cache .ruff_cache __pycache__ tests/__pycache__
