# make check | test | demo [TEXT="..."] | fmt | lint | bench | wheel | seen | test-anew | test-latest | test-oldest | test-asan | test-tsan | test-aarch64 | test-avx512
# Everything runs in .venv, which the first target makes.  TORCH says which torch goes there when none is installed;
# the default is the version that the project is developed with (a CPU build where the index offers one).  Whatever else
# is installed has the version that tests/package/constraints.txt gives.
PYTHON ?= python3
TORCH ?= torch==2.13.0
OLDEST_TORCH ?= torch==2.6.0
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PINS := $(VENV)/constraints.txt
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu*')
CPP := $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cuh' 'csrc/*.cu' 2>/dev/null)
TEXT ?= a gorgeous, witty film that never stops surprising

.PHONY: check test-gpu seen test-anew test-ptx explore-ptx test-triton-oldest test-triton-table triton-table test demo fmt lint bench test-asan \
  test-tsan test-aarch64 test-avx512 wheel test-latest test-oldest clean

$(VENV)/torch.done:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c tests/package/constraints.txt --upgrade pip
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install -q "$(TORCH)"
	touch $@

$(PINS): $(VENV)/torch.done tests/package/constraints.txt tests/package/constrain.py
	$(PY) tests/package/constrain.py > $@

$(VENV)/installed.done: $(PINS) $(SOURCES)
	$(PY) -m pip install -q -c $(PINS) setuptools pybind11 ninja
	$(PY) -m pip install -q -c $(PINS) --no-build-isolation -e ".[test,demo,dev]"
	touch $@

# The CUDA kernels as C++ on the emulator, which only tests need; the rest is not built again.
$(VENV)/emulated.done: $(VENV)/installed.done
	ATTN_EXT_EMULATED=1 $(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

# Libraries whose models the tests run, beside the torch that is there.  timm comes without its
# dependency torchvision.  Where they cannot be installed, their tests are skipped.
$(VENV)/integrations.done: $(VENV)/installed.done
	{ $(PY) tests/package/constrain.py integrations > $(VENV)/integrations.txt && \
	  $(PY) -m pip install -q -c $(PINS) -r $(VENV)/integrations.txt && \
	  $(PY) -m pip install -q -c $(PINS) --no-deps timm && touch $@; } || \
	  echo "extra 'integrations' could not be installed: the tests of real models are skipped"

# Tests of the public API that name no backend, once more over the CUDA kernels on the emulator.
ON_EMULATOR := \
  $(addprefix tests/api/test_, nonfinite.py inspect.py bad_input.py nn_multihead.py) \
  $(addprefix tests/integrations/test_, flash_attn_compat.py xformers_compat.py xformers_lengths.py \
    flex_recipes.py) \
  tests/torch/test_sdpa_semantics.py

# Two tiers (tests/helpers/tiers.py): `make check` for every change, `make test` everything.  One torch
# thread a worker: 2 cores.  loadgroup: tests that share what takes long to set up share a worker.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadgroup

check: $(VENV)/emulated.done
	ATTN_EXT_TIER=check $(PYTEST) -m "not thorough" tests

test: $(VENV)/emulated.done $(VENV)/integrations.done
	$(PYTEST) tests
	ATTN_EXT_TEST_AUTO=emulated $(PYTEST) $(ON_EMULATOR) -k "not memory"
	TRITON_INTERPRET=1 $(PYTEST) tests/triton/interpreter

# What takes minutes to compile is compiled where its sources are not those of tests/seen, and else in
# turn (tests/helpers/seen.py).  seen writes what is new there (`ATTN_EXT_SEEN=write make test` does so,
# too); test-anew compiles all of it, on every architecture, whatever was seen.
COMPILED := $(wildcard tests/*/test_*_mutations.py) \
  $(addprefix tests/cuda/test_, emulator.py machine_code.py ptx.py) tests/cpu/test_cpu_sources.py \
  $(addprefix tests/triton/test_triton_, code.py compile.py family_compile.py replay.py) \
  $(addprefix tests/triton/test_triton_, second_compile.py ptx.py)
