// Chooses an ISA at run time; ATTN_EXT_ISA (read at the first call) forces one.
#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/amx.h"
#include "cpu/scratch.h"

namespace attn::cpu {

#define ATTN_DECLARE(ISA)                                                                          \
  namespace ISA {                                                                                  \
  void forward(const Problem& p, const Pointers& ptr, int threads);                                \
  void backward(const Problem& p, const Pointers& ptr, int threads);                               \
  void family_forward(const Problem& p, const Pointers& ptr, const FamilyOptions&, int n);         \
  void family_backward(const Problem& p, const Pointers& ptr, const FamilyOptions&, int n);        \
  void inspect(const Problem& p, const Pointers& ptr, const FamilyOptions&, const InspectOptions&, \
               int n);                                                                             \
  }
ATTN_DECLARE(baseline)
#if defined(__x86_64__)
ATTN_DECLARE(avx2)
ATTN_DECLARE(avx512)
ATTN_DECLARE(avx512_bf16)
#ifdef ATTN_HAS_AMX
ATTN_DECLARE(avx512_amx)
#endif
#endif
#undef ATTN_DECLARE

namespace {

// What vdpbf16ps does not serve runs on the other AVX-512 kernels.
#if defined(__x86_64__)
void forward_bf16(const Problem& p, const Pointers& ptr, int threads) {
  (p.dtype == DType::kBFloat16 ? avx512_bf16::forward : avx512::forward)(p, ptr, threads);
}
void backward_bf16(const Problem& p, const Pointers& ptr, int threads) {
  (p.dtype == DType::kBFloat16 ? avx512_bf16::backward : avx512::backward)(p, ptr, threads);
}
#ifdef ATTN_HAS_AMX
void forward_amx(const Problem& p, const Pointers& ptr, int threads) {
  (p.dtype == DType::kBFloat16 ? avx512_amx::forward : avx512::forward)(p, ptr, threads);
}
void backward_amx(const Problem& p, const Pointers& ptr, int threads) {
  (p.dtype == DType::kBFloat16 ? avx512_amx::backward : avx512::backward)(p, ptr, threads);
}
#endif
#endif

struct Isa {
  const char* name;
  void (*forward)(const Problem&, const Pointers&, int);
  void (*backward)(const Problem&, const Pointers&, int);
  void (*family_forward)(const Problem&, const Pointers&, const FamilyOptions&, int);
  void (*family_backward)(const Problem&, const Pointers&, const FamilyOptions&, int);
  void (*inspect)(const Problem&, const Pointers&, const FamilyOptions&, const InspectOptions&,
                  int);
  bool supported;
  // On AMX's tiles.  Used only when it is asked for by its name: no machine has run it so far.
  bool tiles = false;
};

bool usable(const Isa& isa) { return isa.supported && (!isa.tiles || amx::present()); }

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> list{{"baseline", baseline::forward, baseline::backward,
                           baseline::family_forward, baseline::family_backward, baseline::inspect,
                           true}};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 =
        has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    list.push_back({"avx2", avx2::forward, avx2::backward, avx2::family_forward,
                    avx2::family_backward, avx2::inspect, has_avx2});
    list.push_back({"avx512", avx512::forward, avx512::backward, avx512::family_forward,
                    avx512::family_backward, avx512::inspect, has_avx512});
    list.push_back({"avx512_bf16", forward_bf16, backward_bf16, avx512::family_forward,
                    avx512::family_backward, avx512::inspect,
                    has_avx512 && __builtin_cpu_supports("avx512bf16")});
#ifdef ATTN_HAS_AMX
    list.push_back({"avx512_amx", forward_amx, backward_amx, avx512::family_forward,
                    avx512::family_backward, avx512::inspect,
                    has_avx512 && __builtin_cpu_supports("avx512bf16"), true});
#endif
#endif
    return list;
  }();
  return all;
}

const Isa* find(const std::string& name) {
  const Isa* best = nullptr;
  std::string names;
  for (const Isa& isa : isas()) {
    if (!usable(isa)) continue;
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
    if (name.empty() ? !isa.tiles : name == isa.name) best = &isa;
  }
  if (!best)
    throw std::invalid_argument("ATTN_EXT_ISA must be one that this machine supports (" + names +
                                "), got '" + name + "'");
  if (best->tiles && !amx::permitted())
    throw std::invalid_argument("ATTN_EXT_ISA must be one that this machine supports, got '" +
                                name + "', whose tile registers Linux refused to this process");
  return best;
}

std::atomic<const Isa*> current{nullptr};

const Isa& active() {
  const Isa* isa = current.load(std::memory_order_acquire);
  if (!isa) {
    const char* asked = std::getenv("ATTN_EXT_ISA");
    isa = find(asked ? asked : "");
    current.store(isa, std::memory_order_release);
  }
  return *isa;
}

}  // namespace

void forward(const Problem& p, const Pointers& ptr, int threads) {
  active().forward(p, ptr, threads);
}
void backward(const Problem& p, const Pointers& ptr, int threads) {
  active().backward(p, ptr, threads);
}
void family_forward(const Problem& p, const Pointers& ptr, const FamilyOptions& o, int threads) {
  active().family_forward(p, ptr, o, threads);
}
void family_backward(const Problem& p, const Pointers& ptr, const FamilyOptions& o, int threads) {
  active().family_backward(p, ptr, o, threads);
}
void inspect(const Problem& p, const Pointers& ptr, const FamilyOptions& o,
             const InspectOptions& wanted, int threads) {
  active().inspect(p, ptr, o, wanted, threads);
}
std::string isa() { return active().name; }
void set_isa(const std::string& name) { current.store(find(name), std::memory_order_release); }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (usable(isa)) names.emplace_back(isa.name);
  return names;
}

ScratchBuffer& thread_scratch() {
  thread_local ScratchBuffer buffer;
  return buffer;
}

}  // namespace attn::cpu
