// From a Problem to launches: the parameter block, the choice of kernel, the delta and sink
// kernels.  Plain C++, the same for GPUs and for the emulator.
#include "launch.h"

#include <algorithm>
#include <stdexcept>

#include "far.h"
#include "head_dims.h"
#include "sm80/decode.h"
#include "sm80/launches.h"
#include "sm90/launches.h"

namespace attn::cuda {
namespace {

constexpr int64_t kLongest = int64_t(1) << 30;  // positions are int32, and sums of two of them
// Rows of all packed sequences, which are numbered by int32, and a tile behind the last of them.
constexpr int64_t kMostRows = (int64_t(1) << 31) - 1024;

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
  for (int64_t n : {p.rows_q, p.rows_k})
    if (n > kMostRows)
      throw std::invalid_argument(
          "packed sequences must have at most 2^31 - 1024 rows on cuda, got " + std::to_string(n));
  Params x{};
  x.p = p, x.ptr = ptr;
  x.terms = terms_of(p, ptr), x.natural = Terms<float>::of(p, ptr, 1.0);
  x.features = features_of(p, ptr);
  x.scale = x.terms.scale, x.scale_log2 = x.terms.factor;
  x.keep_scale = p.dropout_p < 1 ? float(1 / (1 - p.dropout_p)) : 0.0f;
  x.keep_threshold = dropout_threshold(p.dropout_p);
  x.window_left = p.window_left < 0 ? -1 : int(std::min(p.window_left, kLongest));
  x.window_right = p.window_right < 0 ? -1 : int(std::min(p.window_right, kLongest));
  x.group = int(p.heads_q / p.heads_k);
  x.pack = x.splits = 1;
  x.page = Divisor::of(int(std::min(p.page_size, kLongest)));  // a longer one holds all keys
  const int bytes = p.dtype == DType::kFloat32 ? 4 : 2;
  x.q_vec = rows_are_vectors(ptr.q, p.q, p.head_dim, bytes);
  x.k_vec = rows_are_vectors(ptr.k, p.k, p.head_dim, bytes);
  x.v_vec = rows_are_vectors(ptr.v, p.v, p.head_dim_v, bytes);
  x.dout_vec = rows_are_vectors(ptr.dout, p.dout, p.head_dim_v, bytes);
  return x;
}

sm80::Plan plan(const Problem& p, const Pointers& ptr, const Target& target) {
  sm80::Plan result{1, 1, 1};
  with_pair(p, [&](auto pair) {
    using P = decltype(pair);
    using Tile = ForwardTile<typename P::Element, P::kHeadDim>;
    result = sm80::plan_forward(p, ptr, Tile::BLOCK_M, Tile::BLOCK_N, target.multiprocessors);
  });
  return result;
}

// The kernels of a call.
enum class Choice { SM90, SM90_FEATURES, SM80_PLAIN, SM80_FEATURES, SM80_GENERAL };

bool is_sm90(Choice choice) { return choice == Choice::SM90 || choice == Choice::SM90_FEATURES; }

// Of a call that is not plain: pages and float32 have the kernels that know everything.
Choice with_features(const Problem& p, const Pointers& ptr) {
  const bool half = p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16;
  return half && !ptr.block_table ? Choice::SM80_FEATURES : Choice::SM80_GENERAL;
}

Choice choose_forward(const Problem& p, const Pointers& ptr, const sm80::Plan& cut,
                      const Target& target) {
  if (cut.pack > 1 || cut.splits > 1) return Choice::SM80_GENERAL;
  const bool features = features_of(p, ptr);
  if (target.sm90 && sm90::forward_problem(p, ptr).empty())
    return features ? Choice::SM90_FEATURES : Choice::SM90;
  if (sm80::few_queries(p)) return Choice::SM80_GENERAL;
  return features ? with_features(p, ptr) : Choice::SM80_PLAIN;
}

Choice choose_backward(const Problem& p, const Pointers& ptr, const Target& target) {
  if (target.sm90 && sm90::backward_problem(p, ptr).empty() &&
      sm90::backward_knows_features(p, ptr))
    return Choice::SM90;
  return features_of(p, ptr) ? with_features(p, ptr) : Choice::SM80_PLAIN;
}

// delta, as LSE, what is kept of far rows, and behind it, at a multiple of 128 bytes, the sums of
// dQ of a backward in one kernel.
int64_t delta_floats(const Problem& p, const Pointers& ptr) {
  if (p.part) return 0;  // a part is given its delta
  return row_floats(p, ptr) + far_floats(p, ptr, query_tiles(p, ptr, kMarkRows).all);
}
// The tile of the backward in one kernel of sm80, zeros where that does not run.
FusedShape fused_shape(const Problem& p, const Pointers& ptr, const Target& target) {
  const Choice choice = choose_backward(p, ptr, target);
  if (choice != Choice::SM80_PLAIN && choice != Choice::SM80_FEATURES) return {0, 0};
  return sm80::fused_shape(p, ptr, padded_head_dim(p), target.shared_memory);
}
int64_t sums_floats(const Problem& p, const Pointers& ptr, const Target& target) {
  if (choose_backward(p, ptr, target) == Choice::SM90) return sm90::query_sums(p, ptr);
  return fused_shape(p, ptr, target).block_m ? sum_tiles(p, ptr).all * 64 * padded_head_dim(p) : 0;
}

const char* name(Choice choice) {
  switch (choice) {
    case Choice::SM90:
      return "sm90";
    case Choice::SM90_FEATURES:
      return "sm90 features";
    case Choice::SM80_PLAIN:
      return "sm80 plain";
    case Choice::SM80_FEATURES:
      return "sm80 features";
    default:
      return "sm80 general";
  }
}

// use(Pair<T, HEAD_DIM>()) for a Hopper kernel of this HEAD_DIM.
template <class Use>
void with_sm90_pair(const Params& x, int head_dim, const Use& run_pair) {
  const auto run = [&](auto element) {
    using T = decltype(element);
    switch (head_dim) {
#define ATTN_CASE(dim) \
  case dim:            \
    return run_pair(Pair<T, dim>());
      ATTN_SM90_HEAD_DIMS(ATTN_CASE)
#undef ATTN_CASE
    }
  };
  x.p.dtype == DType::kBFloat16 ? run(bf16{}) : run(fp16{});
}
void run_sm90_forward(Executor& to, const Params& x, const sm90::ForwardPlace& place) {
  with_sm90_pair(x, sm90::kernel_head_dim(x.p), [&](auto pair) {
    using P = decltype(pair);
    sm90::run_forward<typename P::Element, P::kHeadDim>(to, x, place);
  });
}
void run_sm90_backward(Executor& to, const Params& x) {
  with_sm90_pair(x, sm90::backward_head_dim(x.p, x.ptr), [&](auto pair) {
    using P = decltype(pair);
    sm90::run_backward<typename P::Element, P::kHeadDim>(to, x);
  });
}

// As many warps as there are units of work.
void run_warps(Executor& to, std::string kernel, int64_t units, int smem, const Params& x) {
  launch(to, std::move(kernel), grid_of((units + 3) / 4), kRowThreads, smem, x);
}
// One warp a row of queries.
void run_rows(Executor& to, std::string kernel, Params x) {
  const TileCount rows = query_tiles(x.p, x.ptr, 1);
  x.m_tiles = rows.of_head;
  run_warps(to, std::move(kernel), rows.all, 0, x);
}

// What the other kernels have left out of rows whose LSE is far from 0.
template <class T>
void run_far_rows(Executor& to, Params x) {
  const Problem& p = x.p;
  const TileCount marks = query_tiles(p, x.ptr, kMarkRows), keys = key_tiles(p, x.ptr, kFarKeys);
  x.m_tiles = marks.of_head, x.n_tiles = keys.of_head;
  run_warps(to, kernel_name<T>("sm80::backward_far_queries"), marks.all, kFarSmem, x);
  if (x.ptr.dk || x.ptr.dv)
    run_warps(to, kernel_name<T>("sm80::backward_far_keys"), keys.all, kFarSmem, x);
  if (!x.ptr.dbias) return;
  const ScoreStrides& s = p.dbias;
  run_warps(to, kernel_name<T>("sm80::backward_far_bias"),
            (s.b ? p.batch : 1) * (s.h ? p.heads_q : 1) *
                (s.q ? (p.seqlen_q + kMarkRows - 1) / kMarkRows : 1) *
                (s.k ? (p.seqlen_k + 31) / 32 : 1),
            kFarSmem, x);
}

}  // namespace

