# Two commands do all the set-up on a fresh machine: `make bench` runs the main job, `make test` the tests.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
NATIVE := $(shell find kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SETTINGS := constraints.txt pyproject.toml setup.py
INPUTS := $(SETTINGS) CMakeLists.txt kernels/cuda/CMakeLists.txt $(NATIVE)
BENCH ?= inception_v3 inception_v4 inception_resnet_v2
ARGS ?=
# The environment's commands and its install name the place where they were made. In a checkout that was moved, or copied, they
# are nobody's, or the other checkout's, and are made anew.
MOVED := $(shell test ! -e '$(VENV)/.place' || test "$$(cat '$(VENV)/.place')" -ef . || echo moved)
# How `make test` runs all of it: by two workers, whose OpenMP threads sleep while they wait, for there are twice as many as cores.
WORKERS ?= 2
TOGETHER := -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 25
# The trainings behind `inception-fast claims`, each with as many seeds as its verdict needs; `make -j2` runs two at a time.
EXPERIMENTS := batchnorm_rate batchnorm_scale batchnorm_sigmoid covariate_shift label_smoothing grid_reduction residual
TRAINED := $(EXPERIMENTS:%=claims-training/%/compare.json)
SEEDS = $(if $(filter label_smoothing grid_reduction,$*),10,6)

.PHONY: help bench claims claims-training test native lint format clean moved
.DELETE_ON_ERROR:

help:
	@echo "make bench   time the models beside the installed peers; BENCH=... names the models, ARGS=... adds options"
	@echo "make claims  measure what the papers claim into claims-report; make -j2 claims-training trains for it first"
	@echo "make test    run the tests by WORKERS=2 processes; with ARGS=..., which goes to pytest, by one"
	@echo "make native  build what changed of the native kernels, in build/native, where the other commands start anew"
	@echo "make lint    run the formatters, linters and the type checker, as the tests do"
	@echo "make format  format the sources"
	@echo "make clean   remove what was built; $(VENV) stays"

bench: $(VENV)/.bench
	$(BIN)/inception-fast bench $(BENCH) $(ARGS)

claims: $(VENV)/.bench
	$(BIN)/inception-fast claims --resume $(if $(wildcard claims-training),--training claims-training) $(ARGS)

claims-training: $(TRAINED)

$(TRAINED): claims-training/%/compare.json: | $(VENV)/.bench
	$(BIN)/inception-fast compare --experiment $* --seeds $(SEEDS) --threads 1 --out claims-training/$*

test: $(VENV)/.test
	$(if $(ARGS),,OMP_WAIT_POLICY=passive) $(BIN)/python -m pytest $(or $(ARGS),$(TOGETHER))

# As an editable install does it, but the objects stay. Where the package is installed, it is up to date then, but for new
# settings, which ask for other packages.
native: $(VENV)/.torch
	test "$$(sed -n 's/^CMAKE_HOME_DIRECTORY:INTERNAL=//p' build/native/CMakeCache.txt 2>/dev/null)" -ef . || rm -rf build/native
	bin="$$(cd $(BIN) && pwd)" && cmake -S . -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM="$$bin/ninja" \
	  -DCMAKE_INSTALL_PREFIX="$(CURDIR)" -DPython_EXECUTABLE="$$bin/python" \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	cmake --build build/native
	cmake --install build/native
	for stamp in $(VENV)/.bench $(VENV)/.test; do \
	  test -n "$$(find $(SETTINGS) -newer $$stamp 2>/dev/null)" || touch -c $$stamp; done

lint: $(VENV)/.test
	$(BIN)/python -m pytest tests/test_style.py $(ARGS)

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

clean:
	rm -rf build dist *.egg-info kernels/cpu/*.so kernels/cuda/*.so $(VENV)/.bench $(VENV)/.test

# torch goes first and alone with the build tools: the constraint keeps out a torch with gigabytes of CUDA, and the package is
# then built in this environment, without an isolated one that would fetch its own. An environment without pip is one whose
# making was interrupted, or failed for want of the system's package for it.
$(VENV)/.torch: constraints.txt $(MOVED)
	$(if $(MOVED),$(if $(filter /%,$(VENV)),,rm -rf $(VENV)))
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools scikit-build-core pybind11 ninja
	pwd -P > $(VENV)/.place
	touch $@

# The tests' environment is the bench's too. Where both are asked for at once, as by `make -j2 bench test`, one install makes both.
FOR_TESTS := $(filter test lint format,$(MAKECMDGOALS))
$(VENV)/.bench: $(VENV)/.torch $(INPUTS) $(if $(FOR_TESTS),$(VENV)/.test)
	$(if $(FOR_TESTS),,$(PIP) --no-build-isolation --editable '.[bench]')
	touch $@

# facenet-pytorch asks for an old torch; what it needs of the others is there.
$(VENV)/.test: $(VENV)/.torch $(INPUTS)
	$(PIP) --no-build-isolation --editable '.[bench,features,hub,keras,lint,ray,tensorflow,test,triton]'
	$(PIP) --no-deps facenet-pytorch
	touch $@ $(VENV)/.bench
