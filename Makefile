# Everything runs in .venv, which `make setup` makes from constraints.txt. CONTRIBUTING.md says when to use which.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# --no-compile takes half the time: Python compiles what it imports, on first import.
PIP    := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
CSRC   := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
ASAN   := build/asan
BENCH  ?= score

# A process for each core and a thread in each; tests that need more threads set their number themselves.
PYTEST  := $(PY) -m pytest --numprocesses auto
THREADS ?= 1
# A processor of 2013, for the pass under the interpreter: numpy, torch and MKL then round as they do on machines that
# this one is not, which costs nothing. The other pass has the machine's own.
OLDER   ?= OPENBLAS_CORETYPE=Haswell ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2

MAKEFLAGS += --no-print-directory
unexport PYTHONDONTWRITEBYTECODE  # tests start some hundred Pythons; each would compile torch and transformers again
.PHONY: setup build demo test types interpret plain matrix format bench asan clean

# Its parts wait for each other as they must, else run side by side: the compiler has the cores while pip waits and unpacks.
setup:
	@$(MAKE) --jobs 2 $(VENV)/.installed

$(VENV)/.tools: constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools pybind11 cmake
	touch $@

$(VENV)/.built: $(VENV)/.tools setup.py CMakeLists.txt $(CSRC)
	$(PY) setup.py --quiet build_ext --inplace
	touch $@

$(VENV)/.packages: $(VENV)/.tools
	@echo "installing what psykern needs into $(VENV) (the first time takes minutes: torch is large)"
	$(PIP) --no-build-isolation --requirement constraints.txt
	touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.packages | $(VENV)/.built
	$(PIP) --no-build-isolation --editable '.[test,report]'
	touch $@

# Rebuilds what changed, also where the stamp of `setup` sees no change (another compiler, other CMAKE_ARGS).
build: setup
	$(PY) setup.py --quiet build_ext --inplace

demo: setup
	$(VENV)/bin/psykern demo

test: export CMAKE_ARGS += -DPSYKERN_WERROR=ON
test: export OMP_WAIT_POLICY = PASSIVE  # threads that wait do not spin: ten times faster where cores are shared
test: build
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CSRC)
	@$(MAKE) --jobs 2 types interpret  # mypy has one thread
	$(MAKE) plain

types: setup
	$(PY) -m mypy

# Every case of the Triton kernels under Triton's interpreter, which a process must choose before it imports them.
interpret: setup
	TRITON_INTERPRET=1 OMP_NUM_THREADS=$(THREADS) $(OLDER) $(PYTEST) --dist worksteal -k triton -W ignore \
	    $(addprefix tests/kernels/test_,triton_kernels.py triton_experts.py contract.py dispatch.py elementwise.py option_logprobs.py prefix_attention.py)

# A file stays in one process, which makes its models, its Ray cluster and its compiled kernels once. Files come in their
# own order, not those of most tests first: a file of one long test would be the last, beside an idle process.
plain: setup
	OMP_NUM_THREADS=$(THREADS) $(PYTEST) --dist loadfile --no-loadscope-reorder

# Both passes as on other processors and with other numbers of threads: about as many times `make test` as the script
# has settings.
matrix: build
	bash tests/support/matrix.sh

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CSRC)

bench: setup
	$(PIP) matplotlib
	$(PY) benchmarks/bench_$(BENCH).py $(ARGS)

# The tests of planner and kernels on a copy of the package whose C++ is built with the address and undefined-behaviour
# sanitizers.
asan: setup
	$(VENV)/bin/cmake -S . -B $(ASAN) -DPSYKERN_SANITIZE=ON -DPSYKERN_CUDA=OFF -DPython_EXECUTABLE=$(CURDIR)/$(PY)
	$(VENV)/bin/cmake --build $(ASAN) --parallel 2
	cp -r psykern $(ASAN) && $(VENV)/bin/cmake --install $(ASAN) --prefix $(ASAN)/psykern
	cd $(ASAN) && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 $(CURDIR)/$(PY) -m pytest $(CURDIR)/tests/engine/test_plan.py \
	    $(addprefix $(CURDIR)/tests/kernels/test_,cpu_kernels.py linear.py linear_arguments.py experts.py option_logprobs.py prefix_attention.py elementwise.py)

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .benchmarks psykern/*.so $(VENV)/.built
	find psykern tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
