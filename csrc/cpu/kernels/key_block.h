// The blocks of keys that tasks of the backward own: how many keys one has, its scratch with K and
// V as operands, what it prefetches, and its rows of dK and dV on their way to storage.
#pragma once
#include "cpu/kernels/additive.h"
#include "cpu/kernels/gradient.h"
#include "cpu/scratch.h"
#include "cpu/simd/prefetch.h"
#include "cpu/tile/rows.h"

namespace attn::cpu::ATTN_ISA {

// What the loop over panels keeps of a block, and its scratch.
template <class Op>
struct KeyBlock : GradientTile<typename Op::Items> {
  using T = typename Op::Acc;
  using Item = typename Op::Item;
  explicit KeyBlock(const Sequence& s) : seq(s), soon(s.seqlen_q < kPanel) {}
  const Sequence& seq;
  int64_t t{}, hk{}, n0{}, nk{};  // the block's number, K/V head, first key, number of keys
  Operand K{}, V{}, K_by_key{};
  int finite = -1;                     // no inf or NaN in K and V; -1: not asked yet
  bool begun = false;                  // dK and dV hold something
  bool written = false;                // they are in storage
  int64_t panels = 0, last_unit = -1;  // that see some of its keys, and the last one's index
  T *dK{}, *dV{};                      // [BLOCK_N][d_pad], [BLOCK_N][dv_pad]
  Item *Qt{}, *dOt{};                  // [items of d][kPanel]
  Item *Q{}, *dO{};                    // [items of kPanel][d_pad]
  T* row{};                            // [max dim]
  PanelScratch<T> side{};
  T* dQt{};       // [D][kPanel], of whole rows
  Item* block{};  // of pack_transposed
  AdditiveBlock<T> additive;
  Prefetch soon;
};

template <class Op>
class KeyBlocks {
  using T = typename Op::Acc;
  using Item = typename Op::Item;
  using Block = KeyBlock<Op>;
  static constexpr int L = kLanes<T>;

 public:
  KeyBlocks(const Problem& problem, const Pointers& pointers, const Options& options)
      : p(problem),
        ptr(pointers),
        o(options),
        d_pad(round_up(p.head_dim)),
        dv_pad(round_up(p.head_dim_v)) {
    // Large blocks read and add to dQ less often, as long as their rows stay in L2 and there are
    // enough of them.  By shape alone: results do not depend on the number of threads.
    const bool narrow = std::max(p.head_dim, p.head_dim_v) <= kNarrowHead && sizeof(T) == 4;
    for (int64_t keys : kBackwardKeys) {
      if (keys == kBackwardKeys[0] && !narrow) continue;
      block_n = keys;
      n_tiles = (p.seqlen_k + block_n - 1) / block_n;
      if (p.batch * p.heads_k * n_tiles >= kBackwardTasks) break;
    }
  }

 private:
  const Problem& p;
  const Pointers& ptr;
  const Options& o;

 public:
  const int64_t d_pad, dv_pad;  // head dimensions in whole vectors
  int64_t block_n, n_tiles;     // keys of a block, a multiple of 32; blocks of a head

  struct Next {  // a key block to prefetch; none when t == n_tiles
    int64_t b, hk, t;
  };

  // The blocks [*t0, *t1) that hold what nq queries from m0 see.
  void of_queries(const Sequence& seq, int64_t m0, int64_t nq, int64_t* t0, int64_t* t1) const {
    int64_t lo, hi;
    seq.key_range(m0, m0 + nq, &lo, &hi);
    *t0 = lo / block_n;
    *t1 = hi > lo ? (hi + block_n - 1) / block_n : *t0;
  }

  int64_t scratch_bytes() const {
    const int64_t dims = d_pad + dv_pad;
    return int64_t(sizeof(T)) *
           (block_n * (3 * dims) + 3 * kPanel * dims + L * dims + block_n * kPanel * 6 +
            Panel<T>::keep_size(block_n) + MaskBits<T>::size(block_n) + kPanel * (2 + d_pad) +
            dims + (o.w ? AdditiveBlock<T>::size(p.head_dim, block_n) : 0));
  }

