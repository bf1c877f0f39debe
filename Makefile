# Works with GNU make 3.81 (the one of macOS) and any POSIX shell.
#
#   PYTHON=python3.12   the Python to make the environment with
#   VENV=.venv          where the environment is
#   ARGS="-k adapters"  passed on to pytest, the demo or the benchmark
#   RUNS=100000         of `make fuzz`
#   LOCKED=1            install the versions of requirements/, as CI does, and not the newest

VENV ?= .venv
RUNS ?= 100000
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
LLAMACPP := $(VENV)/.llamacpp
PEFT := $(VENV)-peft/.installed
FUZZ := $(VENV)/.fuzz
MINIMUM := $(VENV)-minimum/.installed
TOOLS := $(VENV)-tools/.installed
FROM_LOCK := install --quiet --require-hashes --no-deps --requirement

.DEFAULT_GOAL := help
.PHONY: help install demo exercise test test-real test-wheel test-minimum fuzz lint types audit lock bench-fuse bench-preserve bench-adapters bench-harness bench-gguf bench-each bench-scale clean

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

test-real: $(LLAMACPP) $(PEFT) ## Run the tests on real models, llama.cpp and PEFT (downloads, builds, trains, once)
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

test-minimum: $(MINIMUM) ## Run the tests with the oldest versions that pyproject.toml allows
	LD_PRELOAD="$$(sh scripts/fast_blas.sh)" OPENBLAS_NUM_THREADS=1 \
		$(VENV)-minimum/bin/python -m pytest -m "not real" -n auto $(ARGS)

fuzz: $(FUZZ) ## Fuzz the readers of files (RUNS=100000; Linux on x86-64)
	@$(PY) tests/fuzz/fuzz.py --runs $(RUNS) $(ARGS)

lint: $(INSTALLED) ## Check style and formatting
	$(PY) -m ruff check
	$(PY) -m ruff format --check

types: $(INSTALLED) ## Check types
	$(PY) -m mypy

audit: $(TOOLS) ## Look up known vulnerabilities of the packages in requirements/
	@$(VENV)-tools/bin/python scripts/audit.py requirements/*.txt

lock: $(TOOLS) ## Write requirements/ anew, with the newest versions
	sh scripts/lock.sh $(VENV)-tools/bin/uv

bench-fuse: $(INSTALLED) ## Time fusing
	$(PY) benchmarks/fuse_speed.py $(ARGS)

bench-preserve: $(INSTALLED) ## Measure what fusing leaves of a fine-tune (trains two adapters, once)
	@sh scripts/fast_blas.sh install >/dev/null
	LD_PRELOAD="$$(sh scripts/fast_blas.sh)" $(PY) benchmarks/preserve.py $(ARGS)

bench-adapters: $(INSTALLED) ## Measure adapters combined and taken out again (ARGS=combine or extract)
	@sh scripts/fast_blas.sh install >/dev/null
	LD_PRELOAD="$$(sh scripts/fast_blas.sh)" $(PY) benchmarks/adapters.py $(ARGS)

bench-harness: $(INSTALLED) ## Measure how far the figures of `mlx-fusekit bench` can be trusted
	$(PY) benchmarks/bench_harness.py $(ARGS)

bench-gguf: $(INSTALLED) ## Time exporting to GGUF
	$(PY) benchmarks/gguf_speed.py $(ARGS)

bench-each: $(INSTALLED) ## Time fusing many adapters on one base, together and one by one
	$(PY) benchmarks/each_speed.py $(ARGS)

bench-scale: $(INSTALLED) ## Measure fusing as models grow (ARGS="models --out FOLDER"; or steps, layers, kills, ranks, model)
	@sh scripts/fast_blas.sh install >/dev/null
	LD_PRELOAD="$$(sh scripts/fast_blas.sh)" $(PY) benchmarks/scale.py $(ARGS)

clean: ## Remove the environment and everything that was built
	rm -rf $(VENV) $(VENV)-wheel $(VENV)-minimum $(VENV)-tools $(VENV)-peft build dist demo exercise
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find mlx_fusekit scripts tests -name __pycache__ -prune -exec rm -rf {} +

$(LLAMACPP): $(INSTALLED)
	@echo "Building llama.cpp; that takes about five minutes, once"
	@$(PY) -m pip $(if $(LOCKED),$(FROM_LOCK) requirements/llamacpp.txt,install --quiet llama-cpp-python)
	@touch $@

$(PEFT): requirements/peft.txt scripts/bootstrap.sh
	@sh scripts/bootstrap.sh $(VENV)-peft
	@echo "Installing PEFT and PyTorch into $(VENV)-peft; that takes some minutes, once"
	@$(VENV)-peft/bin/python -m pip $(FROM_LOCK) requirements/peft.txt
	@touch $@

$(FUZZ): $(INSTALLED)
	@$(if $(LOCKED),,$(PY) -m pip install --quiet --only-binary atheris --group fuzz)
	@touch $@

$(MINIMUM): pyproject.toml scripts/bootstrap.sh scripts/minimum.py
	@sh scripts/bootstrap.sh $(VENV)-minimum
	@echo "Installing the oldest versions that mlx-fusekit allows into $(VENV)-minimum"
	@$(VENV)-minimum/bin/python scripts/minimum.py >$(VENV)-minimum/constraints.txt
	@$(VENV)-minimum/bin/python -m pip install --quiet 'pip>=25.1'
	@$(VENV)-minimum/bin/python -m pip install --quiet --editable . --group dev \
		--constraint $(VENV)-minimum/constraints.txt
	@touch $@

$(TOOLS): requirements/tools.txt scripts/bootstrap.sh
	@sh scripts/bootstrap.sh $(VENV)-tools
	@$(VENV)-tools/bin/python -m pip $(FROM_LOCK) requirements/tools.txt
	@touch $@

$(PY):
	@sh scripts/bootstrap.sh $(VENV)

$(INSTALLED): $(PY) pyproject.toml scripts/bootstrap.sh $(if $(LOCKED),requirements/ci.txt)
	@sh scripts/bootstrap.sh $(VENV)
	@echo "Installing mlx-fusekit and what it needs into $(VENV); the first time takes a minute or two"
ifdef LOCKED
	@$(PY) -m pip $(FROM_LOCK) requirements/ci.txt
	@$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@$(PY) scripts/check_lock.py
else
	@$(PY) -m pip install --quiet 'pip>=25.1'
	@$(PY) -m pip install --quiet --editable . --group dev
endif
	@touch $@
