// The emulated device as csrc/cuda/launch.h asks for it.
#include <algorithm>
#include <unordered_map>

#include "../cuda/features.h"
#include "../cuda/launch.h"
#include "../cuda/ptx_sm90.cuh"
#include "kernels.h"

namespace attn::emulation {
namespace {

std::unordered_map<std::string, Run>& kernels() {
  static auto* all = new std::unordered_map<std::string, Run>;  // used before main() begins
  return *all;
}

}  // namespace

void enlist(std::string name, Run run) { kernels()[std::move(name)] = std::move(run); }

// Kernels are enlisted for no features and for kAny, which serves any.
void Device::launch(const cuda::Launch& launch) {
  auto found = kernels().find(launch.kernel);
  if (found == kernels().end()) {
    const std::string stem = launch.kernel.substr(0, launch.kernel.rfind(", "));
    found = kernels().find(stem + ", " + std::to_string(cuda::kAny) + ">");
  }
  if (found == kernels().end()) throw Error("no kernel is called " + launch.kernel);
  found->second(launch);
}

ptx::TensorMap Device::tensor_map(const ptx::TensorSpec& spec) {
  return ptx::make_tensor_map(spec);
}

void Device::clear(int* words, int64_t count) { std::fill_n(words, count, 0); }

}  // namespace attn::emulation

namespace attn::cuda {

void on_device(const Target&, const std::function<void(Executor&)>& use) {
  emulation::Device device;
  use(device);
}
std::string device_problem(int) { return ""; }
std::string sm90_problem(int) { return ""; }
int multiprocessors(int) { return 6; }    // few, so that small tests split their keys
int l2_bytes(int) { return 256 * 1024; }  // little, so that small tests have several sections
int shared_memory(int) { return int(emulation::machine.mode.smem_limit); }

}  // namespace attn::cuda
