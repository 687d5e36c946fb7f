# Every target sets itself up: a virtual environment in .venv, made once and again when pyproject.toml changes.
# Another torch build:  make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH  ?= torch==2.13.0
PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/.installed
BENCH  := .venv-bench
BENCH_TORCH ?= torch torchvision
EXTRAS := dev,onnx,demo

# Threads of one small network fight each other; two processes with one thread each are several times faster.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1

.PHONY: demo test lint bench-coverage bench-scaling bench-accuracy bench-closed-form bench-latency bench-metanet \
	bench-rewriting bench-pareto nightly clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("metaprune needs Python 3.11 or newer, set PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRAS)]"
	@touch $@

demo: $(STAMP)
	$(BIN)/metaprune demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest tests/test_project.py

nightly: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "nightly or not nightly"
	$(BIN)/python benchmarks/fuzz.py --cases 5000

bench-coverage: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/coverage.py

bench-scaling: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/scaling.py

bench-accuracy: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/accuracy.py

bench-closed-form: $(STAMP)
	$(BIN)/python benchmarks/closed_form.py

bench-latency: $(STAMP)
	$(BIN)/python benchmarks/latency.py

bench-metanet: $(STAMP)
	$(BIN)/metaprune zoo build --out runs/zoo --networks 120 --data fashion-mnist --processes 2
	$(BIN)/metaprune zoo build --out runs/zoo-digits --networks 26 --data digits --seed 1
	$(BIN)/python benchmarks/metanet.py --zoo runs/zoo --other runs/zoo-digits
	$(BIN)/python benchmarks/metanet.py --zoo runs/zoo --other runs/zoo-digits --table
	$(BIN)/python benchmarks/metanet_sizes.py --zoo runs/zoo

bench-rewriting: $(STAMP)
	$(BIN)/metaprune zoo build --out runs/zoo --networks 120 --data fashion-mnist --processes 2
	$(BIN)/python benchmarks/rewriting.py --zoo runs/zoo
	$(BIN)/python benchmarks/rewriting.py --zoo runs/zoo --table

bench-pareto: $(STAMP)
	$(BIN)/python benchmarks/pareto.py

# Apart from .venv: torchvision works only beside the torch build it was made for, so both come in one request.
$(BENCH)/.installed: pyproject.toml
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet $(BENCH_TORCH) -e ".[bench]"
	@touch $@

clean:
	rm -rf .venv $(BENCH) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
