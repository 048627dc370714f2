# make serve [PORT=8000] [HOST=127.0.0.1]   serve; installs what serving needs, and only that
# make test [PROCESSES=3] [THOROUGH=1]      lint, types and tests, all of them or without the longest;
#                                           installs the development tools
# make lint                                 format and types alone
# make docs                                 the documentation as a site, in build/docs
# make linkcheck                            whether the documentation's links to other sites still lead somewhere
# make imports                              the picture of the imports in docs; needs Graphviz
# make bare                                 make serve and make test in a bare Debian, as root; before a release
# make static [OUT=dir]                     the page as plain files, which compute in the browser; fetches with npm
# make wheels                               the compiled loops as wheels for all systems, in build/wheels; minutes
# make audit                                known vulnerabilities of what is shipped, where they can be asked for
# make bench [IMAGES=dir] [RESULTS=dir]     a short load test with its report (docs/benchmarks.md)
# make peers [RESULTS=dir]                  this server beside others, 35 minutes (docs/benchmarks.md)
# Everything lives in .venv; PYTHON=/path/to/python3.x picks the interpreter it is made with.

# Not from the environment: some shells export a HOST of their own, which is the machine's name.
HOST = $(or $(SLSNET_HOST),127.0.0.1)
PORT = $(or $(SLSNET_PORT),8000)
IMAGES ?=
RESULTS ?= benchmarks/results
OUT = build/static

PROCESSES ?= $(shell n=$$(($$(nproc 2>/dev/null || echo 2) + 1)); [ $$n -ge 3 ] || n=3; [ $$n -le 5 ] || n=5; echo $$n)

VENV := .venv
NATIVE := $(addprefix photos/native/,pyproject.toml backend.py meson.build slsnet_pixels/__init__.py slsnet_pixels/pixels.c)
BIN := $(VENV)/bin
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PIP := pip==26.3
COMPILED := torch torchvision sympy scipy sklearn timm onnxscript
# Without them everything works, slower.
INSTALL_LOOPS = $(BIN)/python -m pip install --quiet --disable-pip-version-check ./photos/native || \
	echo "== WITHOUT the compiled loops: photos are read slower"
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)

.PHONY: serve test lint style docs linkcheck imports bare static wheels audit bench peers clean
.DELETE_ON_ERROR:

serve: $(VENV)/.serving
	$(BIN)/python -m server --host $(HOST) --port $(PORT)

# One more at a time than there are cores, since each waits for servers now and then; from three to five,
# since each takes a gigabyte of memory or two. By file, so that what a file's tests share is made once; in
# the order of tests/conftest.py. Types, which take one core for more than a minute, are checked meanwhile,
# and told at the end.
test: style
	@echo "$(BIN)/mypy, beside the tests"; \
	$(BIN)/mypy >$(VENV)/mypy.log 2>&1 & types=$$!; \
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder; tests=$$?; \
	wait $$types; types=$$?; cat $(VENV)/mypy.log; \
	[ $$tests = 0 ] && [ $$types = 0 ]

lint: style
	$(BIN)/mypy

style: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=client $(BIN)/lint-imports --no-cache

docs: $(VENV)/.development
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs

linkcheck: $(VENV)/.development
	$(BIN)/python -m sphinx --keep-going -b linkcheck docs build/linkcheck

imports: $(VENV)/.development
	$(BIN)/pydeps server --no-config --max-module-depth 2 --only server model engines trt_build photos common \
		--noshow -T svg -o docs/imports.svg

bare:
	docker/test/bare.sh

static: $(VENV)/.browser
	$(BIN)/python -m server.static "$(OUT)"

wheels: $(VENV)/.development
	$(BIN)/python photos/native/wheels.py build/wheels

audit: $(VENV)/.development
	$(BIN)/python -m docker.audit

bench: $(VENV)/.benchmarks
	$(BIN)/python -m benchmarks.load --output "$(RESULTS)" $(if $(IMAGES),--images "$(IMAGES)")

peers: $(VENV)/.benchmarks
	$(BIN)/python -m benchmarks.peers --output "$(RESULTS)/peers"

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed and none was found on PATH." \
		"Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "== making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.serving: requirements.txt $(NATIVE) | $(BIN)/python
	@echo "== installing requirements.txt into $(VENV): what serving needs, a minute or less"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(INSTALL_LOOPS)
	@echo "== installed"
	@touch $@

$(VENV)/.browser: requirements.txt $(NATIVE) requirements-browser.txt | $(BIN)/python
	@echo "== installing requirements-browser.txt into $(VENV): what rewriting the network needs, a minute or less"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-browser.txt
	@$(INSTALL_LOOPS)
	@echo "== installed"
	@touch $@ $(VENV)/.serving

$(VENV)/.benchmarks: requirements.txt $(NATIVE) requirements-bench.txt | $(BIN)/python
	@echo "== installing requirements-bench.txt into $(VENV): what the load tests need, a minute or two"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	@$(INSTALL_LOOPS)
	@echo "== installed"
	@touch $@ $(VENV)/.serving

$(VENV)/.development: requirements.txt $(NATIVE) requirements-train.txt requirements-zoo.txt requirements-otel.txt requirements-heif.txt requirements-dicom.txt requirements-openvino.txt requirements-ray.txt \
		requirements-bench.txt requirements-browser.txt docker/requirements-tools.txt requirements-dev.txt requirements-scorer.txt | $(BIN)/python
	@echo "== installing requirements-dev.txt into $(VENV): PyTorch, Ray and the development tools, some gigabytes, several minutes"
	@# The pip that comes with Python 3.11 takes two minutes to find out which versions go together.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP) || \
		echo "== WITHOUT $(PIP): installing takes longer"
	@# Python compiles a module when it first imports it, and most of these are never imported. But each
	@# process that tests would compile these for itself, since all of them begin at the same time.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements-dev.txt
	@cd $(VENV)/lib/python3*/site-packages && ../../../bin/python -m compileall -qq -j 0 $(COMPILED) || true
	@$(INSTALL_LOOPS)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-scorer.txt 2>/dev/null || \
		echo "== without the official ISIC scorer, which has to be compiled: its comparison is skipped"
	@echo "== installed"
	@touch $@ $(VENV)/.serving $(VENV)/.benchmarks $(VENV)/.browser