int64_t forward_workspace(const Problem& p, const Pointers& ptr, const Target& target) {
  const sm80::Plan cut = plan(p, ptr, target);
  if (is_sm90(choose_forward(p, ptr, cut, target)))
    return sm90::forward_workspace(p, ptr, target.multiprocessors);
  const int64_t splits = cut.splits;
  return splits > 1 ? splits * p.batch * p.heads_q * p.seqlen_q * (p.head_dim_v + 3) : 0;
}

int64_t backward_workspace(const Problem& p, const Pointers& ptr, const Target& target) {
  return delta_floats(p, ptr) + sums_floats(p, ptr, target);
}

void forward(const Problem& p, const Pointers& ptr, float* workspace, const Target& target,
             Executor& to) {
  if (p.batch == 0 || p.seqlen_q == 0) return;
  Params x = make_params(p, ptr);
  const sm80::Plan cut = plan(p, ptr, target);
  x.pack = cut.pack, x.m_tiles = cut.m_tiles, x.splits = cut.splits;
  if (x.pack > 1) x.packed = Divisor::of(int(p.seqlen_q));
  if (x.splits > 1) {
    x.partial_o = workspace;
    x.partial_stats = workspace + x.splits * p.batch * p.heads_q * p.seqlen_q * p.head_dim_v;
  }
  const Choice choice = choose_forward(p, ptr, cut, target);
  if (is_sm90(choice)) {
    int* counter = sm90::forward_workspace(p, ptr, target.multiprocessors)
                       ? reinterpret_cast<int*>(workspace)
                       : nullptr;
    return run_sm90_forward(to, x, {target.multiprocessors, target.l2_bytes, counter});
  }
  with_pair(p, [&](auto pair) {
    using P = decltype(pair);
    using T = typename P::Element;
    if constexpr (kIsHalf<T>)
      if (choice == Choice::SM80_FEATURES) return sm80::run_features<T, P::kHeadDim>(to, x);
    sm80::run_forward<T, P::kHeadDim>(to, x, choice == Choice::SM80_GENERAL);
    if (x.splits > 1)
      run_rows(to, p.part ? kernel_name<float>("sm80::combine") : kernel_name<T>("sm80::combine"),
               x);
  });
}

