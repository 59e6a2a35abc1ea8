// What the host says of a launch, the same for a GPU's driver, for the emulator and for a mere list
// of what a call needs: the kernel's name in C++, the grid, shared memory, and the parameter block.
// Plain C++; nothing here knows a kernel's code.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "ptx_types.h"

namespace attn::cuda {

struct Launch {
  std::string kernel;  // as C++ names it: attn::cuda::sm80::combine<float>
  ptx::Grid grid;
  int threads, smem_bytes;
  const void* params;  // what the kernel takes, by value; copied before launch() returns
  size_t params_bytes;
};

// What launches go to, in order, on one device and stream.
class Executor {
 public:
  virtual ~Executor() = default;
  virtual void launch(const Launch& launch) = 0;
  // What the copy engine of sm_90 takes for a tensor.
  virtual ptx::TensorMap tensor_map(const ptx::TensorSpec& spec) = 0;
  // Zeros for what is launched next.
  virtual void clear(int* words, int64_t count) = 0;
};

template <class P>
void launch(Executor& to, std::string kernel, ptx::Grid grid, int threads, int smem_bytes,
            const P& params) {
  static_assert(std::is_trivially_copyable_v<P>);
  to.launch({std::move(kernel), grid, threads, smem_bytes, &params, sizeof(P)});
}

template <class T>
constexpr const char* kElement = "float";
template <>
inline constexpr const char* kElement<ptx::bf16> = "attn::ptx::bf16";
template <>
inline constexpr const char* kElement<ptx::fp16> = "attn::ptx::fp16";

// kernel_name<bf16>("sm80::forward_plain", 64) is attn::cuda::sm80::forward_plain<attn::ptx::bf16,
// 64>, to the letter as a demangler writes it.
inline std::string argument(int value) { return std::to_string(value); }
inline std::string argument(bool value) { return value ? "true" : "false"; }
template <class T, class... Arguments>
std::string kernel_name(const char* stem, Arguments... arguments) {
  std::string name = std::string("attn::cuda::") + stem + "<" + kElement<T>;
  for (const std::string& each : std::initializer_list<std::string>{argument(arguments)...})
    name += ", " + each;
  return name + ">";
}

inline ptx::Grid grid_of(int64_t blocks) {
  if (blocks > 2147483647)
    throw std::invalid_argument("the call needs " + std::to_string(blocks) +
                                " blocks, more than a CUDA grid holds (2^31 - 1)");
  return {int(blocks), 1, 1};
}

}  // namespace attn::cuda
