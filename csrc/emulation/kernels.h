// The kernels of csrc/cuda that are linked in, by the names that launches give
// (csrc/cuda/launches.h), and what launches go to.
#pragma once
#include <functional>
#include <string>
#include <utility>

#include "../cuda/launches.h"
#include "../cuda/ptx.cuh"

namespace attn::emulation {

using Run = std::function<void(const cuda::Launch&)>;
// Enlists a kernel, mostly before main().
void enlist(std::string name, Run run);

// What each_forward() and the others of csrc/cuda/sm80/kernels.cuh are called with.
struct Enlist {
  template <class P>
  void operator()(std::string name, void (*kernel)(P)) const {
    enlist(std::move(name), [kernel](const cuda::Launch& x) {
      ptx::launch(kernel, x.grid, x.threads, x.smem_bytes, nullptr,
                  *static_cast<const P*>(x.params));
    });
  }
};

class Device : public cuda::Executor {
 public:
  void launch(const cuda::Launch& launch) override;
  ptx::TensorMap tensor_map(const ptx::TensorSpec& spec) override;
  void clear(int* words, int64_t count) override;
};

}  // namespace attn::emulation