  // A block's scratch, and K and V as operands.
  void load(Block& k, Scratch& scratch) const {
    const int64_t d = p.head_dim, dv = p.head_dim_v, pairs = kPanel / Op::kPack;
    auto tile_of = [&] { return scratch.take<T>(block_n * kPanel); };
    auto items_of = [&](int64_t n) { return scratch.take<Item>(n); };
    Item *K_scratch = items_of(block_n * d_pad), *V_scratch = items_of(block_n * dv_pad);
    k.dK = scratch.take<T>(block_n * d_pad), k.dV = scratch.take<T>(block_n * dv_pad);
    k.Qt = items_of(d_pad * kPanel), k.dOt = items_of(dv_pad * kPanel);
    k.Q = items_of(pairs * d_pad), k.dO = items_of(pairs * dv_pad);
    k.S = tile_of(), k.dP = tile_of();
    k.side = {scratch.take<T>(Panel<T>::keep_size(block_n)),
              scratch.take<typename IntOf<T>::type>(MaskBits<T>::size(block_n))};
    k.dcap = p.softcap > 0 ? tile_of() : nullptr;
    k.lse = scratch.take<T>(kPanel), k.inverse = scratch.take<T>(kPanel);
    k.row = scratch.take<T>(std::max(d_pad, dv_pad));
    k.dQt = scratch.take<T>(d_pad * kPanel);
    k.block = items_of(L * std::max(d_pad, dv_pad));
    k.K = rows_by_depth<Op>(k.seq, ptr.k, p.k, k.hk, k.n0, k.nk, d, K_scratch);
    k.V = rows_by_depth<Op>(k.seq, ptr.v, p.v, k.hk, k.n0, k.nk, dv, V_scratch);
    if constexpr (Op::kPack == 1) {
      k.P_rows = k.S, k.dS_rows = k.dS_by_key = k.dP;  // in place
      k.K_by_key = {k.K.data, k.K.depth_step, k.K.row_step};
    } else {
      k.P_rows = items_of(block_n * pairs), k.dS_rows = items_of(block_n * pairs);
      k.dS_by_key = items_of(block_n * pairs);
      Item* by_key = items_of(by_key_items<Op>(block_n, d));
      k.K_by_key = rows_by_key<Op>(k.seq, ptr.k, p.k, k.hk, k.n0, k.nk, d, by_key);
    }
    if (!o.w) return;
    k.additive.begin(scratch, d, block_n);
    k.additive.k_rows.load(p.dtype, k.nk, round_up(k.nk), d, k.row, [&](int64_t j) {
      return static_cast<const char*>(ptr.k) + k.seq.k_offset(p.k, k.hk, k.n0 + j) * bytes();
    });
  }

  // Where memory is touched for the first time: the output of this block, the inputs of the next.
  void prefetch(Block& k, const Next& next) const {
    Prefetch& soon = k.soon;
    if (ptr.dk) prefetch_keys(k.seq, ptr.dk, p.dk, k.hk, k.n0, block_n, p.head_dim, soon);
    if (ptr.dv) prefetch_keys(k.seq, ptr.dv, p.dv, k.hk, k.n0, block_n, p.head_dim_v, soon);
    if (next.t >= n_tiles) return;
    const Sequence other(p, ptr, next.b);
    const int64_t first = next.t * block_n;
    prefetch_keys(other, ptr.k, p.k, next.hk, first, block_n, p.head_dim, soon);
    prefetch_keys(other, ptr.v, p.v, next.hk, first, block_n, p.head_dim_v, soon);
    if (n_tiles > 1) return;  // the first panel that sees the block is not known
    const int64_t group = p.heads_q / p.heads_k;
    soon.add(other.q_row(ptr.q, p.q, next.hk * group, 0), std::min(kPanel, other.seqlen_q),
             p.q.s * bytes(), p.head_dim * bytes());
    soon.add(other.q_row(ptr.dout, p.dout, next.hk * group, 0), std::min(kPanel, other.seqlen_q),
             p.dout.s * bytes(), p.head_dim_v * bytes());
  }

  void clear(Block& k) const {
    std::fill(k.dK, k.dK + k.nk * d_pad, T(0));
    std::fill(k.dV, k.dV + k.nk * dv_pad, T(0));
  }

  // dK and dV as rows of storage, where they are not there yet.
  void write(Block& k) const {
    if (k.written) return;
    if (!k.begun) clear(k);
    if (o.w) k.additive.write_dk(k.nk, p.head_dim, d_pad, k.dK);
    store_rows(k, ptr.dk, p.dk, p.head_dim, d_pad, k.dK, o.w ? T(1) : T(p.scale));
    store_rows(k, ptr.dv, p.dv, p.head_dim_v, dv_pad, k.dV, T(1));
  }

 private:
  static int64_t round_up(int64_t n) { return (n + L - 1) / L * L; }
  int64_t bytes() const { return int64_t(dtype_size(p.dtype)); }

  // The rows of dK or dV, times `scale`.
  ATTN_NOINLINE void store_rows(const Block& k, void* base, const Strides& s, int64_t dim,
                                int64_t pad, T* rows, T scale) const {
    if (!base) return;
    const DType type = o.written(p);
    const int64_t size = int64_t(dtype_size(type));
    restore_rows<T>(type, rows, pad, scale, k.nk, dim, [&](int64_t j) {
      return static_cast<char*>(base) + k.seq.k_offset(s, k.hk, k.n0 + j) * size;
    });
  }
};

}  // namespace attn::cpu::ATTN_ISA
