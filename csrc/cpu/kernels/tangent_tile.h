// Logits of a tile and their tangents, which forward mode and double backward share:
//   z = scale q.k,  s = softcap tanh(z / softcap),  t = s + bias + ...
//   z' = scale (q'.k + q.k'),  t' = (ds/dz) z' + bias'
// and the two products by which tiles are made and summed.  ' is the tangent.  The tangents of a
// call are a second Problem and Pointers: each address of these is the tangent of what has the same
// name in the call, and null where it is 0.
#pragma once
#include "cpu/kernels/gradient.h"
#include "cpu/simd/gemm.h"
#include "cpu/tile/rows.h"
#include "cpu/tile/score.h"

namespace attn::cpu::ATTN_ISA {

// A call and its tangents.
struct Dual {
  const Problem& p;
  const Pointers& ptr;
  const Problem& tp;
  const Pointers& tptr;
};

template <class T>
struct TangentTile : GradientTile<Plain<T>> {
  using Op = Plain<T>;
  using GradientTile<Op>::S;
  static constexpr int L = kLanes<T>;
  T* tS{};              // [BLOCK_N][kPanel]
  T *slope{}, *bend{};  // ds/dz and (d2s/dz2) z' [BLOCK_N][kPanel]; null without softcap

  struct Factors {
    T logit, tangent;
  };

  // S, tS: q.k and q'.k + q.k' in; logits / factors.logit and tangents / factors.tangent out.
  Factors logits(const Panel<T>& panel, const Panel<T>& moved, const Tile& tile) const {
    T factor = T(panel.seq.p->scale);
    if (slope) {
      through_softcap(panel, tile);
      factor = T(1);
    }
    if (moved.seq.ptr->bias) {
      moved.add_bias(tile, factor, tS);
      factor = T(1);
    }
    return {T(panel.logits(tile, S, nullptr)), factor};
  }

  // f(v, lo, hi) for each vector of queries v and the keys that its grain needs.
  template <class F>
  static void each_vector(const Panel<T>& panel, const Tile& tile, const F& f) {
    for (int64_t g = 0; g < panel.grains; ++g)
      for (int64_t v = g * kGrain; v < (g + 1) * kGrain; v += L) f(v, tile.lo[g], tile.hi[g]);
  }

 private:
  ATTN_NOINLINE void through_softcap(const Panel<T>& panel, const Tile& tile) const {
    const T scale = T(panel.seq.p->scale), cap = T(panel.seq.p->softcap);
    const T inverse = T(1) / cap;
    each_vector(panel, tile, [&](int64_t v, int64_t lo, int64_t hi) {
      for (int64_t at = lo * kPanel + v; at < hi * kPanel; at += kPanel) {
        const Vec<T> u = vtanh(load(S + at) * scale * inverse), g = T(1) - u * u;
        const Vec<T> moved = g * (load(tS + at) * scale);
        store(slope + at, g);
        store(bend + at, u * moved * (T(-2) * inverse));  // d2s/dz2 = -2 u (ds/dz) / softcap
        store(tS + at, moved);
      }
    });
  }
};

// C [keys][queries] = A [keys][depth] * B [depth][queries], within the segments; += where `adds`.
template <class T>
ATTN_NOINLINE void multiply_tile(const Segments& segments, const Operand& A, const T* B,
                                 int64_t depth, T* C, bool adds) {
  for (const Segment& s : segments)
    gemm_panel<Plain<T>>(s.hi - s.lo, s.end - s.begin, depth, A.data + s.lo * A.row_step,
                         A.row_step, A.depth_step, B + s.begin, C + s.lo * kPanel + s.begin, adds);
}

// C [dim][queries] += A^T [dim][keys] * B [keys][queries], where A has keys as rows; = where it
// does not add yet, if the first segment covers all columns.
template <class T>
ATTN_NOINLINE void sum_over_keys(const Segments& segments, int64_t columns, const Operand& A,
                                 int64_t dim, const T* B, T* C, bool adds) {
  if (!adds && !segments.at[0].covers(columns)) {
    std::fill(C, C + dim * kPanel, T(0));
    adds = true;
  }
  for (const Segment& s : segments) {
    gemm_panel<Plain<T>>(dim, s.end - s.begin, s.hi - s.lo, A.data + s.lo * A.row_step,
                         A.depth_step, A.row_step, B + s.lo * kPanel + s.begin, C + s.begin, adds);
    adds = true;
  }
}

// 0 in all pairs of a tile.
template <class T>
ATTN_NOINLINE void clear_tile(const Segments& segments, T* C) {
  for (const Segment& s : segments)
    for (int64_t j = s.lo; j < s.hi; ++j)
      std::fill(C + j * kPanel + s.begin, C + j * kPanel + s.end, T(0));
}

// Whether n storage rows `step` bytes apart hold neither inf nor NaN.
ATTN_NOINLINE bool rows_finite(DType type, const char* at, int64_t n, int64_t step, int64_t dim) {
  if (type == DType::kFloat32) return all_finite<Plain<float>>(at, step, n, dim);
  if (type == DType::kFloat64) return all_finite<Plain<double>>(at, step, n, dim);
  const uint16_t ones = type == DType::kBFloat16 ? 0x7f80 : 0x7c00;  // the exponent
  uint16_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto* row = reinterpret_cast<const uint16_t*>(at + i * step);
    for (int64_t d = 0; d < dim; ++d) bad |= uint16_t((row[d] & ones) == ones);
  }
  return !bad;
}

