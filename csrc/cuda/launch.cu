// From a Problem to launches: the parameter block, the choice of kernel, the delta and sink
// kernels. The emulated build compiles this file as C++.
#include "launch.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "head_dims.h"
#include "sm80/backward_preprocess.cuh"
#include "sm80/combine.cuh"
#include "sm80/decode.cuh"
#include "sm80/kernels.h"
#include "sm90/kernels.h"

namespace attn::cuda {
namespace {

constexpr int64_t kLongest = int64_t(1) << 30;  // positions are int32, and sums of two of them

int padded_head_dim(const Problem& p) {
  const int64_t dim = std::max(p.head_dim, p.head_dim_v);
  for (int padded : kSm80HeadDims)
    if (dim <= padded) return padded;
  throw std::invalid_argument("head_dim must be at most 256 on cuda, got " + std::to_string(dim));
}

template <class T, int HEAD_DIM>
struct Pair {
  using Element = T;
  static constexpr int kHeadDim = HEAD_DIM;
};

template <class T, class Use>
void with_head_dim(int head_dim, const Use& use) {
  switch (head_dim) {
#define ATTN_CASE(dim) \
  case dim:            \
    return use(Pair<T, dim>());
    ATTN_SM80_HEAD_DIMS(ATTN_CASE)
#undef ATTN_CASE
  }
  throw std::invalid_argument("no kernel for head_dim " + std::to_string(head_dim));
}

// Calls use(Pair<T, HEAD_DIM>()) for the problem's pair.
template <class Use>
void with_pair(const Problem& p, const Use& use) {
  const int head_dim = padded_head_dim(p);
  switch (p.dtype) {
    case DType::kBFloat16:
      return with_head_dim<bf16>(head_dim, use);
    case DType::kFloat16:
      return with_head_dim<fp16>(head_dim, use);
    case DType::kFloat32:
      return with_head_dim<float>(head_dim, use);
    default:
      throw std::invalid_argument(
          "dtype must be bfloat16, float16 or float32 on cuda, got number " +
          std::to_string(int(p.dtype)));
  }
}

bool rows_are_vectors(const void* base, const Strides& s, int64_t dim, int bytes) {
  const auto fits = [&](int64_t elements) { return elements * bytes % 16 == 0; };
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && fits(s.b) && fits(s.h) && fits(s.s) &&
         fits(dim);
}

Terms<float> terms_of(const Problem& p, const Pointers& ptr) {
  return Terms<float>::of(p, ptr, 1.4426950408889634);
}

Params make_params(const Problem& p, const Pointers& ptr) {
  for (int64_t n : {p.seqlen_q, p.seqlen_k})
    if (n >= kLongest)
      throw std::invalid_argument("sequence lengths must be below 2^30 on cuda, got " +
                                  std::to_string(n));
  Params x{};
  x.p = p, x.ptr = ptr;
  x.terms = terms_of(p, ptr);
  x.scale = x.terms.scale, x.scale_log2 = x.terms.factor;
  x.keep_scale = p.dropout_p < 1 ? float(1 / (1 - p.dropout_p)) : 0.0f;
  x.keep_threshold = dropout_threshold(p.dropout_p);
  x.window_left = p.window_left < 0 ? -1 : int(std::min(p.window_left, kLongest));
  x.window_right = p.window_right < 0 ? -1 : int(std::min(p.window_right, kLongest));
  x.group = int(p.heads_q / p.heads_k);
  x.pack = x.splits = 1;
  const int bytes = p.dtype == DType::kFloat32 ? 4 : 2;
  x.q_vec = rows_are_vectors(ptr.q, p.q, p.head_dim, bytes);
  x.k_vec = rows_are_vectors(ptr.k, p.k, p.head_dim, bytes);
  x.v_vec = rows_are_vectors(ptr.v, p.v, p.head_dim_v, bytes);
  x.dout_vec = rows_are_vectors(ptr.dout, p.dout, p.head_dim_v, bytes);
  return x;
}

// What the plain kernels do not know.  They mask before they scale: the scale is above 0 as a
// float.
bool is_general(const Problem& p, const Pointers& ptr) {
  return ptr.mask || ptr.sink || ptr.entropy || ptr.block_table || p.dropout_p > 0 ||
         !terms_of(p, ptr).plain();
}

sm80::Plan plan(const Problem& p, const Pointers& ptr, const Target& target) {
  sm80::Plan result{1, 1, 1};
  with_pair(p, [&](auto pair) {
    using P = decltype(pair);
    using Tile = ForwardTile<typename P::Element, P::kHeadDim>;
    result = sm80::plan_forward(p, ptr.cu_seqlens_q != nullptr, Tile::BLOCK_M, Tile::BLOCK_N,
                                target.multiprocessors);
  });
  return result;
}

// Bytes of shared memory that a CTA may have.
int shared_memory(int device) {
#ifdef ATTN_EMULATED
  (void)device;
  return int(emulation::machine.mode.smem_limit);
#else
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDevAttr");
  return bytes;
#endif
}

#ifdef ATTN_EMULATED
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
#else
// The device of the call, for as long as the launches take.  Always set: a thread that has not used
// CUDA yet (an autograd worker) has no current context, which the driver's own functions need.  Not
// set back where nothing changed: that would make a context on a device nobody asked for.
struct DeviceGuard {
  int before = 0, device;
  explicit DeviceGuard(int wanted) : device(wanted) {
    check(cudaGetDevice(&before), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (before != device) cudaSetDevice(before);
  }
};
#endif

// The kernels of a call.
enum class Choice { SM90, SM80_PLAIN, SM80_GENERAL };

Choice choose_forward(const Problem& p, const Pointers& ptr, const sm80::Plan& cut,
                      const Target& target) {
  if (is_general(p, ptr) || cut.pack > 1 || cut.splits > 1) return Choice::SM80_GENERAL;
  return target.sm90 && sm90::forward_problem(p, ptr).empty() ? Choice::SM90 : Choice::SM80_PLAIN;
}

Choice choose_backward(const Problem& p, const Pointers& ptr, const Target& target) {
  if (is_general(p, ptr)) return Choice::SM80_GENERAL;
  return target.sm90 && sm90::backward_problem(p, ptr).empty() ? Choice::SM90 : Choice::SM80_PLAIN;
}

// delta, as LSE, and behind it, at a multiple of 128 bytes, the sums of dQ of a backward in one
// kernel.
int64_t delta_floats(const Problem& p, const Pointers& ptr) {
  // not lse_stride_h: torch may say anything of a single head
  const int64_t rows = p.heads_q * (ptr.cu_seqlens_q ? p.rows_q : p.batch * p.seqlen_q);
  return (rows + 31) / 32 * 32;
}
// Queries of a tile of the backward in one kernel of sm80, 0: that does not run.
int fused_queries(const Problem& p, const Pointers& ptr, const Target& target) {
  if (choose_backward(p, ptr, target) != Choice::SM80_PLAIN) return 0;
  return sm80::fused_queries(p, ptr, padded_head_dim(p), shared_memory(target.device));
}
int64_t sums_floats(const Problem& p, const Pointers& ptr, const Target& target) {
  if (choose_backward(p, ptr, target) == Choice::SM90) return sm90::query_sums(p, ptr);
  return fused_queries(p, ptr, target) ? p.heads_q * sum_tiles(p, ptr) * 64 * padded_head_dim(p)
                                       : 0;
}

const char* name(Choice choice) {
  switch (choice) {
    case Choice::SM90:
      return "sm90";
    case Choice::SM80_PLAIN:
      return "sm80 plain";
    default:
      return "sm80 general";
  }
}

void run_sm90(const Params& x, bool backward, void* stream) {
#ifdef ATTN_HAS_SM90
  const auto run_pair = [&](auto pair) {
    using P = decltype(pair);
    using T = typename P::Element;
    backward ? sm90::run_backward<T, P::kHeadDim>(x, stream)
             : sm90::run_forward<T, P::kHeadDim>(x, stream);
  };
  const auto run = [&](auto element) {
    using T = decltype(element);
    switch (sm90::kernel_head_dim(x.p)) {
#define ATTN_CASE(dim) \
  case dim:            \
    return run_pair(Pair<T, dim>());
      ATTN_SM90_HEAD_DIMS(ATTN_CASE)
#undef ATTN_CASE
    }
  };
  x.p.dtype == DType::kBFloat16 ? run(bf16{}) : run(fp16{});
#else
  (void)x, (void)backward, (void)stream;
  throw std::invalid_argument("this build has no kernels for sm_90a");
#endif
}

// One warp a row.
template <class T>
void run_rows(void (*kernel)(Params), const Params& x, void* stream) {
  const int64_t rows = x.p.batch * x.p.heads_q * x.p.seqlen_q;
  launch(kernel, sm80::grid_of((rows + 3) / 4), 128, 0, stream, x);
}

}  // namespace

int64_t forward_workspace(const Problem& p, const Pointers& ptr, const Target& target) {
  const int64_t splits = plan(p, ptr, target).splits;
  return splits > 1 ? splits * p.batch * p.heads_q * p.seqlen_q * (p.head_dim_v + 3) : 0;
}

int64_t backward_workspace(const Problem& p, const Pointers& ptr, const Target& target) {
  return delta_floats(p, ptr) + sums_floats(p, ptr, target);
}

void forward(const Problem& p, const Pointers& ptr, float* workspace, const Target& target) {
  if (p.batch == 0 || p.seqlen_q == 0) return;
  const DeviceGuard guard(target.device);
  Params x = make_params(p, ptr);
  const sm80::Plan cut = plan(p, ptr, target);
  x.pack = cut.pack, x.m_tiles = cut.m_tiles, x.splits = cut.splits;
  if (x.splits > 1) {
    x.partial_o = workspace;
    x.partial_stats = workspace + x.splits * p.batch * p.heads_q * p.seqlen_q * p.head_dim_v;
  }
  const Choice choice = choose_forward(p, ptr, cut, target);
  void* stream = reinterpret_cast<void*>(target.stream);
  if (choice == Choice::SM90) return run_sm90(x, false, stream);
  with_pair(p, [&](auto pair) {
    using P = decltype(pair);
    using T = typename P::Element;
    sm80::run_forward<T, P::kHeadDim>(x, choice == Choice::SM80_GENERAL, stream);
    if (x.splits > 1) run_rows<T>(sm80::combine<T>, x, stream);
  });
}

std::string forward_kernel(const Problem& p, const Pointers& ptr, const Target& target) {
  return name(choose_forward(p, ptr, plan(p, ptr, target), target));
}

std::string backward_kernel(const Problem& p, const Pointers& ptr, const Target& target) {
  return std::string(name(choose_backward(p, ptr, target))) +
         (fused_queries(p, ptr, target) ? " fused" : "");
}

void backward(const Problem& p, const Pointers& ptr, float* workspace, const Target& target) {
  if (p.batch == 0 || p.seqlen_q == 0 || p.seqlen_k == 0) return;
  const DeviceGuard guard(target.device);
  Params x = make_params(p, ptr);
  x.delta = workspace;
  if (sums_floats(p, ptr, target)) x.dq_sums = workspace + delta_floats(p, ptr);
  x.fused_block_m = fused_queries(p, ptr, target);
  void* stream = reinterpret_cast<void*>(target.stream);
  with_pair(p, [&](auto pair) {
    using P = decltype(pair);
    using T = typename P::Element;
    run_rows<T>(sm80::backward_delta<T>, x, stream);
    const Choice choice = choose_backward(p, ptr, target);
    if (choice == Choice::SM90) return run_sm90(x, true, stream);
    sm80::run_backward<T, P::kHeadDim>(x, choice == Choice::SM80_GENERAL, stream);
    if (ptr.dsink)
      launch(sm80::backward_sink<T>, sm80::grid_of(p.heads_q), sm80::kRowThreads,
             4 * sm80::kRowThreads, stream, x);
  });
}

#ifdef ATTN_EMULATED
std::string device_problem(int) { return ""; }
std::string sm90_problem(int) { return ""; }
std::string kernel_problem(int) { return ""; }
int multiprocessors(int) { return 6; }  // few, so that small tests split their keys
#else
namespace {

// Whether a build for ATTN_EXT_CUDA_ARCHS runs on compute capability major.minor: machine code does
// on its own major version from its minor on, "90a" on 9.0 alone, and the oldest plain architecture
// is there as PTX too, which the driver compiles for anything newer.
bool build_serves(int major, int minor) {
  const std::string archs = ATTN_EXT_CUDA_ARCHS ",";
  int oldest = 0;
  for (size_t begin = 0, end; (end = archs.find(',', begin)) != archs.npos; begin = end + 1) {
    const std::string arch = archs.substr(begin, end - begin);
    const int number = std::atoi(arch.c_str());
    const bool plain = arch.find_first_not_of("0123456789") == arch.npos;
    if (plain && number && (!oldest || number < oldest)) oldest = number;
    if (number / 10 == major && (plain ? number % 10 <= minor : number % 10 == minor)) return true;
  }
  return oldest && oldest <= 10 * major + minor;
}

}  // namespace

std::string device_problem(int device) {
  int count = 0, major = 0, minor = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (device >= count) return "no CUDA device " + std::to_string(device);
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDevAttr");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDevAttr");
  if (build_serves(major, minor)) return "";
  return "the device has compute capability " + std::to_string(major) + "." +
         std::to_string(minor) +
         ", the kernels are built for " ATTN_EXT_CUDA_ARCHS
         " (ATTN_EXT_CUDA_ARCHS) and need 8.0 or newer";
}

std::string sm90_problem(int device) {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDevAttr");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDevAttr");
  if (major != 9 || minor != 0) return "the device is no Hopper GPU (compute capability 9.0)";
#ifdef ATTN_HAS_SM90
  return "";
#else
  return "this build has no kernels for sm_90a (ATTN_EXT_CUDA_ARCHS)";
#endif
}

std::string kernel_problem(int device) {
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const auto kernel = reinterpret_cast<const void*>(sm80::backward_delta<bf16>);
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  cudaGetLastError();  // a missing kernel image is an answer, not an error of the next call
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

int multiprocessors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  return count;
}
#endif

}  // namespace attn::cuda
