#!/usr/bin/env bash
# Build the CPU kernels for aarch64 with csrc/tests/against_naive.cpp and run that under qemu; on an aarch64 machine
# natively.  Skips with a line where the cross compiler or qemu is missing (Debian: g++-aarch64-linux-gnu,
# qemu-user-static).
set -euo pipefail
cd "$(dirname "$0")/../.."
compiler=aarch64-linux-gnu-g++ run=qemu-aarch64-static
[ "$(uname -m)" != aarch64 ] || compiler=${CXX:-c++} run=
for tool in $compiler $run; do
  command -v $tool > /dev/null || { echo "no $tool here: the aarch64 kernels are not tested"; exit 0; }
done
# g++ 12 for aarch64 warns of the 2^62nd element of a row
flags="-std=c++17 -O2 -pthread -Wall -Wextra -Werror -Wno-psabi -Wno-aggressive-loop-optimizations -ffp-contract=fast"
mkdir -p build/aarch64
objects=()
pids=()
for source in csrc/tests/against_naive.cpp $(find csrc/cpu -name "*.cpp"); do
  object=build/aarch64/$(basename "$source" .cpp).o
  objects+=("$object")
  $compiler $flags -Icsrc -c "$source" -o "$object" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
$compiler -static -pthread "${objects[@]}" -o build/aarch64/against_naive
$run build/aarch64/against_naive | sed "s/^/aarch64: /"  # pipefail: what is wrong fails here
