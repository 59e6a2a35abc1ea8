# make test | demo [TEXT="..."] | fmt | lint | bench | test-asan | test-tsan | test-aarch64
# Everything runs in .venv, which the first target makes.  TORCH says which torch goes there when none is installed;
# the default is the version that the project is developed with (a CPU build where the index offers one).
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu*')
CPP := $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cuh' 'csrc/*.cu' 2>/dev/null)
TEXT ?= a gorgeous, witty film that never stops surprising

.PHONY: test-gpu test-triton-oldest test-triton-table triton-table test demo fmt lint bench test-asan \
  test-tsan test-aarch64 clean

$(VENV)/torch.done:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install -q "$(TORCH)"
	touch $@

$(VENV)/installed.done: $(VENV)/torch.done $(SOURCES)
	$(PY) -m pip install -q setuptools pybind11 ninja
	$(PY) -m pip install -q --no-build-isolation -e ".[test,demo,dev]"
	touch $@

# The CUDA kernels as C++ on the emulator, which only tests need; the rest is not built again.
$(VENV)/emulated.done: $(VENV)/installed.done
	ATTN_EXT_EMULATED=1 $(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

# Libraries whose models the tests run, beside the torch that is there: a constraint pins it.  Where
# they cannot be installed, their tests are skipped.
$(VENV)/integrations.done: $(VENV)/installed.done
	$(PY) -c "import torch; print('torch==' + torch.__version__)" > $(VENV)/torch.txt
	{ $(PY) -c "from importlib.metadata import requires as r; \
	    print(*[x.split(';')[0] for x in r('attn_ext') if 'integrations' in x])" \
	  | xargs $(PY) -m pip install -q -c $(VENV)/torch.txt && \
	  $(PY) -m pip install -q --no-deps timm && touch $@; } || \
	  echo "extra 'integrations' could not be installed: the tests of real models are skipped"

# Tests of the public API that name no backend, once more over the CUDA kernels on the emulator.
ON_EMULATOR := $(addprefix tests/test_, sdpa_semantics.py nonfinite.py flash_attn_compat.py \
  xformers_compat.py inspect.py flex_recipes.py bad_input.py nn_multihead.py)

test: $(VENV)/emulated.done $(VENV)/integrations.done
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 tests  # one torch thread a worker: 2 cores
	ATTN_EXT_TEST_AUTO=emulated OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 $(ON_EMULATOR) -k "not memory"
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 tests/triton_interpreter

# The oldest Triton that the kernels know, beside the one that is installed: the interpreter's tests,
# and what CI compiles for sm_90.
test-triton-oldest: $(VENV)/installed.done build/triton-3.6/triton
	PYTHONPATH=build/triton-3.6 TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 \
	  tests/triton_interpreter
	PYTHONPATH=build/triton-3.6 OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 \
	  tests/test_triton_compile.py -k "what_the_table_says and sm_90"

build/triton-3.6/triton: $(VENV)/installed.done
	test -d $@ || $(PY) -m pip install -q --no-deps --target build/triton-3.6 triton==3.6.0
	touch $@

# Every row of tests/triton_resources/ compiled again and compared; triton-table writes the tables.
test-triton-table: $(VENV)/installed.done build/triton-3.6/triton
	ATTN_EXT_TRITON_ALL=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 tests/test_triton_compile.py
	PYTHONPATH=build/triton-3.6 ATTN_EXT_TRITON_ALL=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 \
	  tests/test_triton_compile.py -k "what_the_table_says and (sm_80 or sm_90 or sm_100 or sm_120)"

triton-table: $(VENV)/installed.done build/triton-3.6/triton
	OMP_NUM_THREADS=1 $(PY) tests/triton_offline.py --write
	PYTHONPATH=build/triton-3.6 OMP_NUM_THREADS=1 $(PY) tests/triton_offline.py --write

demo: $(VENV)/installed.done
	$(PY) examples/text_classifier.py --text "$(TEXT)"

fmt: $(VENV)/installed.done
	$(BIN)/ruff format .
	$(BIN)/ruff check -q --fix .
	$(BIN)/clang-format -i $(CPP)

lint: $(VENV)/installed.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

bench: $(VENV)/installed.done
	$(PY) bench/cpu.py
	$(PY) bench/memory.py

# The kernels under AddressSanitizer + UndefinedBehaviorSanitizer, in a build of their own.
test-asan: $(VENV)/installed.done
	bash tests/sanitize.sh address,undefined tests/test_kernels.py tests/test_masked_tiles.py \
	  tests/test_additive.py::test_dtypes tests/test_inspect_kernels.py::test_dtypes \
	  tests/test_cpu_amx.py

# The thread pool and both kernels under ThreadSanitizer, without Python in the process.
test-tsan: $(VENV)/installed.done
	bash tests/tsan.sh

# The CPU kernels for aarch64 against a naive formula, under qemu.
test-aarch64:
	bash tests/aarch64.sh

# On a machine with an NVIDIA GPU: the kernels against the reference, then under compute-sanitizer.
# Without torch's caching allocator memcheck sees the end of each tensor.
test-gpu: $(VENV)/installed.done
	ATTN_EXT_CUDA=1 ATTN_EXT_EMULATED=1 $(PY) -m pip install -q --no-build-isolation --no-deps -e .
	$(PY) -m pytest -q tests/test_cuda_kernels.py tests/test_cuda_limits.py tests/test_cuda_sm90.py \
	  tests/test_cuda_sm90_varlen.py -k "not emulated"
	$(PY) -m pytest -q tests/test_api.py tests/test_torch_integration.py tests/test_backends_hypothesis.py -k cuda
	$(PY) -m pytest -q tests/test_golden_bits.py tests/test_emulator_sm90.py
	ATTN_EXT_CUDA_SM90=1 $(PY) -m pytest -q tests/test_cuda_kernels.py tests/test_api.py \
	  tests/test_backends_hypothesis.py -k "cuda and not emulated"  # the same on Hopper's kernels
	for tool in memcheck racecheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(PY) -m pytest -q tests/test_cuda_kernels.py tests/test_cuda_sm90.py \
	      tests/test_cuda_sm90_varlen.py -k "not emulated and (test_shapes or test_every_kernel or test_decode)" \
	    || exit 1; done
	$(PY) bench/sm90.py || test $$? = 2  # speed; 2: not a Hopper GPU

clean:
	rm -rf build .venv attn_ext/_*.so *.egg-info