std::string forward_kernel(const Problem& p, const Pointers& ptr, const Target& target) {
  return name(choose_forward(p, ptr, plan(p, ptr, target), target));
}

std::string backward_kernel(const Problem& p, const Pointers& ptr, const Target& target) {
  return std::string(name(choose_backward(p, ptr, target))) +
         (fused_shape(p, ptr, target).block_m ? " fused" : "");
}

void backward(const Problem& p, const Pointers& ptr, float* workspace, const Target& target,
              Executor& to) {
  if (p.batch == 0 || p.seqlen_q == 0 || p.seqlen_k == 0) return;
  Params x = make_params(p, ptr);
  x.delta = workspace;
  if (sums_floats(p, ptr, target)) x.dq_sums = workspace + delta_floats(p, ptr);
  const FusedShape shape = fused_shape(p, ptr, target);
  x.fused_block_m = int16_t(shape.block_m), x.fused_block_n = int16_t(shape.block_n);
  with_pair(p, [&](auto pair) {
    using P = decltype(pair);
    using T = typename P::Element;
    if (p.part) {  // with delta, and without far rows
      x.delta = static_cast<float*>(const_cast<void*>(ptr.dlse));
      return sm80::run_backward<T, P::kHeadDim>(
          to, x, choose_backward(p, ptr, target) != Choice::SM80_PLAIN);
    }
    run_rows(to, kernel_name<T>("sm80::backward_delta"), x);
    Params near = x;
    near.ptr.lse = FarRows::of(p, ptr, x.delta).near_lse;
    const Choice choice = choose_backward(p, ptr, target);
    if (choice == Choice::SM90) {
      if (ptr.dbias && !(sm90::backward_features(p, ptr) & kBiasGradient))
        sm80::run_bias_gradient<T, P::kHeadDim>(to, near);
      run_sm90_backward(to, near);
    } else {
      sm80::run_backward<T, P::kHeadDim>(to, near, choice != Choice::SM80_PLAIN);
    }
    run_far_rows<T>(to, x);
    if (ptr.dsink)
      launch(to, kernel_name<T>("sm80::backward_sink"), grid_of(p.heads_q), kRowThreads,
             4 * kRowThreads, x);
  });
}

}  // namespace attn::cuda
