// Operations that an agent (a thread; on Hopper a warpgroup or a TMA unit) has issued and that
// complete at a wait: issue() collects, commit() closes a group, wait(keep) completes all groups
// but the latest `keep`, oldest first.
#pragma once
#include <cstddef>
#include <vector>

namespace attn::emulation {

template <class Op>
class AsyncQueue {
 public:
  Op& issue(const Op& op) {
    ops_.push_back(op);
    return ops_.back();
  }
  void commit() { group_ends_.push_back(ops_.size()); }
  template <class Complete>
  void wait(size_t keep, Complete complete) {
    if (group_ends_.size() <= keep) return;
    const size_t groups = group_ends_.size() - keep, end = group_ends_[groups - 1];
    for (size_t i = 0; i < end; ++i) complete(ops_[i]);
    ops_.erase(ops_.begin(), ops_.begin() + end);
    group_ends_.erase(group_ends_.begin(), group_ends_.begin() + groups);
    for (size_t& g : group_ends_) g -= end;
  }
  std::vector<Op>& pending() { return ops_; }
  const std::vector<Op>& pending() const { return ops_; }
  void clear() {
    ops_.clear();
    group_ends_.clear();
  }

 private:
  std::vector<Op> ops_;
  std::vector<size_t> group_ends_;  // indices into ops_
};

}  // namespace attn::emulation
