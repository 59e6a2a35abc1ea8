#!/usr/bin/env bash
# The kernels of avx512 and avx512_bf16 on a machine that has AVX2 only: csrc/tests/against_naive.cpp with the
# intrinsics of csrc/tests/avx512_stand_in.h, some two CPU minutes to compile.  On a machine with AVX-512 itself the
# whole suite runs them.  tests/cpu/avx512.sh PYTHON_ARGS... runs Python on a copy of the package with these kernels
# instead, as in `tests/cpu/avx512.sh tests/helpers/cpu_bits.py after.json` or `tests/cpu/avx512.sh -m pytest -q tests/cpu/test_kernels.py`.
set -euo pipefail
cd "$(dirname "$0")/../.."
stand_in="-include $PWD/csrc/tests/avx512_stand_in.h -Wno-psabi"
if [ "$(uname -m)" != x86_64 ] || ! grep -qw avx2 /proc/cpuinfo; then
  echo "no AVX2 here: the kernels for AVX-512 are not tested"
  exit 0
fi
if [ $# -gt 0 ]; then
  copy=build/avx512
  mkdir -p $copy
  cp -r attn_ext triton_kernels csrc setup.py pyproject.toml README.md LICENSE tests $copy
  rm -f $copy/attn_ext/_C*.so
  (cd $copy && ATTN_EXT_CXXFLAGS="-O1 $stand_in" ../../.venv/bin/python setup.py -q build_ext --inplace)
  ATTN_EXT_CXXFLAGS="-O1 $stand_in" PYTHONPATH=$PWD/$copy PYTHONSAFEPATH=1 exec .venv/bin/python "$@"
fi
if grep -qw avx512f /proc/cpuinfo; then
  echo "this machine has AVX-512: make test runs its kernels themselves"
  exit 0
fi
mkdir -p build/avx512-naive
for source in csrc/tests/against_naive.cpp $(find csrc/cpu -name '*.cpp'); do
  echo "build/avx512-naive/$(basename "$source" .cpp).o: $source"
done | xargs -P 2 -I{} sh -c 'line="{}"; ${CXX:-c++} -std=c++17 -O1 -pthread -w -ffp-contract=fast \
  '"$stand_in"' -Icsrc -c "${line#*: }" -o "${line%%:*}"'
${CXX:-c++} -pthread build/avx512-naive/*.o -o build/avx512-naive/against_naive
for isa in avx512 avx512_bf16; do
  ATTN_EXT_ISA=$isa build/avx512-naive/against_naive | sed "s/^/$isa by stand-ins: /"
done
