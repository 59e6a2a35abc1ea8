// All Hopper kernels of one (dtype, HEAD_DIM) pair, as in ../sm80/kernels.cuh; for sm_90a only.
#pragma once
#include "../launches.h"
#include "backward_dq.cuh"
#include "backward_dq_features.cuh"
#include "backward_features.cuh"
#include "forward_features.cuh"

namespace attn::cuda::sm90 {

template <class T, int HEAD_DIM, int VALUE_DIM, class Use>
void each_forward_of(const Use& use) {
  use(kernel_name<T>("sm90::forward", HEAD_DIM, VALUE_DIM), forward<T, HEAD_DIM, VALUE_DIM>);
  use(kernel_name<T>("sm90::forward_features", HEAD_DIM, VALUE_DIM, int(kAny)),
      forward_features<T, HEAD_DIM, VALUE_DIM, kAny>);
}
template <class T, int HEAD_DIM, class Use>
void each_forward(const Use& use) {
  each_forward_of<T, HEAD_DIM, HEAD_DIM>(use);
  constexpr int NARROW = forward_value_dim(HEAD_DIM, 1);
  if constexpr (NARROW < HEAD_DIM) each_forward_of<T, HEAD_DIM, NARROW>(use);
}

template <class T, int HEAD_DIM, class Use>
void each_backward(const Use& use) {
  use(kernel_name<T>("sm90::backward_dq", HEAD_DIM), backward_dq<T, HEAD_DIM>);
  use(kernel_name<T>("sm90::backward_dkdv", HEAD_DIM), backward_dkdv<T, HEAD_DIM>);
  if constexpr (HEAD_DIM <= 128) {
    use(kernel_name<T>("sm90::clear_dq", HEAD_DIM), clear_dq<T, HEAD_DIM>);
    use(kernel_name<T>("sm90::convert_dq", HEAD_DIM), convert_dq<T, HEAD_DIM>);
    use(kernel_name<T>("sm90::backward_fused", HEAD_DIM), backward_fused<T, HEAD_DIM>);
    use(kernel_name<T>("sm90::backward_features", HEAD_DIM, kAny),
        backward_features<T, HEAD_DIM, kAny>);
    use(kernel_name<T>("sm90::convert_dq_features", HEAD_DIM, kAny),
        convert_dq_features<T, HEAD_DIM, kAny>);
  } else {
    use(kernel_name<T>("sm90::backward_dq_features", HEAD_DIM, kAny),
        backward_dq_features<T, HEAD_DIM, kAny>);
    use(kernel_name<T>("sm90::backward_dkdv_features", HEAD_DIM, kAny),
        backward_dkdv_features<T, HEAD_DIM, kAny>);
  }
}

}  // namespace attn::cuda::sm90
