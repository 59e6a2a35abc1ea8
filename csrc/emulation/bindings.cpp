// The Python module attn_ext._emulated (tests only): the kernels of csrc/cuda on the emulated
// device, its modes and counters, and the kernels that test the emulator.
#include <dlfcn.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <unordered_map>

#include "../cuda/bindings.h"
#include "../cuda/ptx.cuh"
#include "tests/example.cuh"
#include "tests/faults.cuh"
#include "tests/hopper.cuh"
#include "tests/wrappers.cuh"

namespace py = pybind11;

namespace {

using attn::emulation::machine;
using Words = py::array_t<uint32_t, py::array::c_style | py::array::forcecast>;

// "plain", "random", "poison", "race", or several joined by "+"; "all" is all of them.
void set_mode(const std::string& text, uint64_t seed, bool banks, int smem_limit, int grid_limit) {
  attn::emulation::Mode mode;
  mode.seed = seed;
  mode.banks = banks;
  mode.smem_limit = smem_limit;
  mode.grid_limit = grid_limit;
  size_t begin = 0;
  while (begin <= text.size()) {
    const size_t end = std::min(text.find('+', begin), text.size());
    const std::string word = text.substr(begin, end - begin);
    if (word == "random" || word == "all") mode.random = true;
    if (word == "poison" || word == "all") mode.poison = true;
    if (word == "race" || word == "all") mode.race = true;
    if (word != "plain" && word != "random" && word != "poison" && word != "race" &&
        word != "all") {
      throw py::value_error(
          "mode must be plain, random, poison, race, all, or several joined by "
          "+, got '" +
          text + "'");
    }
    begin = end + 1;
  }
  machine.mode = mode;
}

py::dict bank_conflicts() {
  py::dict out;
  for (const auto& [where, count] : machine.banks) {
    out[py::str(attn::emulation::Where::unpack(where).text())] =
        py::make_tuple(count.requests, count.ideal, count.wavefronts);
  }
  return out;
}

Words run_wrapper(int op, const Words& in, const Words& smem) {
  using namespace attn::wrappers;
  if (in.ndim() != 2 || in.shape(0) != 32 || in.shape(1) != WORDS || smem.size() != SMEM_WORDS) {
    throw py::value_error("wrapper: in must be [32, 16] and smem [512] words");
  }
  alignas(16) uint32_t aligned[32 * WORDS];  // numpy promises less, and cp_async_16 wants 16
  std::memcpy(aligned, in.data(), sizeof(aligned));
  Words out({32, WORDS});
  std::memset(out.mutable_data(), 0, size_t(out.nbytes()));
  launch(wrappers, {1, 1, 1}, 32, SMEM_WORDS * 4, nullptr,
         Params{op, aligned, smem.data(), out.mutable_data()});
  return out;
}

// C = A B^T of 16-bit words A [M, K], B [N, K].
py::array_t<float> run_gemm(
    bool bf16, const py::array_t<uint16_t, py::array::c_style | py::array::forcecast>& A,
    const py::array_t<uint16_t, py::array::c_style | py::array::forcecast>& B) {
  using namespace attn::example;
  if (A.ndim() != 2 || B.ndim() != 2 || A.shape(1) != B.shape(1) || A.shape(1) % BLOCK_K != 0) {
    throw py::value_error("gemm: A [M, K] and B [N, K] with K a multiple of 32");
  }
  const int M = int(A.shape(0)), N = int(B.shape(0)), K = int(A.shape(1));
  py::array_t<float> C({M, N});
  std::memset(C.mutable_data(), 0xff, size_t(C.nbytes()));  // NaN: every element must be written
  const Grid grid = {(M + BLOCK_M - 1) / BLOCK_M, (N + BLOCK_N - 1) / BLOCK_N, 1};
  const Params params = {A.data(), B.data(), C.mutable_data(), M, N, K};
  launch(bf16 ? gemm<attn::ptx::bf16> : gemm<attn::ptx::fp16>, grid, THREADS, SMEM_BYTES, nullptr,
         params);
  return C;
}

// out[t], t = 0..63, of the faults kernel; raises what the emulator reports.
py::array_t<float> run_fault(int fault) {
  py::array_t<float> out(64);
  alignas(16) static float gmem[256];
  for (int i = 0; i < 256; ++i) gmem[i] = float(i);
  std::memset(out.mutable_data(), 0, 256);
  attn::ptx::launch(attn::faults::faults, {2, 1, 1}, 64, 2048, nullptr,
                    attn::faults::Params{fault, gmem, out.mutable_data()});
  return out;
}

// What each thread of a warpgroup gets from one wrapper of sm_90.
Words run_hopper(int op, bool bf16) {
  static std::vector<void*> taken;
  const attn::hopper::Memory memory = {
      [](size_t bytes) {
        taken.push_back(std::aligned_alloc(128, (bytes + 127) / 128 * 128));
        return taken.back();
      },
      [](void* to, const void* from, size_t n) { std::memcpy(to, from, n); },
      [](void* to, const void* from, size_t n) { std::memcpy(to, from, n); }};
  struct Free {
    ~Free() {
      for (void* p : taken) std::free(p);
      taken.clear();
    }
  } free;
  const std::vector<uint32_t> out = attn::hopper::run(memory, op, bf16);
  return Words(py::ssize_t(out.size()), out.data());
}

// A launch whose threads do nothing, to test the checks of its configuration.
void run_empty(int x, int y, int z, int threads, int smem_bytes) {
  struct Params {};
  attn::ptx::launch<Params>([](Params) {}, {x, y, z}, threads, smem_bytes, nullptr, Params{});
}

// ---- compiled PTX in place of kernels (tests/helpers/ptx) ---------------------------------------
struct Replacements {
  py::object resolve;
  std::unordered_map<const void*, attn::emulation::Body> known;
};
Replacements& replacements() {
  static auto* all = new Replacements;  // never destroyed: Python's objects end before it would
  return *all;
}

attn::emulation::Body find_replacement(const void* kernel) {
  auto& [resolve, known] = replacements();
  const py::gil_scoped_acquire gil;
  const auto [found, is_new] = known.try_emplace(kernel, nullptr);
  if (is_new) {
    try {
      Dl_info info = {};
      dladdr(kernel, &info);
      const auto offset = uintptr_t(kernel) - uintptr_t(info.dli_fbase);
      found->second = reinterpret_cast<attn::emulation::Body>(resolve(offset).cast<uintptr_t>());
    } catch (...) {
      known.erase(kernel);
      throw;
    }
  }
  return found->second;
}

void replace_kernels(const py::object& resolve) {
  replacements().resolve = resolve;
  replacements().known.clear();
  attn::emulation::replacement = resolve.is_none() ? nullptr : find_replacement;
}

// A launch of compiled PTX by itself; parameters: as the kernel reads them.
void launch_compiled(uintptr_t body, std::array<int, 3> grid, int threads, int smem_bytes,
                     const std::string& parameters) {
  std::vector<uint8_t> storage(parameters.size() + 128);
  uint8_t* aligned = storage.data() + (128 - uintptr_t(storage.data()) % 128) % 128;
  std::memcpy(aligned, parameters.data(), parameters.size());
  const py::gil_scoped_release release;
  machine.launch({grid[0], grid[1], grid[2]}, threads, smem_bytes,
                 reinterpret_cast<attn::emulation::Body>(body), aligned);
}

}  // namespace

