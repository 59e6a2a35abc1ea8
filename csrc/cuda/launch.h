// What the bindings call: one function an operation.  Plain C++.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

#include "../params.h"
#include "launches.h"

namespace attn::cuda {

// Where a call runs.  stream: a CUstream as an integer, 0 = the default stream.
struct Target {
  int device = 0;
  uintptr_t stream = 0;
  int multiprocessors = 1;
  bool sm90 = false;      // the Hopper kernels may serve what they can
  int shared_memory = 0;  // bytes that a CTA may have
  int l2_bytes = 0;       // of the L2 cache, asked for where Hopper kernels may serve
};

// Scratch that the caller allocates on the device, in floats.
int64_t forward_workspace(const Problem& p, const Pointers& ptr, const Target& target);
int64_t backward_workspace(const Problem& p, const Pointers& ptr, const Target& target);

// Asynchronous.  std::invalid_argument for a problem that no kernel serves, std::runtime_error with
// the driver's text for a launch that fails.
void forward(const Problem& p, const Pointers& ptr, float* workspace, const Target& target,
             Executor& to);
void backward(const Problem& p, const Pointers& ptr, float* workspace, const Target& target,
              Executor& to);

// The kernel that forward launches: "sm90", "sm80 plain", "sm80 features" or "sm80
// general".
std::string forward_kernel(const Problem& p, const Pointers& ptr, const Target& target);
// The same of backward; "sm80 plain fused": all in one kernel.
std::string backward_kernel(const Problem& p, const Pointers& ptr, const Target& target);

// ---- devices: driver.cpp for GPUs, ../emulation/device.cpp for tests
// ------------------------------ Calls use(executor) with the device of the target current in this
// thread.
void on_device(const Target& target, const std::function<void(Executor&)>& use);
// "" when kernels run on `device`, else the reason.  Makes no context on it.
std::string device_problem(int device);
int multiprocessors(int device);
int shared_memory(int device);  // bytes that a CTA may have
int l2_bytes(int device);
// "" when `device` is a Hopper GPU (9.0), else the reason.
std::string sm90_problem(int device);

}  // namespace attn::cuda
