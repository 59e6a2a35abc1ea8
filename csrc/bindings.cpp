// attn_ext._C: integers and flat structs in, nothing else.  The Python side has validated what the
// pointers mean (attn_ext/backends/cpu.py); here only what a wrong struct could break is checked.
// The GIL is released in every kernel.
#include <array>
#include <optional>
#include <stdexcept>
#include <string>

#include "binding_call.h"
#include "cpu/isa/amx.h"
#include "cpu/isa/dispatch.h"
#include "cpu/isa/features.h"
#include "cpu/measure/ceilings.h"
#include "cpu/parallel.h"
#include "cpu/tiles.h"
#include "dense_calls.h"

using attn::Pointers;
using attn::python::Dict;
using attn::python::function;
using attn::python::method;
using attn::python::WithoutGil;

namespace {

struct Call : attn::NativeCall {
  attn::cpu::Options options;
};

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(const attn::Problem& p, const Pointers& ptr, int threads) {
  attn::check(p, ptr);
  attn::check_at_least("num_threads", threads, 1);
}

void set_options(Call& c, bool sigmoid, std::optional<double> sigmoid_bias, uintptr_t w,
                 uintptr_t dw, bool partial, uintptr_t delta, uintptr_t base, uintptr_t rest) {
  c.options.sigmoid = sigmoid, c.options.length_bias = !sigmoid_bias;
  c.options.sigmoid_bias = sigmoid_bias.value_or(0);
  c.options.w = at<void>(w), c.options.dw = at<void>(dw);
  c.options.partial = partial, c.options.delta = at<void>(delta);
  c.options.base = at<void>(base), c.options.rest = at<void>(rest);
}

void set_isa(Call& c, const std::string& name) { c.options.isa = attn::cpu::isa_index(name); }

void forward(const Call& c, int threads) {
  check(c.p, c.ptr, threads);
  const WithoutGil release;
  attn::cpu::forward(c.p, c.ptr, c.options, threads);
}

void backward(const Call& c, int threads) {
  check(c.p, c.ptr, threads);
  const WithoutGil release;
  attn::cpu::backward(c.p, c.ptr, c.options, threads);
}

void inspect(const Call& c, int threads, int what, const std::array<int64_t, 3>& sizes,
             uintptr_t out, uintptr_t entropy, uintptr_t keys) {
  attn::cpu::Map map;
  if (what < 0 || what > attn::cpu::Map::kMeanTopK)
    throw std::invalid_argument("what must be 0 to 3, got " + std::to_string(what));
  map.what = attn::cpu::Map::What(what);
  map.n = sizes[0], map.rows = sizes[1], map.cols = sizes[2];
  map.out = at<void>(out), map.entropy = at<void>(entropy), map.keys = at<int64_t>(keys);
  check(c.p, c.ptr, threads);
  const WithoutGil release;
  attn::cpu::inspect(c.p, c.ptr, c.options, map, threads);
}

Pointers with(Pointers ptr, const Dict& addresses) {
  attn::set_addresses(ptr, addresses);
  return ptr;
}

// A kernel of second derivatives on a call and on its tangents, which have the sizes and the
// lengths of the call.  Both calls may be shared: the addresses come beside them.
using TangentKernel = bool (*)(const attn::Problem&, const Pointers&, const attn::cpu::Options&,
                               const attn::Problem&, const Pointers&, int);
template <TangentKernel kernel>
bool run_on_tangents(const Call& c, const Call& tangents, int threads, const Dict& addresses,
                     const Dict& tangent_addresses) {
  const attn::Problem p = c.p;
  const attn::cpu::Options options = c.options;
  attn::Problem tp = tangents.p;
  const Pointers ptr = with(c.ptr, addresses);
  Pointers tptr = with({}, tangent_addresses);
  check(p, ptr, threads);
  if (p.dtype == attn::DType::kFloat64)
    throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got float64");
  tp.dropout_p = 0;  // the mask comes by the call
  tptr.cu_seqlens_q = ptr.cu_seqlens_q, tptr.cu_seqlens_k = ptr.cu_seqlens_k;
  tptr.frame = ptr.frame;
  const WithoutGil release;
  return kernel(p, ptr, options, tp, tptr, threads);
}

// Calls that have side inputs, or are made once.
PyMethodDef methods[] = {
    attn::gradients_method<Call>(),
    attn::addresses_method<Call>(),
    method<&set_options>("set_options",
                         "self, sigmoid, sigmoid_bias, w, dw, partial, delta, base, rest",
                         "Other weights than softmax, other scores than dot products"),
    method<&set_isa>("set_isa", "self, name",
                     "Whose kernels serve the call where no ISA is forced; '' = the best one's"),
    method<&forward>("forward", "self, threads", "O, LSE (and row statistics)"),
    method<&backward>("backward", "self, threads", "The gradients whose addresses are set"),
    method<&run_on_tangents<&attn::cpu::tangent>>(
        "tangent", "self, tangents, threads, addresses, tangent_addresses",
        "The tangents of O and LSE; False where nothing was done"),
    method<&run_on_tangents<&attn::cpu::backward_tangent>>(
        "backward_tangent", "self, tangents, threads, addresses, tangent_addresses",
        "The gradients whose addresses are set, and their tangents; False where none counts"),
    method<&inspect>(
        "inspect", "self, threads, what, sizes, out, entropy, keys",
        "Row statistics (0), top-k keys (1), column mass (2) or pooled map (3) of a dense call"),
    {}};

double ceilings(const std::string& name, const std::optional<std::string>& isa,
                std::optional<int> threads, std::optional<double> seconds) {
  const WithoutGil release;
  return attn::cpu::ceiling(name, isa.value_or(""), threads.value_or(1), seconds.value_or(0.05));
}

void plant(std::optional<uintptr_t> tangent, std::optional<uintptr_t> backward_tangent,
           std::optional<uintptr_t> inspect, std::optional<uintptr_t> backward) {
  attn::cpu::plant(tangent.value_or(0), backward_tangent.value_or(0), inspect.value_or(0),
                   backward.value_or(0));
}

PyMethodDef functions[] = {
    function<&ceilings>(
        "ceilings", "name, isa, threads, seconds",
        "What this machine reaches: fma, bf16 (GFLOP/s), exp (10^9/s) or read (GB/s)"),
    function<&attn::cpu::use_openmp>(
        "use_openmp", "address",
        "Run on the OpenMP team whose GOMP_parallel has this address; 0: on our own threads"),
    function<&attn::cpu::supported_isas>("supported_isas"),
    function<&attn::cpu::isa>("isa"),
    function<&attn::cpu::isa_forced>("isa_forced"),
    function<&attn::cpu::set_isa>("set_isa", "name",
                                  "For tests: force an ISA of supported_isas(), '' = best"),
    function<&attn::cpu::isa_table>(
        "isa_table", "",
        "For tests: (name, CPU features, addresses of kernels) of each ISA that was compiled"),
    function<&plant>(
        "plant", "tangent, backward_tangent, inspect, backward",
        "For tests: the kernels of derivatives, and of attn_ext.inspect, at these addresses run; "
        "0: our own"),
    function<&attn::cpu::cpu_has>(
        "cpu_has", "features",
        "For tests: whether this machine has the CPU features, named as in isa_table()"),
    function<&attn::cpu::amx::emulate>(
        "emulate_amx", "on",
        "For tests: take AMX for supported, since an emulator of its instructions is installed"),
    {}};

attn::Held held_by(PyObject* x) {
  if (PyObject_TypeCheck(x, attn::python::type_of<Call>)) {
    const Call& call = attn::python::Convert<Call>::from(x);
    return {&call.p, &call.options};
  }
  PyErr_SetString(PyExc_TypeError, "call must be a Call");
  return {};
}

void fill(PyObject* module) {
  attn::add_call<Call>(module, methods);
  attn::python::add_functions(module, functions);
  // keys up to which O' and L' are not read
  const attn::python::Owned most = attn::python::made(attn::python::to(attn::cpu::kSecondWhole));
  if (PyObject_SetAttrString(module, "SECOND_WHOLE", most.get()) < 0 ||
      !attn::add_dense_calls(module, held_by) || !attn::add_cache_calls(module, held_by))
    throw attn::python::Raised();
}

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "attn_ext._C",
                          "The CPU kernels of attn_ext",
                          -1,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return attn::python::make_module(definition, fill); }
