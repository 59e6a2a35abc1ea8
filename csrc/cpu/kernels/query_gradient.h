// dQ of the panels of queries, each the sum of what several blocks of keys add.  Blocks add in
// ascending order, whatever thread has them, so that the bits do not depend on threads: a panel's
// ticket is the number of the block that may add next.
#pragma once
#include "cpu/tile/rows.h"

namespace attn::cpu::ATTN_ISA {

// A panel of queries: its head, first query, number of queries, index, and the key blocks
// [t0, t1) that it sees.
struct Rows {
  int64_t h, m0, nq, unit, t0, t1;
  bool whole() const { return t1 - t0 == 1; }
};

// The sum of the products of two rows of n numbers.  rows: twice n in whole vectors, 0 beyond n.
template <class T>
inline T product_of_rows(DType type, const char* a, const char* b, int64_t n, T* rows) {
  constexpr int L = kLanes<T>;
  const int64_t pad = (n + L - 1) / L * L;
  convert_row(type, a, n, rows);
  convert_row(type, b, n, rows + pad);
  Vec<T> sum{};
  for (int64_t d = 0; d < pad; d += L) sum += load(rows + d) * load(rows + pad + d);
  T total = 0;
  for (int lane = 0; lane < L; ++lane) total += sum[lane];
  return total;
}

template <class T>
class QueryGradient {
 public:
  // scale: of dQ when it is written.
  QueryGradient(const Problem& problem, const Pointers& pointers, T scale,
                const Options& options = {})
      : p(problem), ptr(pointers), scale(scale), type(options.written(problem)) {}

  // shared: some of the `units` panels see more than one block of keys.
  void begin(int64_t units, bool shared) {
    if (!ptr.dq || !shared) return;
    sums.reset(new T[size_t(units * p.head_dim * kPanel)]);
    tickets = std::vector<std::atomic<int32_t>>(units);
  }
  bool wanted() const { return ptr.dq; }
  void first_block(int64_t unit, int64_t t) {
    if (ptr.dq) tickets[unit].store(int32_t(t), std::memory_order_relaxed);
  }
  T* panel(int64_t unit) const { return sums.get() + unit * p.head_dim * kPanel; }

  // Block t's turn to add to a panel, for the life of the object: the first block finds nothing
  // there, the last one writes the panel out.  Where no dQ is wanted, nothing happens.
  class Turn {
   public:
    // dQ [D][kPanel]; rows: scratch of kLanes rows of D in whole vectors.
    Turn(QueryGradient& all, const Sequence& seq, const Rows& r, int64_t t, T* dQ, T* rows)
        : first(all.ptr.dq && t == r.t0), all_(all), seq_(seq), r_(r), t_(t), dQ_(dQ), rows_(rows) {
      if (!all.ptr.dq || r.whole()) return;
      while (all.tickets[r.unit].load(std::memory_order_acquire) != t) std::this_thread::yield();
    }
    ~Turn() {
      if (!all_.ptr.dq) return;
      if (t_ + 1 == r_.t1)
        all_.write(seq_, r_, dQ_, rows_);
      else
        all_.tickets[r_.unit].store(int32_t(t_ + 1), std::memory_order_release);
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

    void clear_first() const {
      if (first) std::fill(dQ_, dQ_ + all_.p.head_dim * kPanel, T(0));
    }
    const bool first;

   private:
    QueryGradient& all_;
    const Sequence& seq_;
    const Rows& r_;
    const int64_t t_;
    T *const dQ_, *const rows_;
  };

  // Rows that see no key.
  void write_zeros(const Sequence& seq, int64_t h, int64_t m0, int64_t nq) const {
    const int64_t size = int64_t(dtype_size(type));
    for (int64_t i = 0; i < nq && ptr.dq; ++i)
      std::memset(static_cast<char*>(ptr.dq) + seq.q_offset(p.dq, h, m0 + i) * size, 0,
                  size_t(p.head_dim * size));
  }

 private:
  const Problem& p;
  const Pointers& ptr;
  const T scale;
  const DType type;                           // of dQ
  std::unique_ptr<T[]> sums;                  // [B, Hq, m_tiles, D, kPanel]
  std::vector<std::atomic<int32_t>> tickets;  // [B, Hq, m_tiles]

  ATTN_NOINLINE void write(const Sequence& seq, const Rows& r, const T* dQ, T* rows) const {
    const int64_t size = int64_t(dtype_size(type)), L = kLanes<T>;
    for (int64_t v = 0; v < r.nq; v += L)
      store_transposed<T>(type, dQ + v, set1(scale), std::min(L, r.nq - v), p.head_dim, rows,
                          static_cast<char*>(ptr.dq) + seq.q_offset(p.dq, r.h, r.m0 + v) * size,
                          p.dq.s * size);
  }
};

}  // namespace attn::cpu::ATTN_ISA
