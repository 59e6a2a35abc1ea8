// backward_fused.cuh for calls with features (../features.h): backward_sides.cuh's.  What a sink
// changes is in LSE, so that a call with nothing else is a plain one here.
#pragma once
#include "backward_fused.cuh"
#include "backward_sides.cuh"

namespace attn::cuda::sm90 {

// KeyGradients with features, as FusedGradients wants it.
template <class T, class Tile>
struct FeatureGradients : WithSides<T, Tile, KeyGradients<T, Tile>> {
  using Base = WithSides<T, Tile, KeyGradients<T, Tile>>;
  static constexpr int BITS = Tile::BITS, TILES = Base::TILES;
  using Base::DROPS, Base::dV, Base::group, Base::head, Base::key, Base::score, Base::smem;

  // The gradient of the bias += dS.
  template <bool EDGE>
  ATTN_DEVICE void add_bias_gradient(const float (&dS)[TILES][4], int m0) const {
    const Params& p = score.p;
    const ScoreStrides& s = p.p.dbias;
    const int first = m0 + 2 * (lane_id() & 3);
    float* row =
        static_cast<float*>(p.ptr.dbias) + (score.seq.b * s.b + head * s.h + first * s.q + key);
    ATTN_UNROLL
    for (int n = 0; n < TILES; ++n) {
      ATTN_UNROLL
      for (int c = 0; c < 2; ++c) {
        ATTN_UNROLL
        for (int r = 0; r < 2; ++r)
          if (!EDGE || (first + 8 * n + c < score.seq.seqlen_q && key + 8 * r < score.seq.seqlen_k))
            atomic_add_global(row + 8 * r, dS[n][2 * r + c]);
        row += c ? 7 * s.q : s.q;
      }
    }
  }

  // As in KeyGradients.
  ATTN_DEVICE void edge_scores(float (&dP)[TILES][4], int turn, int m0, int) {
    float S[TILES][4], V[TILES][4];
    const uint32_t queries = smem.queries(turn);
    this->scores(S, turn, queries);
    wgmma_wait<0>();
    wgmma_hold(S);
    this->weigh(S, V, turn, m0, true);
    smem.dO.wait(turn);
    add_product<T, Tile::QUERY_BYTES, DROPS>(dV, V, smem.dO.tile(turn), true, group);
    this->value_products(dP, turn, queries);
    wgmma_wait<0>();
    wgmma_hold(dP);
    smem.dO.release(turn);
    this->template differentiate<true>(dP, S, smem.delta(turn));
    if (has<BITS>(score.p, kBiasGradient)) add_bias_gradient<true>(dP, m0);
  }
  ATTN_DEVICE void whole_scores(uint32_t (&P)[TILES / 2][4], uint32_t (&dS)[TILES / 2][4], int turn,
                                int m0, uint32_t queries, int) {
    float S[TILES][4], dP[TILES][4];
    this->scores(S, turn, queries);
    this->value_products(dP, turn, queries);
    wgmma_wait<1>();  // S is there
    wgmma_hold(S);
    this->weigh(S, turn, m0, [&](int n, const float (&weights)[4]) {
      P[n / 2][n % 2 * 2] = pack_pair<T, DROPS>(weights[0], weights[1]);
      P[n / 2][n % 2 * 2 + 1] = pack_pair<T, DROPS>(weights[2], weights[3]);
    });
    wgmma_hold(dV);
    wgmma_hold(P);
    wgmma_fence();
    issue_sum<T>(dV, P, wgmma_held(queries), smem.OUTPUT);
    wgmma_wait<1>();  // dP is there
    wgmma_hold(dP);
    this->template differentiate<false>(dP, S, smem.delta(turn));
    if (has<BITS>(score.p, kBiasGradient)) {
      add_bias_gradient<false>(dP, m0);
      // ptxas would put the additions behind dK's products, and keep their addresses until then
      sync_warp();
    }
    pack_weights<T>(dS, dP);
  }
};

// SplitGradient with features, of wider heads.
template <class T, class Tile>
struct SplitFeatures : WithSides<T, Tile, SplitGradient<T, Tile>> {
  using Base = WithSides<T, Tile, SplitGradient<T, Tile>>;
  static constexpr int TILES = Base::TILES;
  using Base::smem;

