# make story   from nothing to a story: environment, practice corpus, vocabulary, training, text
# make test    all tests
# make run     the C engine; make debug: run_debug, the same with sanitizers
# make bench   training speed (10 minutes), the speedrun against the plain recipe (25 minutes, with
#              shards of both vocabularies in DATA), the loader and the checkpoints (10 minutes);
#              LLAMA2C=PATH, a checkout of llama2.c, measures its model too
# make lint    ruff; make clean: removes what was built, not data, models or environment
#
# PYTHON=...   the Python to begin from; a fitting torch that it has is used as it is
# CC=... CFLAGS=...   another compiler, other flags

PYTHON ?= python3
CC ?= cc
DATA ?= data

# The one flags variable: as fast as this compiler can for this machine, with OpenMP if it has it
has = $(shell echo 'int main(void) { return 0; }' | $(CC) $(1) -x c - -o /dev/null 2>/dev/null && echo $(1))
CFLAGS ?= -std=c11 -O3 -Wall -Wextra $(or $(call has,-march=native),$(call has,-mcpu=native)) \
          $(or $(call has,-fopenmp),$(call has,-fopenmp-simd))
SANITIZE = -std=c11 -O1 -g -Wall -Wextra -fsanitize=address,undefined -fno-sanitize-recover=all

.PHONY: story test bench lint clean debug dev

run: run.c
	$(CC) $(CFLAGS) run.c -o run -lm

debug: run_debug
run_debug: run.c
	$(CC) $(SANITIZE) run.c -o run_debug -lm

story:
	@$(PYTHON) bootstrap.py story

dev:
	@echo "Python environment in .venv"
	@$(PYTHON) bootstrap.py venv requirements-dev.txt

test: dev
	.venv/bin/python -m pytest

bench: dev
	.venv/bin/python bench.py train --llama2c=$(LLAMA2C)
	.venv/bin/python bench.py speedrun --data_dir=$(DATA)
	.venv/bin/python bench.py loader
	.venv/bin/python bench.py checkpoint

lint: dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:
	rm -rf run run_debug .pytest_cache .ruff_cache __pycache__ tests/__pycache__
