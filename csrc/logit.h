// From the product of a query and a key to their logit: the one formula of all native kernels.
//   s = scale * product;  s = softcap * tanh(s / softcap);
//   s -= slope * |i + Sk - Sq - j|;  s += bias
// A term is added to attention here: its numbers in `Terms` or `HeadTerms`, whether a call has it
// in `Has` and `Terms::plain`, and the term itself in `logit`.  A new number of a call is a field
// and a row of `kScalars` in params.h.
//
// Every function is inlined by force: this text is compiled for each instruction set of csrc/cpu,
// and no function of one may be taken for that of another.
#pragma once
#include <type_traits>

#include "params.h"

#if defined(__CUDACC__)
#define ATTN_FORMULA __host__ __device__ __forceinline__
#define ATTN_FORMULA_DEVICE __device__ __forceinline__
#else
#define ATTN_FORMULA inline __attribute__((always_inline))
#define ATTN_FORMULA_DEVICE ATTN_FORMULA
#endif

namespace attn {

// Which kinds of terms a call has beside its products.
struct Has {
  bool cap, distance, bias;
};

// The same, known when the kernel is compiled.
template <bool CAP, bool DISTANCE, bool BIAS>
struct HasExactly {
  static constexpr bool cap = CAP, distance = DISTANCE, bias = BIAS;
};

// use(HasExactly<...>()) for what `has` says.
template <class Use>
ATTN_FORMULA void with_exactly(const Has& has, const Use& use) {
  const auto biased = [&](auto cap, auto distance) {
    has.bias ? use(HasExactly<decltype(cap)::value, decltype(distance)::value, true>())
             : use(HasExactly<decltype(cap)::value, decltype(distance)::value, false>());
  };
  const auto distant = [&](auto cap) {
    has.distance ? biased(cap, std::true_type{}) : biased(cap, std::false_type{});
  };
  has.cap ? distant(std::true_type{}) : distant(std::false_type{});
}

// The numbers of a call that every pair shares.  T is float or double; logits are in units of
// 1 / unit: 1 for natural logarithms, log2(e) for those of base 2.
template <class T>
struct Terms {
  T scale, factor;     // softmax_scale, and what makes a logit of a product where nothing else does
  T cap, inverse_cap;  // softcap in the logits' unit, and 1 / softcap; 0 without one
  Has has;

  static ATTN_FORMULA Terms of(const Problem& p, const Pointers& ptr, double unit) {
    Terms t;
    t.scale = T(p.scale), t.factor = T(p.scale * unit);
    t.has.cap = p.softcap > 0;
    t.has.distance = ptr.alibi_slopes != nullptr;
    t.has.bias = ptr.bias != nullptr;
    // at most 2^126: of more, 1 / softcap is no normal float, which a GPU takes for 0
    const double cap = p.softcap < 0x1p126 ? p.softcap : 0x1p126;
    t.cap = T(cap * unit);
    t.inverse_cap = t.has.cap ? T(1) / T(cap) : T(0);
    return t;
  }
  // Whether logits are products times `factor`, so that masks may come before it.
  ATTN_FORMULA bool plain() const {
    return factor > T(0) && !has.cap && !has.distance && !has.bias;
  }
};

// The numbers that the pairs of one head of one sequence share.
template <class T>
struct HeadTerms {
  T slope;  // of ALiBi, in the logits' unit

  template <class Sequence>
  static ATTN_FORMULA HeadTerms of(const Pointers& ptr, const Sequence& seq, int64_t h, T unit) {
    const auto* slopes = static_cast<const float*>(ptr.alibi_slopes);
    return {slopes ? T(slopes[seq.b * ptr.alibi_stride_b + h]) * unit : T(0)};
  }
};

// The logit of a pair, or of a vector of pairs, from its product.
//   has         a `Has`, or a `HasExactly`
//   distance()  i + Sk - Sq - j
//   bias()      that of the pair, as it was given; -inf makes the logit -inf
//   capped(x)   takes the derivative of softcap; called only where there is one
// Ways: the operations on a number, `tanh`, `magnitude`, `over_cap(x, terms)` and `in_units`, which
// brings a bias into the logits' unit.
template <class Ways, class Flags, class T, class X, class Distance, class Bias, class Capped>
ATTN_FORMULA_DEVICE X logit(const Flags& has, const Terms<T>& terms, const HeadTerms<T>& head,
                            X product, const Distance& distance, const Bias& bias,
                            const Capped& capped) {
  X s;
  if (has.cap) {
    const X u = Ways::tanh(Ways::over_cap(product * terms.scale, terms));
    s = u * terms.cap;
    capped(T(1) - u * u);
  } else {
    s = product * terms.factor;
  }
  if (has.distance) s -= head.slope * Ways::magnitude(distance());
  if (has.bias) {
    const X b = bias();
    s = b == Ways::excluded() ? b : s + Ways::in_units(b);
  }
  return s;
}

}  // namespace attn