  // As in SplitGradient.
  ATTN_DEVICE void add_values(int turn, int m0, bool edge) {
    float S[TILES][4], V[TILES][4];
    smem.Q.wait(turn);
    this->product(S, smem.K, smem.Q.tile(turn));
    this->weigh(S, V, turn, m0, edge);
    this->pass_weights(S, turn);
    this->template add_weights<Base::DROPS>(V, turn, edge);
  }
  ATTN_DEVICE void add_keys(int turn, bool edge) {
    float P[TILES][4], dP[TILES][4];
    this->take_weights(P, dP, turn);
    this->template differentiate<true>(dP, P, smem.delta(turn));
    this->add_gradients(dP, turn, edge);
  }
};

// The number of this CTA: with kOrdered that in which CTAs ask, so that those before it have begun.
template <class Tile>
ATTN_DEVICE int number_of_block(const Params& p) {
  if (!has<Tile::BITS>(p, kOrdered)) return block_id().x;
  const uint32_t word = FeatureMemory<Tile>::of(smem_base()).extra + Tile::WORDS;
  if (thread_id() == 0)
    sts_32(word, uint32_t(atomic_add_global(SumOrder::of(p, Tile::HEAD_DIM).next(), 1)));
  sync_threads();  // it is there; overwritten behind the next one
  return int(lds_32(word));
}

template <class T, class Tile, class Consume>
ATTN_DEVICE void run_feature_key_task(const BackwardParams& x, const Consume& consume, int number) {
  const auto produce = [&](const KeyTask& task, const FeatureMemory<Tile>& smem) {
    if (warp_id() == 0) return;
    const SideProducer<T, Tile> side{x.p, task};
    each_query_tile<Tile>(x.p, task, [&](int turn, int h, int m0) {
      const int head = task.head_k * x.p.group + h;
      if (warp_id() == 1) produce_row_values(x.p, task, smem, turn, head, m0);
      if constexpr (may_have<Tile::BITS>(kMask | kBias | kDropout))
        side.produce(smem, turn, head, m0);
    });
  };
  run_key_task<Tile, FeatureMemory<Tile>>(x, produce, consume, number);
}

template <class T, int HEAD_DIM, int BITS>
ATTN_KERNEL(THREADS, 1)
void backward_features(ATTN_GRID_CONSTANT const BackwardParams x) {
  using Tile = FeatureTile<HEAD_DIM, BITS>;
  const auto consume = [&](const KeyTask& task, const FeatureMemory<Tile>& smem) {
    consume_all<T, Tile, FeatureGradients<T, Tile>>(x.p, task, smem);
  };
  run_feature_key_task<T, Tile>(x, consume, number_of_block<Tile>(x.p));
}

// dK and dV alone, of heads of more than 128 columns (backward_dkdv.cuh).
template <class T, int HEAD_DIM, int BITS>
ATTN_KERNEL(THREADS, 1)
void backward_dkdv_features(ATTN_GRID_CONSTANT const BackwardParams x) {
  using Tile = FeatureTile<HEAD_DIM, BITS>;
  const auto consume = [&](const KeyTask& task, const FeatureMemory<Tile>& smem) {
    consume_split<T, Tile, SplitFeatures<T, Tile>>(x.p, task, smem);
  };
  run_feature_key_task<T, Tile>(x, consume, block_id().x);
}

// dQ = scale * sums, one CTA a tile of 64 queries.
template <class T, int HEAD_DIM, int BITS>
ATTN_KERNEL(128)
void convert_dq_features(ATTN_GRID_CONSTANT const Params p) {
  convert_fused_sums<T, HEAD_DIM, BITS>(p);
}

}  // namespace attn::cuda::sm90
