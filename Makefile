# make demo          builds the package, fetches a small real model, answers dense and with TDA
# make test          C++ and Python tests
# make fuzz          every fuzz target for SECONDS (60); needs clang
# CUDA=1 with the first two builds the CUDA backend, too; needs nvcc.
# All set up .venv and build what is needed; running them again is quick.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct
CUDA ?= 0
SOURCES := CMakeLists.txt pyproject.toml $(shell find cpp cuda python -type f -not -name '*.pyc')
TEST_SOURCES := $(shell find tests tools/bench -name '*.cpp' -o -name '*.h' -o -name '*.cu')
# One build tree for the package and the C++ tests, kept between runs. Shows what is compiled; the
# rest of the output is in build/install.log.
INSTALL = mkdir -p build && $(BIN)/pip install -v --disable-pip-version-check --no-build-isolation \
  -C build-dir=build -C cmake.define.TDA_CUDA=$(if $(filter 1,$(CUDA)),ON,OFF)
SHOW = 2>&1 | tee build/install.log | awk '/^ *\[[0-9]+\/[0-9]+\]/ { print; fflush() }' || { tail -n 50 build/install.log; exit 1; }

.PHONY: demo test fuzz build build-tests model format check-format clean

demo: build model
	$(BIN)/python tools/demo.py $(MODEL)

test: build-tests model
	$(BIN)/ctest --test-dir build --output-on-failure -j2
	$(BIN)/python -m pytest -q

fuzz: $(VENV)/tools
	tests/fuzz/run.sh $(or $(SECONDS),60)

build: $(VENV)/built-cuda$(CUDA)

build-tests: $(VENV)/tested-cuda$(CUDA)

model: $(MODEL)

$(VENV)/tools:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --disable-pip-version-check scikit-build-core nanobind nlohmann_json cmake ninja
	touch $@

$(VENV)/built-cuda$(CUDA): $(VENV)/tools $(SOURCES)
	$(INSTALL) -C cmake.define.TDA_TESTS=OFF . $(SHOW)
	rm -f $(VENV)/*-cuda* && touch $@

$(VENV)/tested-cuda$(CUDA): $(VENV)/tools $(SOURCES) $(TEST_SOURCES)
	$(INSTALL) -C cmake.define.TDA_TESTS=ON -C cmake.define.TDA_EXAMPLES=ON '.[test]' $(SHOW)
	rm -f $(VENV)/*-cuda* && touch $(VENV)/built-cuda$(CUDA) $@

$(MODEL): | build
	$(BIN)/python tools/demo_model.py $(MODEL)

format: $(VENV)/formatters
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu')
	$(BIN)/ruff check -q --fix . && $(BIN)/ruff format -q .

check-format: $(VENV)/formatters
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.h' '*.cpp' '*.cu')
	$(BIN)/ruff check -q . && $(BIN)/ruff format -q --check .

$(VENV)/formatters: $(VENV)/tools
	$(BIN)/pip install -qq --disable-pip-version-check clang-format==23.1.5 ruff==0.17.6
	touch $@

clean:
	rm -rf $(VENV) build
