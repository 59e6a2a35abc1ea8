#!/usr/bin/env bash
# Build csrc/tests/threads.cpp with the kernels under ThreadSanitizer and run it on each ISA of this machine.
set -euo pipefail
cd "$(dirname "$0")/../.."
rm -rf build/tsan  # objects of sources that are gone would be linked
mkdir -p build/tsan
for source in csrc/tests/threads.cpp $(find csrc/cpu -name '*.cpp'); do
  echo "build/tsan/$(basename "$source" .cpp).o $source"
done | xargs -P 2 -L 1 sh -c '${CXX:-c++} -std=c++17 -O1 -g1 -pthread -fsanitize=thread -ffp-contract=fast -Wno-psabi \
  -Icsrc -c "$2" -o "$1"' compile
${CXX:-c++} -pthread -fsanitize=thread build/tsan/*.o -o build/tsan/threads
# die_after_fork: the child of a threaded process may start threads again, which is what is tested here.
export TSAN_OPTIONS="halt_on_error=1 die_after_fork=0"
for isa in baseline $(grep -o -m1 -w avx2 /proc/cpuinfo || true) $(grep -q -w avx512vl /proc/cpuinfo && echo avx512 || true); do
  ATTN_EXT_ISA=$isa build/tsan/threads | sed "s/^/$isa: /"
done
