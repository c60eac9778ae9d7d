# Everything that is installed stays in .venv/, node_modules/, .tools/ and .img2img/. No target needs
# Docker or a GPU, and only image-test and the image of dist need root. See CONTRIBUTING.md.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The first Python from 3.11 on that can create virtual environments.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
WITH_NPM := $(shell command -v npm 2>/dev/null)

.PHONY: help setup gen check fix test stubs gold chart monitoring demo serve images-test races oracle oracle-lora docs bench chaos attack fleet image-test fanout dist

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

demo: .venv/.local ## Turn a photo into an image with the whole service, then stop
	@$(BIN)/python examples/demo.py

serve: .venv/.local ## Run the whole service on this machine until Ctrl-C
	@exec $(BIN)/img2img-server local

setup: .venv/.dev $(if $(WITH_NPM),node_modules/.installed) ## Install everything for development

test: setup .tools/helm .tools/debian/.java ## Run all tests
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

check: setup ## Check lint, types, imports and generated files; change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python proto/generate.py --check
	$(BIN)/python docs/generate_settings.py --check
	$(BIN)/python helm/generate.py --check
	$(if $(WITH_NPM),node_modules/.bin/buf lint proto,@echo "skipped: buf lint (no npm here)")
	$(if $(WITH_NPM),node_modules/.bin/buf breaking proto --against proto/baseline.binpb,@echo "skipped: buf breaking (no npm here)")

fix: setup ## Correct lint and format errors
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gen: setup ## Write the generated files: stubs in proto/gen, docs/settings.md, the chart's schema and table
	$(BIN)/python proto/generate.py
	$(BIN)/python docs/generate_settings.py
	$(BIN)/python helm/generate.py

stubs: setup ## Generate and compile the stubs of other languages, as far as this machine has the tools
	$(BIN)/python proto/stubs.py $(ARGS)

gold: setup .tools/helm ## Rewrite the golden files; read the diff before you commit it
	GOLD=1 $(BIN)/python -m pytest -k golden $(ARGS)

chart: setup .tools/helm .tools/promtool .tools/checks/.installed ## Check the Helm chart
	$(BIN)/python -m pytest tests/chart $(ARGS)
	$(BIN)/python helm/generate.py --check
	$(BIN)/python helm/check.py

monitoring: setup .tools/helm .tools/promtool ## Test dashboard and slow-queue alert with a Prometheus that reads a loaded `local`
	MONITORING=1 $(BIN)/python -m pytest tests/integration/test_prometheus.py $(ARGS)

images-test: setup ## Test the image check against Pillow on 10,000 files of each kind
	TEST_EXAMPLES=$${TEST_EXAMPLES:-10000} $(BIN)/python -m pytest tests/property/test_images.py \
		tests/property/test_images_cpu_time.py $(ARGS)

races: setup ## Create jobs in 10,000 races of calls in memory and 300 with NATS, with faults at every step
	MEMORY_RACES=$${MEMORY_RACES:-10000} JETSTREAM_RACES=$${JETSTREAM_RACES:-300} \
		$(BIN)/python -m pytest tests/integration/test_intake_races.py $(ARGS)

oracle: setup ## Compare every family and sampler with the stock pipelines, every combination
	ORACLE=full $(BIN)/python -m pytest tests/oracle/test_stock.py $(ARGS)

oracle-lora: setup ## Compare LoRA files of every form with peft, which is installed into a folder of its own
	$(BIN)/python -m pip install --quiet --no-deps --target .tools/peft peft==0.21.2
	PYTHONPATH=.tools/peft $(BIN)/python -m pytest tests/oracle/test_lora_peft.py $(ARGS)

docs: .venv/.docs ## Build the documentation site in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

bench: setup ## Measure the service and the engine on this machine
	$(BIN)/python -m benchmarks.overhead $(ARGS)
	$(BIN)/python -m benchmarks.engine --output .img2img/bench/engine.json $(ENGINE_ARGS)
	$(BIN)/python -m benchmarks.engine_memory

chaos: setup ## Break the parts of a service on this machine under load and count the damage
	$(BIN)/python -m benchmarks.chaos $(ARGS)

fanout: setup ## Measure a thousand event streams of one api next to a bare gRPC fan-out
	$(BIN)/python -m benchmarks.fanout $(ARGS)

attack: setup ## Attack a service on this machine and show what another tenant notices
	$(BIN)/python -m benchmarks.attack $(ARGS)

fleet: setup ## Measure how jobs are shared among workers; BASELINE=commit prints its values too
	$(BIN)/python -m benchmarks.fleet $(if $(BASELINE),--baseline $(BASELINE)) $(ARGS)

dist: .venv/.dev .tools/helm .tools/dist/.installed ## Build and check what a release publishes, into dist/
	$(BIN)/python -m release $(ARGS)

image-test: .venv/.dev ## Build the image without Docker and run its roles (root, Debian's buildah, podman, runc, mmdebstrap)
	PYTHONPATH=. $(BIN)/python .ci/image_test.py $(ARGS)

# Stamp files: a target installs again only after its prerequisites have changed.

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "img2img needs Python 3.11 or newer with venv" \
		"(Debian: apt-get install python3 python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# Installs the packages of an extra, each only if its hash is known; any build of torch of the pinned
# version, since the builds for CPU and CUDA come from different indexes; the server and then the client,
# because pip removes the command img2img together with an older server, which contained it.
define install
$(PIP) install --require-hashes --no-deps -r requirements/build.txt -r requirements/$(1).txt
$(PIP) install -c constraints.txt torch
$(PIP) install --no-deps --no-build-isolation -e '.[$(1)]'
$(PIP) install --no-deps --no-build-isolation -e ./client
endef
LOCKS := pyproject.toml client/pyproject.toml constraints.txt $(wildcard requirements/*.txt)

.venv/.local: $(LOCKS) | .venv/bin/python
	@echo "Installing the service into .venv (the first time takes some minutes)"
	$(call install,local)
	@touch $@

.venv/.dev: $(LOCKS) | .venv/bin/python
	@echo "Installing the service and the tools into .venv (the first time takes some minutes)"
	$(call install,dev)
	@touch .venv/.local $@

.venv/.docs: $(LOCKS) | .venv/bin/python
	$(call install,docs)
	@touch .venv/.local .venv/.dev $@

.tools/promtool: helm/fetch_prometheus.py | .venv/bin/python
	-$(BIN)/python helm/fetch_prometheus.py && touch $@

# For the example in Java, which is skipped without these packages.
.tools/debian/.java: proto/debian.py | .venv/bin/python
	-rm -f $@ && $(BIN)/python proto/debian.py java

.tools/helm: helm/fetch_helm.py | .venv/bin/python
	$(BIN)/python helm/fetch_helm.py
	@touch -h $@

.tools/checks/.installed: helm/checks.txt | .venv/bin/python
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps -r $<
	@touch $@

.tools/dist/.installed: requirements/dist.txt | .venv/bin/python
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes --no-deps -r $<
	@touch $@

node_modules/.installed: package.json package-lock.json
	npm ci --loglevel=error
	@touch $@
