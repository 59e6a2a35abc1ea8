// Online softmax (FlashAttention-2, Dao 2023) on fragments: a thread owns 2 rows, g and g + 8 of
// its warp's 16, and shares each with the 3 other lanes of its quad (mma.cuh).  Logits are in units
// of log2(e) once multiplied by `scale`.
#pragma once
#include "mma.cuh"

namespace attn::cuda {

ATTN_DEVICE float quad_max(float x) {
  x = fmaxf(x, shfl_xor(x, 1));
  return fmaxf(x, shfl_xor(x, 2));
}
ATTN_DEVICE float quad_sum(float x) {
  x += shfl_xor(x, 1);
  return x + shfl_xor(x, 2);
}

// The running state of a thread's 2 rows; sums are over the thread's own columns until finish().
struct RowState {
  float max[2] = {-kInf, -kInf};  // largest logit, unscaled; NaN is passed over (the sum has it)
  float sum[2] = {0, 0};          // of exp(s - max)
  float weighted[2] = {0, 0};     // of exp(s - max) (s - max), for the entropy
};

constexpr float kLargestFused = 16777216.0f;  // half a unit in its last place is 1
// Whether a base of exponentials, in units of log2(e), is rounded by so much that it counts.
ATTN_DEVICE bool rounds_away(float base) {
  return fabsf(base) > kLargestFused && fabsf(base) < kInf;
}

// A row whose largest logit is a bias of 2^29 or more, of either sign, keeps natural units: times
// log2(e) such a base would be rounded by more than P can hold, or be the -inf that excludes.
// Without that it is exact, and since logits of this size are 64 or more apart, all that differ
// from the largest have no weight beside it, be it a power of e or of 2.
ATTN_DEVICE bool is_far_logit(float top) { return fabsf(top) >= 536870912.0f && top < kInf; }
// The base of such a row in units of log2(e), as finish_row takes it.
ATTN_DEVICE float far_base(float top) { return hold(top) * kLog2e; }

// True in the whole warp when a row's logits are so large that the rounding of the maximum, which
// the multiply-adds of online_softmax do not share, counts in an exponent (repair.cuh).
ATTN_DEVICE bool warp_finds_huge(const RowState& state, float scale) {
  if (!repairs()) return false;
  bool huge = false;
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r) {
    huge |= rounds_away(state.max[r] * scale);
  }
  return ballot(huge) != 0;
}

// A row's sums from its maximum to `top`, which is at least as large.
struct Moved {
  float base, alpha;  // of the exponentials; what the row of acc is to be multiplied by
};
template <bool STATS>
ATTN_DEVICE Moved move_base(RowState& state, int r, float top, float scale, bool stats) {
  const float before = state.max[r];
  const float base = top == -kInf ? 0.0f : top * scale;              // -inf - -inf would be NaN
  const float shift = before == top ? 0.0f : before * scale - base;  // -inf may stay, too
  const float alpha = exp2_approx(shift);
  state.max[r] = top;
  if (STATS && stats)
    state.weighted[r] = alpha * (state.weighted[r] + fmaxf(shift, -kFar) * state.sum[r]);
  state.sum[r] *= alpha;
  return {base, alpha};
}

// Row r of acc, moved to another base.  FORGETS: where nothing is left of it (alpha underflows), 0,
// whatever it was: 0 * inf would be NaN.
template <bool FORGETS, int ACC>
ATTN_DEVICE void rescale_row(float (&acc)[ACC][4], int r, float alpha) {
  ATTN_UNROLL
  for (int n = 0; n < ACC; ++n) ATTN_UNROLL
  for (int c = 2 * r; c < 2 * r + 2; ++c)
    acc[n][c] = FORGETS && alpha == 0.0f ? 0.0f : acc[n][c] * alpha;
}

// S: logits in, exp2(scale * (S - max)) out; rescales acc to the new maxima.  FORGETS: for kernels
// that compute no rows of NaN once more; there acc is left alone where no maximum of the warp
// moved.
template <bool STATS, bool FORGETS = false, int TILES, int ACC>
ATTN_DEVICE void online_softmax(float (&S)[TILES][4], float (&acc)[ACC][4], RowState& state,
                                float scale, bool stats) {
  float alphas[2];
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r) {
    float top = state.max[r];
    ATTN_UNROLL
    for (int n = 0; n < TILES; ++n) top = fmaxf(top, fmaxf(S[n][2 * r], S[n][2 * r + 1]));
    top = quad_max(top);
    const auto [base, alpha] = move_base<STATS>(state, r, top, scale, stats);
    float sum = state.sum[r];
    ATTN_UNROLL
    for (int n = 0; n < TILES; ++n) {
      ATTN_UNROLL
      for (int c = 2 * r; c < 2 * r + 2; ++c) {
        const float x = fmaf(S[n][c], scale, -base), e = exp2_approx(x);
        if (STATS && stats) state.weighted[r] += x == -kInf ? 0.0f : e * x;
        sum += e;
        S[n][c] = e;
      }
    }
    state.sum[r] = sum;
    alphas[r] = alpha;
    if (!FORGETS) rescale_row<false>(acc, r, alpha);
  }
  if (!FORGETS || !ballot(alphas[0] != 1.0f || alphas[1] != 1.0f)) return;
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r) rescale_row<true>(acc, r, alphas[r]);
}

// A finished row in natural units.
struct RowResult {
  float inverse;  // O = acc * inverse
  float lse, max_logit, entropy;
  float log_sum;  // LSE - max_logit, which LSE beside 1e9 has lost
};

// Base-2 logits in base e; what kLeast and -kLeast have left is the least and largest float again.
ATTN_DEVICE float natural(float s) {
  return fabsf(s) > -kLeast2 && fabsf(s) < kInf ? (s < 0.0f ? kFinfoMin : -kFinfoMin) : s * kLn2;
}

// A sink in base 2.
ATTN_DEVICE float sink_logit(float sink) { return hold(sink) * kLog2e; }

// sink: pointer to the head's logit, or null.  All lanes of the warp together.
ATTN_DEVICE RowResult finish_row(const RowState& state, int r, float scale, const float* sink,
                                 bool stats) {
  const float sum = quad_sum(state.sum[r]);
  const float weighted = stats ? quad_sum(state.weighted[r]) : 0.0f;
  const float top = state.max[r] * scale;
  if (sum != sum) return {sum, sum, sum, sum, sum};
  if (state.max[r] == -kInf) return {0.0f, -kInf, -kInf, 0.0f, -kInf};
  float total = sum, factor = 1.0f, shift = top;
  if (sink) {  // joins the normaliser only
    const float s = sink_logit(*sink);
    if (s > top) shift = s, factor = exp2_approx(top - s);
    total = sum * factor + exp2_approx(s - shift);
  }
  const float inverse = factor / total, log_sum = log2f(total) + fminf(shift - top, kFar);
  return {inverse, natural(shift + log2f(total)), natural(top),
          (log_sum * sum * inverse - weighted * inverse) * kLn2, log_sum * kLn2};
}

}  // namespace attn::cuda
