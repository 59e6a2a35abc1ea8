// The checks of what a wrong struct could break, for the bindings of every device.
#pragma once
#include <stdexcept>
#include <string>

#include "params.h"

namespace attn {

inline void check_at_least(const char* name, int64_t value, int64_t least) {
  if (value < least)
    throw std::invalid_argument(std::string(name) + " must be at least " + std::to_string(least) +
                                ", got " + std::to_string(value));
}

inline void check(const Problem& p, const Pointers& ptr) {
  check_at_least("batch", p.batch, 0), check_at_least("seqlen_q", p.seqlen_q, 0);
  check_at_least("seqlen_k", p.seqlen_k, 0), check_at_least("heads_k", p.heads_k, 1);
  check_at_least("heads_q", p.heads_q, 1), check_at_least("head_dim", p.head_dim, 1);
  check_at_least("head_dim_v", p.head_dim_v, 1);
  if (p.heads_q % p.heads_k) throw std::invalid_argument("heads_q must be a multiple of heads_k");
  if (p.dropout_p > 0 && !ptr.rng_state)
    throw std::invalid_argument("rng_state is needed when dropout_p > 0");
  if (ptr.block_table && p.page_size < 1)
    throw std::invalid_argument("page_size must be at least 1 with a block_table");
}

}  // namespace attn