INTERPRETED := tests/triton/interpreter -k planted_bug
ON_OLDEST := tests/triton/test_triton_compile.py -k "what_the_table_says and sm_90"

seen: $(VENV)/emulated.done build/triton-3.6/triton
	ATTN_EXT_SEEN=write $(PYTEST) $(COMPILED)
	TRITON_INTERPRET=1 ATTN_EXT_SEEN=write $(PYTEST) $(INTERPRETED)
	PYTHONPATH=build/triton-3.6 ATTN_EXT_SEEN=write $(PYTEST) $(ON_OLDEST)

test-anew: $(VENV)/emulated.done
	ATTN_EXT_SEEN=nothing ATTN_EXT_NVRTC_ALL=1 ATTN_EXT_TRITON_ALL=1 $(PYTEST) $(COMPILED)
	TRITON_INTERPRET=1 ATTN_EXT_SEEN=nothing $(PYTEST) $(INTERPRETED)

# The CUDA kernels as NVRTC compiles them and those of Triton, their PTX on the emulator: every planted
# fault, every set of features, and the tests of the backends `emulated` and `triton` with compiled
# kernels in their place.  It takes hours, less what has passed for these kernels (tests/seen), and goes
# on where it was stopped; with ATTN_EXT_SEEN=nothing all of it runs.
ON_PTX := $(addprefix tests/api/test_, api.py backends_hypothesis.py)
test-ptx: export ATTN_EXT_SEEN ?= write
test-ptx: $(VENV)/emulated.done
	ATTN_EXT_PTX_ALL=1 $(PYTEST) $(addprefix tests/cuda/test_, jit.py features.py ptx.py ptx_mutations.py)
	ATTN_EXT_EMULATED_RUNS=ptx $(PYTEST) -k emulated $(ON_PTX) \
	  $(addprefix tests/cuda/test_cuda_, kernels.py sm90.py sm90_varlen.py sm90_features.py sm90_backward_features.py)
	ATTN_EXT_EMULATED_RUNS=ptx ATTN_EXT_TEST_AUTO=emulated $(PYTEST) $(ON_EMULATOR) -k "not memory"
	$(PYTEST) $(addprefix tests/triton/test_triton_ptx, .py _mutations.py)
	ATTN_EXT_EMULATED_RUNS=triton-ptx $(PYTEST) -k triton $(ON_PTX) \
	  $(addprefix tests/triton/interpreter/test_, kernels.py decode.py mixes.py)

# 500 random mixes of features each on the compiled PTX of the CUDA kernels and of Triton's.  What was
# compiled stays in build/ptx: with the same SEED a run that was stopped goes on where it was.
SEED ?= 21
explore-ptx: $(VENV)/emulated.done
	ATTN_EXT_EMULATED_RUNS=ptx ATTN_EXT_HYPOTHESIS=explore ATTN_EXT_PTX_CXXFLAGS=-O0 $(PYTEST) --hypothesis-seed=$(SEED) -k emulated \
	  tests/api/test_backends_hypothesis.py
	ATTN_EXT_EMULATED_RUNS=triton-ptx ATTN_EXT_EXAMPLES=167 ATTN_EXT_PTX_CXXFLAGS=-O0 $(PYTEST) \
	  --hypothesis-seed=$(SEED) tests/triton/interpreter/test_mixes.py

# The oldest Triton that the kernels know, beside the one that is installed: the interpreter's tests,
# and what CI compiles for sm_90.
test-triton-oldest: $(VENV)/installed.done build/triton-3.6/triton
	PYTHONPATH=build/triton-3.6 TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 \
	  $(addprefix tests/triton/interpreter/test_, kernels.py compile.py decode.py)
	PYTHONPATH=build/triton-3.6 OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 $(ON_OLDEST)

build/triton-3.6/triton: $(VENV)/installed.done
	test -d $@ || $(PY) -m pip install -q --no-deps --target build/triton-3.6 triton==3.6.0
	touch $@

