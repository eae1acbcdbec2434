# make demo   sets everything up and runs the whole job on a model made on the spot
# make test   sets everything up and runs every test
# make check  formatting, lints, types, stub
# make bench  the comparisons of benches/ on a small model, in minutes
# make bench-full  kernels, all jobs on 1.5B, sizes up to 8B and 70B; takes 50 GB of disk and an hour or two

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUST   := Cargo.toml $(wildcard Cargo.lock) $(shell find rust -name '*.rs')
BUILT  := $(VENV)/.built

# The interpreter that the extension module is checked against.
export PYO3_PYTHON := $(abspath $(BIN)/python)

.PHONY: demo test check bench bench-full clean
.DELETE_ON_ERROR:

demo: $(BUILT)
	$(BIN)/safemerge-fast demo

test: $(BUILT) check
	cargo test --no-default-features
	$(BIN)/pytest

check: $(BUILT)
	cargo fmt --check
	cargo clippy --all-targets --no-default-features -- -D warnings
	cargo clippy --all-targets --features python -- -D warnings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest safemerge_fast._engine

bench: $(BUILT)
	$(BIN)/python benches/compare.py --model qwen2.5-0.5b --threads 1 2 4 --cache hot
	$(BIN)/python benches/compare.py --model qwen2.5-0.5b --cache cold --peers
	$(BIN)/python benches/adapter.py --model qwen2.5-0.5b

bench-full: $(BUILT)
	cargo bench --no-default-features
	$(BIN)/python benches/compare.py --rounds 5 --slow-rounds 2 --threads 1 2 4
	$(BIN)/python benches/compare.py --rounds 1 --jobs analyze --cache hot
	$(BIN)/python benches/adapter.py --rounds 5
	$(BIN)/python benches/ladder.py
	$(BIN)/python benches/seventy_billion.py
	$(BIN)/python benches/cost_model.py --measure

# One environment: the build tool first, then the package in place with all that its tests need.
$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "maturin>=1.9,<2"
	touch $@

$(BUILT): $(VENV)/.created pyproject.toml $(RUST)
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/maturin develop --release --extras dev --quiet
	touch $@

clean:
	rm -rf $(VENV) target dist
