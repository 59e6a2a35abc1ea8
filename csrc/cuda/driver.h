// NVIDIA's driver, libcuda, opened when it is first asked for and never linked: a machine without a
// GPU imports the same build.  Kernels are compiled by a function that Python gives, each once a
// device, and stay loaded until the process ends.
#pragma once
#include <functional>
#include <string>

#include "launch.h"

namespace attn::cuda::driver {

// A compiled kernel: the name of its symbol, machine code.
struct Image {
  std::string symbol, cubin;
};
// (kernel as C++ names it, 10 * major + minor of the device).  Called without any lock held, by
// several threads at a time.
using Compile = std::function<Image(const std::string& kernel, int capability)>;
void set_compile(Compile compile);

// CUDA's version that the driver knows, 1000 * major + 10 * minor; 0: problem() says why not.
int version();
// "" where the driver is there, else the reason.
std::string problem();
int capability(int device);  // 10 * major + minor
// For tests: the library at `path` is the driver, and nothing of an earlier one is kept.
void open(const std::string& path);

}  // namespace attn::cuda::driver
