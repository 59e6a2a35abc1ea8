#!/usr/bin/env bash
# tests/cpu/sanitize.sh SANITIZERS PYTEST_ARGS...: build a copy of the extension with -fsanitize=SANITIZERS and test that copy.
set -euo pipefail
cd "$(dirname "$0")/../.."
kinds=$1
shift
copy=build/sanitize-${kinds//,/-}
mkdir -p "$copy"
cp -r attn_ext triton_kernels csrc setup.py pyproject.toml README.md LICENSE tests "$copy"
rm -f "$copy"/attn_ext/_C*.so
export ATTN_EXT_CXXFLAGS="-O1 -g1 -fno-omit-frame-pointer -fsanitize=$kinds -fno-sanitize-recover=all"
python=$PWD/.venv/bin/python
cd "$copy"
"$python" setup.py -q build_ext --inplace
# libstdc++ goes along: ASan looks __cxa_throw up at start-up, when Python has not loaded libstdc++ yet, and would
# abort at the first C++ exception.  -s: a report that pytest captures dies with the process.
preload="$(${CXX:-c++} -print-file-name=libasan.so) $(${CXX:-c++} -print-file-name=libstdc++.so.6)"
# Leaks of the interpreter itself are not ours; torch's own libraries are not instrumented.
# PYTHONPATH puts the copy before the editable install.
OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$preload" PYTHONPATH=$PWD PYTHONSAFEPATH=1 \
  "$python" -m pytest -q -s -n 2 -p no:cacheprovider "$@"