# Every row of tests/triton/resources/ compiled again and compared; triton-table writes the tables.
test-triton-table: $(VENV)/installed.done build/triton-3.6/triton
	ATTN_EXT_TRITON_ALL=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 \
	  tests/triton/test_triton_compile.py tests/triton/test_triton_family_compile.py
	PYTHONPATH=build/triton-3.6 ATTN_EXT_TRITON_ALL=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 $(ON_OLDEST)

triton-table: $(VENV)/installed.done build/triton-3.6/triton
	OMP_NUM_THREADS=1 $(PY) tests/helpers/triton_offline.py --write
	PYTHONPATH=build/triton-3.6 OMP_NUM_THREADS=1 $(PY) tests/helpers/triton_offline.py --write

# The archive of the sources, and a wheel built from it in isolation, without torch; what either lacks
# is missing here.  The wheel is then read and run in an environment that has nothing but torch.
wheel: $(PINS)
	rm -rf build/sdist dist && mkdir -p build/sdist dist
	$(PY) -m pip install -q -c $(PINS) setuptools
	$(PY) -c "from setuptools import build_meta as b; b.build_sdist('dist')" > build/sdist/log
	$(PY) -m pip wheel -q --no-deps -w dist dist/attn_ext-*.tar.gz
	$(PY) tests/package/check_wheel.py dist/attn_ext-*.whl
	ls -l dist

# Tests of what other packages can break: the public API, autograd, compile, and real models.
WITH_OTHERS := \
  $(addprefix tests/api/test_, api.py nn_multihead.py nn_family.py inspect.py record.py \
    strangers_calls.py) \
  $(addprefix tests/torch/test_, compile.py torch_integration.py sdpa_semantics.py \
    replace_sdpa.py sdpa_backward_scope.py sdpa_hooks.py jit_trace.py dtensor.py) \
  $(addprefix tests/integrations/test_, flash_attn_compat.py xformers_compat.py xformers_lengths.py \
    flex_recipes.py models_diffusers.py models_encoders.py models_function.py models_llama.py models_timm.py) \
  $(addprefix tests/tools/test_, cli.py profile.py examples.py family_examples.py)
VERSIONS = from importlib.metadata import version as v, distributions as d; \
  names = {x.name for x in d()} & set('$(1)'.split()); import attn_ext; \
  print(attn_ext.__file__, *(n + ' ' + v(n) for n in sorted(names)), sep='\n')
# Not from this folder, whose attn_ext has no kernels: processes that tests start would import it.
ELSEWHERE = mkdir -p build/elsewhere && cd build/elsewhere && OMP_NUM_THREADS=1 ../../$(1)/bin/pytest -q -n 2 \
  -c ../../pyproject.toml --rootdir ../..
SHOWN := torch triton transformers diffusers accelerate timm numpy pytest hypothesis matplotlib rich typer

# The wheel with the newest of every other package; TORCH=torch takes the newest torch, too.
test-latest: wheel
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install -q --upgrade pip "$(TORCH)"
	.venv-latest/bin/python -m pip install -q --force-reinstall --no-deps dist/attn_ext-*.whl
	.venv-latest/bin/python tests/package/constrain.py | grep "^torch==" > .venv-latest/torch.txt
	.venv-latest/bin/python tests/package/constrain.py test demo integrations > .venv-latest/extras.txt
	.venv-latest/bin/python -m pip install -q --upgrade --upgrade-strategy eager \
	  -c .venv-latest/torch.txt -r .venv-latest/extras.txt
	.venv-latest/bin/python -m pip install -q --upgrade --no-deps timm
	cd build && ../.venv-latest/bin/python -c "$(call VERSIONS,$(SHOWN))"
	$(call ELSEWHERE,.venv-latest) $(addprefix ../../,$(WITH_OTHERS))
	TRITON_INTERPRET=1; export TRITON_INTERPRET; $(call ELSEWHERE,.venv-latest) ../../tests/triton/interpreter