PYBIND11_MODULE(_emulated, m) {
  m.def("set_mode", set_mode, py::arg("mode"), py::arg("seed") = 0, py::arg("banks") = false,
        py::arg("smem_limit") = 163 * 1024, py::arg("grid_limit") = 65535);
  m.def(
      "set_repairs", [](bool wanted) { machine.mode.repairs = wanted; },
      "Whether kernels compute results that hold a NaN once more; until the next set_mode");
  m.def(
      "set_ordered", [](bool wanted) { machine.mode.ordered = wanted; },
      "Whether blocks that add to one place must do so in an order that release and acquire make; "
      "until the next set_mode");
  m.def(
      "set_rules",
      [](bool init_fences, int shadow_unit) {
        if (shadow_unit != 1 && shadow_unit != 2 && shadow_unit != 4)
          throw py::value_error("shadow_unit must be 1, 2 or 4");
        machine.mode.init_fences = init_fences;
        machine.mode.shadow_unit = shadow_unit;
      },
      py::arg("init_fences"), py::arg("shadow_unit"),
      "Whether loads need a fence after their mbarrier's initialisation, and the bytes that the "
      "race "
      "detector tells apart");
  m.def("bank_conflicts", bank_conflicts, "{source line: (phases, ideal, wavefronts)}");
  m.def("launches", [] { return machine.launches; });
  m.def("wgmmas", [] { return machine.wgmmas; }, "Warpgroup products since reset_counters, a warp");
  m.def("reset_counters", [] {
    machine.banks.clear();
    machine.launches = machine.wgmmas = 0;
  });
  m.def("wrapper", run_wrapper, py::arg("op"), py::arg("input"), py::arg("smem"));
  m.def("gemm", run_gemm, py::arg("bf16"), py::arg("a"), py::arg("b"));
  m.def("fault", run_fault, py::arg("fault"));
  m.def("hopper", run_hopper, py::arg("op"), py::arg("bf16"));
  m.def("empty_launch", run_empty);
  m.def("replace_kernels", replace_kernels, py::arg("resolve"),
        "resolve(offset of a kernel in this library) -> address of what runs in its place; None: "
        "the kernels themselves");
  m.def("launch_compiled", launch_compiled, py::arg("body"), py::arg("grid"), py::arg("threads"),
        py::arg("smem_bytes"), py::arg("parameters"));
  attn::cuda::bind(m);
}
