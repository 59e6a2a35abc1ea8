// A thread's scratch memory, kept between calls: take() hands out aligned pieces of it.  Not
// initialised.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace attn::cpu {

struct ScratchBuffer {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory;
  size_t size = 0, used = 0;
};

ScratchBuffer& thread_scratch();

// Nested scopes of one thread stack up; the outermost fixes the buffer's size for a while, so inner
// ones that do not fit own a block of their own.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    const size_t need = size_t(bytes) + 32 * kAlign;  // every take() may lose kAlign
    ScratchBuffer& shared = thread_scratch();
    if (shared.used == 0 && shared.size < need) {
      shared.memory.reset(allocate(need));
      shared.size = need;
    }
    if (shared.used == 0) {
      buffer_ = &shared;
    } else {
      own_.memory.reset(allocate(need));
      own_.size = need;
      buffer_ = &own_;
    }
    start_ = buffer_->used;
    buffer_->used += kAlign;  // marks the buffer as taken, also before the first take()
  }
  ~Scratch() { buffer_->used = start_; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t elements) {
    const size_t bytes = (size_t(elements) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    if (buffer_->used + bytes > buffer_->size) throw std::bad_alloc();  // scratch_size() is short
    T* piece = reinterpret_cast<T*>(static_cast<char*>(buffer_->memory.get()) + buffer_->used);
    buffer_->used += bytes;
    return piece;
  }
  size_t used() const { return buffer_->used; }
  void rewind(size_t mark) { buffer_->used = mark; }

 private:
  static constexpr size_t kAlign = 64;
  static void* allocate(size_t bytes) {
    void* p = std::aligned_alloc(kAlign, (bytes + kAlign - 1) / kAlign * kAlign);
    if (!p) throw std::bad_alloc();
    return p;
  }
  ScratchBuffer own_;
  ScratchBuffer* buffer_;
  size_t start_;
};

}  // namespace attn::cpu