// Whether all that is multiplied is finite.  Products with hidden keys are multiplied by 0, which
// does not silence inf and NaN; calls that hold any are left to another backend.
inline bool inputs_finite(const Dual& x, int threads) {
  const int64_t group = x.p.heads_q / x.p.heads_k, size = int64_t(dtype_size(x.p.dtype));
  std::atomic<bool> finite{true};
  parallel_for(x.p.batch * x.p.heads_q, threads, [&](int64_t task) {
    const int64_t h = task % x.p.heads_q;
    const Sequence seq(x.p, x.ptr, task / x.p.heads_q);
    auto look = [&](const void* base, int64_t offset, const Strides& s, int64_t n, int64_t dim) {
      if (base && !rows_finite(x.p.dtype, static_cast<const char*>(base) + offset * size, n,
                               s.s * size, dim))
        finite = false;
    };
    auto look_at = [&](const Problem& p, const Pointers& ptr) {
      look(ptr.q, seq.q_offset(p.q, h, 0), p.q, seq.seqlen_q, x.p.head_dim);
      look(ptr.dout, seq.q_offset(p.dout, h, 0), p.dout, seq.seqlen_q, x.p.head_dim_v);
      if (h % group) return;
      look(ptr.k, seq.k_offset(p.k, h / group, 0), p.k, seq.seqlen_k, x.p.head_dim);
      look(ptr.v, seq.k_offset(p.v, h / group, 0), p.v, seq.seqlen_k, x.p.head_dim_v);
    };
    look_at(x.p, x.ptr);
    look_at(x.tp, x.tptr);
  });
  return finite;
}

// LSE of nq rows: +inf in empty rows and padding lanes, whose P is then 0.
template <class T>
ATTN_NOINLINE void load_lse(const T* from, int64_t nq, T* out) {
  constexpr T inf = std::numeric_limits<T>::infinity();
  for (int64_t q = 0; q < nq; ++q) out[q] = from[q] == -inf ? inf : from[q];
  std::fill(out + nq, out + kPanel, inf);
}

// The sink of a head and its tangent.
template <class T>
struct Sink {
  T value, tangent;
  bool there;
  Sink(const Dual& x, int64_t h)
      : value(x.ptr.sink ? static_cast<const T*>(x.ptr.sink)[h] : T(0)),
        tangent(x.tptr.sink ? static_cast<const T*>(x.tptr.sink)[h] : T(0)),
        there(x.ptr.sink) {}
  // exp(sink - LSE); 0 in empty rows and without a sink.
  Vec<T> weight(Vec<T> lse) const { return there ? vexp(value - lse) : Vec<T>{}; }
};

}  // namespace attn::cpu::ATTN_ISA
