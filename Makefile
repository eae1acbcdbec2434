# make demo   installs the package and runs the whole job on a model made on the spot
# make test   installs what development needs as well, and runs every check and test
# make check  formatting, lints, types, stub
# make soak   kills and fails runs at random, MINUTES long (10); prints what came of them
# make docs   the tables of the documentation, from the declarations
# make bench  the comparisons of benches/ on a small model, in minutes
# make bench-full  kernels, all jobs on 1.5B, sizes up to 8B and 70B; takes 50 GB of disk and an hour or two

PYTHON ?= python3
VENV   ?= .venv
MINUTES ?= 10
BIN    := $(VENV)/bin
RUST   := Cargo.toml $(wildcard Cargo.lock) $(shell find rust -name '*.rs')
PLAIN  := $(VENV)/.plain
DEV    := $(VENV)/.dev

# The interpreter that the extension module is checked against.
export PYO3_PYTHON := $(abspath $(BIN)/python)

.PHONY: demo test check docs soak bench bench-full clean
.DELETE_ON_ERROR:
# Two targets would build in one environment at once.
.NOTPARALLEL:

demo: $(PLAIN)
	$(BIN)/safemerge-fast demo

test: check
	cargo test --no-default-features
	cargo test --no-default-features --features faults writer
	cargo test --no-default-features --features remote remote
	$(BIN)/pytest -n 2

check: $(DEV)
	cargo fmt --check
	cargo clippy --all-targets --no-default-features -- -D warnings
	cargo clippy --all-targets --features python,faults,remote -- -D warnings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest safemerge_fast._engine

soak: $(DEV)
	$(BIN)/python tests/soak/soak.py --minutes $(MINUTES)

docs: $(DEV)
	$(BIN)/python tests/python/documentation.py

bench: $(DEV)
	$(BIN)/python benches/compare.py --model qwen2.5-0.5b --threads 1 2 4 --cache hot
	$(BIN)/python benches/compare.py --model qwen2.5-0.5b --cache cold --peers
	$(BIN)/python benches/adapter.py --model qwen2.5-0.5b
	$(BIN)/python benches/analysis.py --model qwen2.5-0.5b

bench-full: $(DEV)
	cargo bench --no-default-features
	$(BIN)/python benches/compare.py --rounds 5 --slow-rounds 2 --threads 1 2 4
	$(BIN)/python benches/compare.py --rounds 1 --jobs analyze --cache hot
	$(BIN)/python benches/adapter.py --rounds 5
	$(BIN)/python benches/ladder.py
	$(BIN)/python benches/seventy_billion.py
	$(BIN)/python benches/cost_model.py --measure

# One environment: the build tool first, then the package in place.
$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "maturin>=1.9,<2"
	touch $@

# The package as users have it. The engine that tests need is then gone, if there was one.
$(PLAIN): $(VENV)/.created pyproject.toml $(RUST)
	rm -f $(DEV)
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/maturin develop --release --quiet
	touch $@

# With what tests and checks need, and an engine that can be made to fail on purpose; it serves the demo as well.
$(DEV): $(VENV)/.created pyproject.toml $(RUST)
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/maturin develop --release --quiet --extras dev --features python,faults,remote
	touch $@ $(PLAIN)

clean:
	rm -rf $(VENV) target dist
