# make demo   a real model answers, dense and with TDA
# make test   C++ and Python tests
# make fuzz   every fuzz target for SECONDS (60); needs clang
# Both set up .venv and build what is needed; running them again is quick.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct
SOURCES := $(shell find cpp cuda python tests/cpp tests/text -type f -not -name '*.pyc') $(wildcard tests/fuzz/*.cpp tests/fuzz/*.h tools/bench/*.cpp tools/bench/*.cu) CMakeLists.txt pyproject.toml

.PHONY: demo test fuzz build model format check-format clean

demo: build model
	$(BIN)/python tools/demo.py $(MODEL)

test: build model
	$(BIN)/ctest --test-dir build --output-on-failure
	$(BIN)/python -m pytest -q

fuzz: $(VENV)/tools
	tests/fuzz/run.sh $(or $(SECONDS),60)

build: $(VENV)/built

model: $(MODEL)

$(VENV)/tools:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --disable-pip-version-check scikit-build-core nanobind nlohmann_json cmake ninja
	touch $@

# One build tree for the package and the C++ tests, kept between runs.
$(VENV)/built: $(VENV)/tools $(SOURCES)
	$(BIN)/pip install -qq --disable-pip-version-check --no-build-isolation \
	  -C build-dir=build -C cmake.define.TDA_TESTS=ON -C cmake.define.TDA_EXAMPLES=ON '.[test]'
	touch $@

$(MODEL): | $(VENV)/built
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
