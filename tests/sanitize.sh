#!/usr/bin/env bash
# tests/sanitize.sh SANITIZERS PYTEST_ARGS...: build a copy of the extension with -fsanitize=SANITIZERS and test that copy.
set -euo pipefail
cd "$(dirname "$0")/.."
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
libasan=$(${CXX:-c++} -print-file-name=libasan.so)
# Leaks of the interpreter itself are not ours; torch's own libraries are not instrumented.
# PYTHONPATH puts the copy before the editable install.
OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD=$libasan PYTHONPATH=$PWD PYTHONSAFEPATH=1 \
  "$python" -m pytest -q -n 2 -p no:cacheprovider "$@"
