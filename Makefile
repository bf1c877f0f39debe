# Works with GNU make 3.81 (the one of macOS) and any POSIX shell.
#
#   PYTHON=python3.12   the Python to make the environment with
#   VENV=.venv          where the environment is
#   ARGS="-k adapters"  passed on to pytest, the demo or the benchmark

VENV ?= .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
LLAMACPP := $(VENV)/.llamacpp

.DEFAULT_GOAL := help
.PHONY: help install demo exercise test test-real test-wheel lint types bench-fuse bench-preserve bench-harness bench-gguf clean

help: ## List these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1 \2/p' Makefile | \
		while read -r name text; do printf '  make %-14s %s\n' "$$name" "$$text"; done

install: $(INSTALLED) ## Make .venv with everything that development needs

demo: $(INSTALLED) ## Fuse the embedded sample model, and show what became of its fine-tune
	@LD_PRELOAD="$$(sh scripts/fast_blas.sh)" $(PY) scripts/demo.py $(ARGS)

exercise: $(INSTALLED) ## Run the course exercise on the embedded sample (ARGS="--lang ko" for Korean)
	@LD_PRELOAD="$$(sh scripts/fast_blas.sh)" $(PY) -m mlx_fusekit exercise --overwrite $(ARGS)

test: $(INSTALLED) ## Run the tests
	LD_PRELOAD="$$(sh scripts/fast_blas.sh)" OPENBLAS_NUM_THREADS=1 \
		$(PY) -m pytest -m "not real" -n auto $(ARGS)

test-real: $(LLAMACPP) ## Run the tests on real models and llama.cpp (downloads, builds, trains, once)
	@sh scripts/fast_blas.sh install >/dev/null
	LD_PRELOAD="$$(sh scripts/fast_blas.sh)" $(PY) -m pytest -m real $(ARGS)

test-wheel: $(INSTALLED) ## Build the wheel, check it, and run the tests against it installed
	rm -rf dist $(VENV)-wheel
	$(PY) -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PY) scripts/check_wheel.py dist/*.whl
	@sh scripts/bootstrap.sh $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet 'pip>=25.1'
	$(VENV)-wheel/bin/python -m pip install --quiet dist/*.whl --group dev
	$(VENV)-wheel/bin/pytest -m "not real" -n auto $(ARGS)

lint: $(INSTALLED) ## Check style and formatting
	$(PY) -m ruff check
	$(PY) -m ruff format --check

types: $(INSTALLED) ## Check types
	$(PY) -m mypy

bench-fuse: $(INSTALLED) ## Time fusing
	$(PY) benchmarks/fuse_speed.py $(ARGS)

bench-preserve: $(INSTALLED) ## Measure what fusing leaves of a fine-tune (trains two adapters, once)
	@sh scripts/fast_blas.sh install >/dev/null
	LD_PRELOAD="$$(sh scripts/fast_blas.sh)" $(PY) benchmarks/preserve.py $(ARGS)

bench-harness: $(INSTALLED) ## Measure how far the figures of `mlx-fusekit bench` can be trusted
	$(PY) benchmarks/bench_harness.py $(ARGS)

bench-gguf: $(INSTALLED) ## Time exporting to GGUF
	$(PY) benchmarks/gguf_speed.py $(ARGS)

clean: ## Remove the environment and everything that was built
	rm -rf $(VENV) $(VENV)-wheel dist demo exercise
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find mlx_fusekit scripts tests -name __pycache__ -prune -exec rm -rf {} +

$(LLAMACPP): $(INSTALLED)
	@echo "Building llama.cpp; that takes about five minutes, once"
	@$(PY) -m pip install --quiet llama-cpp-python
	@touch $@

$(PY):
	@sh scripts/bootstrap.sh $(VENV)

$(INSTALLED): $(PY) pyproject.toml scripts/bootstrap.sh
	@sh scripts/bootstrap.sh $(VENV)
	@echo "Installing mlx-fusekit and what it needs into $(VENV); the first time takes a minute or two"
	@$(PY) -m pip install --quiet 'pip>=25.1'
	@$(PY) -m pip install --quiet --editable . --group dev
	@touch $@
