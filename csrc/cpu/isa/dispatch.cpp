// Chooses an ISA at run time; ATTN_EXT_ISA (read at the first call) forces one.
#include "cpu/isa/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/isa/amx.h"
#include "cpu/scratch.h"
#include "cpu/isa/features.h"

namespace attn::cpu {

#define ATTN_DECLARE(ISA)                                                                       \
  namespace ISA {                                                                               \
  void forward(const Problem& p, const Pointers& ptr, const Options& o, int threads);           \
  void backward(const Problem& p, const Pointers& ptr, const Options& o, int threads);          \
  void inspect(const Problem& p, const Pointers& ptr, const Options&, const Map&, int n);       \
  bool tangent(const Problem&, const Pointers&, const Problem&, const Pointers&, int);          \
  bool backward_tangent(const Problem&, const Pointers&, const Problem&, const Pointers&, int); \
  }
ATTN_DECLARE(baseline)
#if defined(__x86_64__)
ATTN_DECLARE(avx2)
ATTN_DECLARE(avx512)
ATTN_DECLARE(avx512_bf16)
namespace avx512_bf16 {  // on the tile unit
void forward_tiles(const Problem& p, const Pointers& ptr, const Options& o, int threads);
void backward_tiles(const Problem& p, const Pointers& ptr, const Options& o, int threads);
}  // namespace avx512_bf16
#endif
#undef ATTN_DECLARE

namespace {

using Kernel = void (*)(const Problem&, const Pointers&, const Options&, int);
using TangentKernel = bool (*)(const Problem&, const Pointers&, const Problem&, const Pointers&,
                               int);
using InspectKernel = void (*)(const Problem&, const Pointers&, const Options&, const Map&, int);

struct Isa {
  const char *name, *features;  // features: of its target region (features.h)
  Kernel forward, backward, forward_bf16, backward_bf16;
  InspectKernel inspect;
  TangentKernel tangent, backward_tangent;
  bool supported;
  // On AMX's tiles.  Only for whom asks: Python does so once their results were compared here.
  bool tiles = false;
};

bool usable(const Isa& isa) { return isa.supported && (!isa.tiles || amx::present()); }

// From the least to the most.  What vdpbf16ps and tiles do not serve runs on the kernels of avx512.
#define ATTN_OWN_KERNELS(ISA) ISA::forward, ISA::backward
#define ATTN_ONLY_PLAIN(ISA) ISA::inspect, ISA::tangent, ISA::backward_tangent
const std::vector<Isa>& isas() {
  static const std::vector<Isa> all{
      {"baseline", "", ATTN_OWN_KERNELS(baseline), ATTN_OWN_KERNELS(baseline),
       ATTN_ONLY_PLAIN(baseline), true},
#if defined(__x86_64__)
      {"avx2", ATTN_AVX2_FEATURES, ATTN_OWN_KERNELS(avx2), ATTN_OWN_KERNELS(avx2),
       ATTN_ONLY_PLAIN(avx2), cpu_has(ATTN_AVX2_FEATURES)},
      {"avx512", ATTN_AVX512_FEATURES, ATTN_OWN_KERNELS(avx512), ATTN_OWN_KERNELS(avx512),
       ATTN_ONLY_PLAIN(avx512), cpu_has(ATTN_AVX512_FEATURES)},
      {"avx512_bf16", ATTN_AVX512_BF16_FEATURES, ATTN_OWN_KERNELS(avx512),
       ATTN_OWN_KERNELS(avx512_bf16), ATTN_ONLY_PLAIN(avx512), cpu_has(ATTN_AVX512_BF16_FEATURES)},
#ifdef ATTN_HAS_AMX
      // whether there are tiles is asked at each use: tests emulate them
      {"avx512_amx", ATTN_AVX512_AMX_FEATURES, ATTN_OWN_KERNELS(avx512), avx512_bf16::forward_tiles,
       avx512_bf16::backward_tiles, ATTN_ONLY_PLAIN(avx512), cpu_has(ATTN_AVX512_BF16_FEATURES),
       true},
#endif
#endif
  };
  return all;
}
#undef ATTN_OWN_KERNELS
#undef ATTN_ONLY_PLAIN

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
std::atomic<TangentKernel> planted_tangent{nullptr}, planted_backward_tangent{nullptr};
std::atomic<InspectKernel> planted_inspect{nullptr};
std::atomic<Kernel> planted_backward{nullptr};
std::atomic<bool> was_asked{false};  // by its name: then calls have no choice of their own

void use(const std::string& name) {
  const Isa* isa = find(name);
  was_asked.store(!name.empty(), std::memory_order_relaxed);
  current.store(isa, std::memory_order_release);
}

const Isa& active() {
  const Isa* isa = current.load(std::memory_order_acquire);
  if (!isa) {
    const char* asked = std::getenv("ATTN_EXT_ISA");
    use(asked ? asked : "");
    isa = current.load(std::memory_order_acquire);
  }
  return *isa;
}

const Isa& serving(const Options& o) {
  const Isa& isa = active();
  return o.isa < 0 || was_asked.load(std::memory_order_relaxed) ? isa : isas()[o.isa];
}

}  // namespace

void forward(const Problem& p, const Pointers& ptr, const Options& o, int threads) {
  const Isa& isa = serving(o);
  (p.dtype == DType::kBFloat16 ? isa.forward_bf16 : isa.forward)(p, ptr, o, threads);
}
void backward(const Problem& p, const Pointers& ptr, const Options& o, int threads) {
  const Isa& isa = serving(o);
  const Kernel planted = planted_backward.load(std::memory_order_relaxed);
  (planted                       ? planted
   : p.dtype == DType::kBFloat16 ? isa.backward_bf16
                                 : isa.backward)(p, ptr, o, threads);
}
void forward(const Problem& p, const Pointers& ptr, int threads) { forward(p, ptr, {}, threads); }
void backward(const Problem& p, const Pointers& ptr, int threads) { backward(p, ptr, {}, threads); }
void inspect(const Problem& p, const Pointers& ptr, const Options& o, const Map& wanted,
             int threads) {
  const InspectKernel planted = planted_inspect.load(std::memory_order_relaxed);
  (planted ? planted : active().inspect)(p, ptr, o, wanted, threads);
}
bool tangent(const Problem& p, const Pointers& ptr, const Options& o, const Problem& tp,
             const Pointers& tptr, int threads) {
  const TangentKernel planted = planted_tangent.load(std::memory_order_relaxed);
  return (planted ? planted : serving(o).tangent)(p, ptr, tp, tptr, threads);
}
bool backward_tangent(const Problem& p, const Pointers& ptr, const Options& o, const Problem& tp,
                      const Pointers& tptr, int threads) {
  const TangentKernel planted = planted_backward_tangent.load(std::memory_order_relaxed);
  return (planted ? planted : serving(o).backward_tangent)(p, ptr, tp, tptr, threads);
}
void plant(uintptr_t tangent, uintptr_t backward_tangent, uintptr_t inspect, uintptr_t backward) {
  planted_backward = reinterpret_cast<Kernel>(backward);
  planted_tangent = reinterpret_cast<TangentKernel>(tangent);
  planted_backward_tangent = reinterpret_cast<TangentKernel>(backward_tangent);
  planted_inspect = reinterpret_cast<InspectKernel>(inspect);
}
std::string isa() { return active().name; }
void set_isa(const std::string& name) { use(name); }
bool isa_forced() { return active(), was_asked.load(std::memory_order_relaxed); }
int isa_index(const std::string& name) {
  return name.empty() ? -1 : int(find(name) - isas().data());
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (usable(isa)) names.emplace_back(isa.name);
  return names;
}

std::vector<IsaEntry> isa_table() {
  std::vector<IsaEntry> table;
  auto address = [](auto function) { return reinterpret_cast<uintptr_t>(function); };
  for (const Isa& i : isas())
    table.push_back({i.name,
                     i.features,
                     {{"forward", address(i.forward)},
                      {"backward", address(i.backward)},
                      {"forward_bf16", address(i.forward_bf16)},
                      {"backward_bf16", address(i.backward_bf16)},
                      {"inspect", address(i.inspect)},
                      {"tangent", address(i.tangent)},
                      {"backward_tangent", address(i.backward_tangent)}}});
  return table;
}

ScratchBuffer& thread_scratch() {
  thread_local ScratchBuffer buffer;
  return buffer;
}

}  // namespace attn::cpu