# The same wheel with the oldest torch that README promises.  Linux builds of torch on the package index
# bring CUDA, 3 GB to download and 6 GB on disk: PIP_EXTRA_INDEX_URL may name an index of CPU builds.
test-oldest: wheel
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q -c tests/package/constraints.txt --upgrade pip
	.venv-oldest/bin/python -m pip install -q "$(OLDEST_TORCH)"
	.venv-oldest/bin/python -m pip install -q --force-reinstall --no-deps dist/attn_ext-*.whl
	.venv-oldest/bin/python tests/package/constrain.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/python tests/package/constrain.py test demo integrations > .venv-oldest/extras.txt
	.venv-oldest/bin/python -m pip install -q -c .venv-oldest/constraints.txt \
	  -r .venv-oldest/extras.txt
	.venv-oldest/bin/python -m pip install -q -c .venv-oldest/constraints.txt --no-deps timm
	cd build && ../.venv-oldest/bin/python -c "$(call VERSIONS,$(SHOWN))"
	$(call ELSEWHERE,.venv-oldest) $(addprefix ../../,$(WITH_OTHERS))

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
	bash tests/cpu/sanitize.sh address,undefined tests/cpu/test_kernels.py \
	  tests/cpu/test_masked_tiles.py tests/api/test_additive.py::test_dtypes \
	  tests/cpu/test_inspect_kernels.py::test_dtypes tests/cpu/test_cpu_amx.py \
	  -k "not largest_logit and not gradient_of_one_query"  # other numbers, the same addresses

# The thread pool and both kernels under ThreadSanitizer, without Python in the process.
test-tsan: $(VENV)/installed.done
	bash tests/cpu/tsan.sh

# The CPU kernels for aarch64 against a naive formula, under qemu.
test-aarch64:
	bash tests/cpu/aarch64.sh

# The CPU kernels for AVX-512 against the same formula, on a machine that has AVX2 only.
test-avx512:
	bash tests/cpu/avx512.sh

# On a machine with an NVIDIA GPU: the kernels against the reference, then under compute-sanitizer.
# Without torch's caching allocator memcheck sees the end of each tensor.  A step that hangs, as a
# kernel does that waits for a barrier that never comes, is an error after GPU_MINUTES.  What
# memcheck finds is an error; racecheck only tells, since it may take what TMA and wgmma read and
# write for races.
GPU_MINUTES ?= 30
ON_GPU = timeout --kill-after=30 $(GPU_MINUTES)m
SANITIZED = $(PY) -m pytest -q tests/cuda/test_cuda_kernels.py tests/cuda/test_cuda_sm90.py \
  tests/cuda/test_cuda_sm90_varlen.py -k "not emulated and (test_shapes or test_every_kernel or test_decode)"

test-gpu: $(VENV)/installed.done
	ATTN_EXT_EMULATED=1 $(PY) -m pip install -q --no-build-isolation --no-deps -e .
	$(ON_GPU) $(PY) -m pytest -q tests/cuda/test_cuda_kernels.py tests/cuda/test_cuda_limits.py \
	  $(wildcard tests/cuda/test_cuda_sm90*.py) -k "not emulated"
	$(ON_GPU) $(PY) -m pytest -q tests/api/test_api.py tests/torch/test_torch_integration.py \
	  tests/api/test_backends_hypothesis.py -k cuda
	$(ON_GPU) $(PY) -m pytest -q tests/cuda/test_golden_bits.py tests/cuda/test_emulator_sm90.py
	ATTN_EXT_CUDA_SM90=1 $(ON_GPU) $(PY) -m pytest -q tests/cuda/test_cuda_kernels.py tests/api/test_api.py \
	  tests/api/test_backends_hypothesis.py -k "cuda and not emulated"  # the same on Hopper's kernels
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(ON_GPU) compute-sanitizer --tool memcheck --error-exitcode 1 $(SANITIZED)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(ON_GPU) compute-sanitizer --tool racecheck --error-exitcode 1 $(SANITIZED) \
	  || { status=$$?; test $$status -ne 124 -a $$status -ne 137 && echo "racecheck: $$status, read what it says above"; }
	$(ON_GPU) $(PY) bench/sm90.py || test $$? = 2  # speed; 2: not a Hopper GPU

clean:
	rm -rf build dist .venv .venv-latest .venv-oldest attn_ext/_*.so *.egg-info
