// What the bindings call: one function an operation, on one device and stream.  No CUDA headers, so
// that the bindings are compiled by the host compiler alone.
#pragma once
#include <cstdint>
#include <string>

#include "../params.h"

namespace attn::cuda {

// Where a call runs.  stream: a cudaStream_t as an integer, 0 = the default stream.
struct Target {
  int device = 0;
  uintptr_t stream = 0;
  int multiprocessors = 1;
  bool sm90 = false;  // the Hopper kernels may serve what they can
};

// Scratch that the caller allocates on the device, in floats.
int64_t forward_workspace(const Problem& p, const Pointers& ptr, const Target& target);
int64_t backward_workspace(const Problem& p, const Pointers& ptr, const Target& target);

// Asynchronous.  std::invalid_argument for a problem that no kernel serves, std::runtime_error with
// CUDA's text for a launch that fails.
void forward(const Problem& p, const Pointers& ptr, float* workspace, const Target& target);
void backward(const Problem& p, const Pointers& ptr, float* workspace, const Target& target);

// "" when this build has kernels for `device`, else the reason.  Makes no context on it.
std::string device_problem(int device);
// "" when the driver loads a kernel of this build on `device`, else CUDA's text.
std::string kernel_problem(int device);
int multiprocessors(int device);
// "" when this build has Hopper kernels and `device` is one (9.0), else the reason.
std::string sm90_problem(int device);
// The kernel that forward launches: "sm90", "sm80 plain" or "sm80 general".
std::string forward_kernel(const Problem& p, const Pointers& ptr, const Target& target);
// The same of backward; "sm80 plain fused": all in one kernel.
std::string backward_kernel(const Problem& p, const Pointers& ptr, const Target& target);

}  // namespace attn::cuda
