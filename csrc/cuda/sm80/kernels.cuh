// All kernels of one (dtype, HEAD_DIM) pair, by the names that launches.h gives them: for compilers
// that see kernels as functions, which is g++ for the emulator: without features and for kAny.  The
// product compiles each kernel by its name, for the features of a call
// (attn_ext/backends/jit).
#pragma once
#include "../launches.h"
#include "backward.cuh"
#include "backward_bias.cuh"
#include "backward_far.cuh"
#include "backward_fused.cuh"
#include "backward_plain.cuh"
#include "backward_preprocess.cuh"
#include "combine.cuh"
#include "forward.cuh"
#include "forward_features.cuh"
#include "forward_plain.cuh"

namespace attn::cuda::sm80 {

// use(name, function) for each.
template <class T, int HEAD_DIM, class Use>
void each_forward(const Use& use) {
  if constexpr (kIsHalf<T>) {
    use(kernel_name<T>("sm80::forward_plain", HEAD_DIM), forward_plain<T, HEAD_DIM>);
    use(kernel_name<T>("sm80::forward_features", HEAD_DIM, int(kAny)),
        forward_features<T, HEAD_DIM, kAny>);
  }
  use(kernel_name<T>("sm80::forward_general", HEAD_DIM, int(kAny)),
      forward_general<T, HEAD_DIM, kAny>);
  if constexpr (kHasDecodeTile<T, HEAD_DIM>) {
    use(kernel_name<T>("sm80::forward_decode", HEAD_DIM, 0), forward_decode<T, HEAD_DIM, 0>);
    use(kernel_name<T>("sm80::forward_decode", HEAD_DIM, int(kPaged)),
        forward_decode<T, HEAD_DIM, kPaged>);
    use(kernel_name<T>("sm80::forward_decode", HEAD_DIM, int(kAny)),
        forward_decode<T, HEAD_DIM, kAny>);
  }
}

template <class T, int HEAD_DIM, int BLOCK_M, class Use>
void each_fused(const Use& use) {
  use(kernel_name<T>("sm80::backward_fused", HEAD_DIM, BLOCK_M),
      backward_fused<T, HEAD_DIM, BLOCK_M>);
}

template <class T, int HEAD_DIM, class Use>
void each_backward(const Use& use) {
  if constexpr (kIsHalf<T> && HEAD_DIM <= 128) {
    use(kernel_name<T>("sm80::backward_dq_plain", HEAD_DIM), backward_dq_plain<T, HEAD_DIM>);
    use(kernel_name<T>("sm80::backward_dkdv_plain", HEAD_DIM), backward_dkdv_plain<T, HEAD_DIM>);
  } else if constexpr (kIsHalf<T>) {
    use(kernel_name<T>("sm80::backward_dq", HEAD_DIM, 0), backward_dq<T, HEAD_DIM, 0>);
    use(kernel_name<T>("sm80::backward_dkdv", HEAD_DIM, 0), backward_dkdv<T, HEAD_DIM, 0>);
  }
  use(kernel_name<T>("sm80::backward_dq", HEAD_DIM, int(kAny)), backward_dq<T, HEAD_DIM, kAny>);
  use(kernel_name<T>("sm80::backward_dkdv", HEAD_DIM, int(kAny)), backward_dkdv<T, HEAD_DIM, kAny>);
  use(kernel_name<T>("sm80::backward_bias", HEAD_DIM, int(kAny)), backward_bias<T, HEAD_DIM, kAny>);
  if constexpr (kIsHalf<T> && HEAD_DIM <= 128) {
    use(kernel_name<T>("sm80::clear_dq", HEAD_DIM), clear_dq<T, HEAD_DIM>);
    use(kernel_name<T>("sm80::convert_dq", HEAD_DIM), convert_dq<T, HEAD_DIM>);
    each_fused<T, HEAD_DIM, 64>(use);
    use(kernel_name<T>("sm80::backward_features", HEAD_DIM, int(kAny)),
        backward_features<T, HEAD_DIM, kAny>);
    use(kernel_name<T>("sm80::convert_dq_features", HEAD_DIM, int(kAny)),
        convert_dq_features<T, HEAD_DIM, kAny>);
    if constexpr (HEAD_DIM == 64) each_fused<T, HEAD_DIM, 128>(use);
    if constexpr (kHasHalfTile(HEAD_DIM)) {
      use(kernel_name<T>("sm80::backward_fused_half", HEAD_DIM), backward_fused_half<T, HEAD_DIM>);
      use(kernel_name<T>("sm80::backward_features_half", HEAD_DIM, int(kAny)),
          backward_features_half<T, HEAD_DIM, kAny>);
    }
  }
}

// Those that serve every head dimension.
template <class T, class Use>
void each_other(const Use& use) {
  use(kernel_name<T>("sm80::combine"), combine<T>);
  use(kernel_name<T>("sm80::backward_delta"), backward_delta<T>);
  use(kernel_name<T>("sm80::backward_sink"), backward_sink<T>);
  use(kernel_name<T>("sm80::backward_far_queries"), backward_far_queries<T>);
  use(kernel_name<T>("sm80::backward_far_keys"), backward_far_keys<T>);
  use(kernel_name<T>("sm80::backward_far_bias"), backward_far_bias<T>);
}

}  // namespace attn::cuda::sm80
