// attn_ext._C, the CPU's kernels, and attn_ext._C.cuda, the launches of the GPU's: integers and
// flat structs in, nothing else.  The Python side has validated what the pointers mean
// (attn_ext/backends/cpu.py); here only what a wrong struct could break is checked.  The GIL is
// released in every kernel.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "binding_call.h"
#include "dense_calls.h"
#include "cpu/isa/amx.h"
#include "cpu/measure/ceilings.h"
#include "cpu/isa/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/isa/features.h"
#include "cpu/tiles.h"
#include "cuda/bindings.h"

namespace py = pybind11;
using attn::doc;
using attn::Pointers;

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

void inspect(const Call& c, int threads, int what, const py::object& told, uintptr_t out,
             uintptr_t entropy, uintptr_t keys) {
  attn::cpu::Map map;
  const auto sizes = attn::integers<3>("sizes", told);
  if (what < 0 || what > attn::cpu::Map::kMeanTopK)
    throw std::invalid_argument("what must be 0 to 4, got " + std::to_string(what));
  map.what = attn::cpu::Map::What(what);
  map.n = sizes[0], map.rows = sizes[1], map.cols = sizes[2];
  map.out = at<void>(out), map.entropy = at<void>(entropy), map.keys = at<int64_t>(keys);
  check(c.p, c.ptr, threads);
  py::gil_scoped_release release;
  attn::cpu::inspect(c.p, c.ptr, c.options, map, threads);
}

Pointers with(Pointers ptr, const py::dict& addresses) {
  attn::set_addresses(ptr, addresses);
  return ptr;
}

// A kernel of second derivatives on a call and on its tangents, which have the sizes and the
// lengths of the call.  Both calls may be shared: the addresses come beside them.
using TangentKernel = bool (*)(const attn::Problem&, const Pointers&, const attn::cpu::Options&,
                               const attn::Problem&, const Pointers&, int);
template <TangentKernel kernel>
bool run_on_tangents(const Call& c, const Call& tangents, int threads, const py::dict& addresses,
                     const py::dict& tangent_addresses) {
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
  py::gil_scoped_release release;
  return kernel(p, ptr, options, tp, tptr, threads);
}

// Calls that have side inputs, or are made once.
void define_whole(py::class_<Call>& call) {
  call.def(
          "set_options",
          +[](Call& c, bool sigmoid, const py::object& sigmoid_bias, uintptr_t w, uintptr_t dw,
              bool partial, uintptr_t delta, uintptr_t base, uintptr_t rest) {
            c.options.sigmoid = sigmoid, c.options.length_bias = sigmoid_bias.is_none();
            if (!sigmoid_bias.is_none())
              c.options.sigmoid_bias = attn::real("sigmoid_bias", sigmoid_bias);
            c.options.w = at<void>(w), c.options.dw = at<void>(dw);
            c.options.partial = partial, c.options.delta = at<void>(delta);
            c.options.base = at<void>(base), c.options.rest = at<void>(rest);
          },
          py::kw_only(), py::arg("sigmoid"), py::arg("sigmoid_bias"), py::arg("w"), py::arg("dw"),
          py::arg("partial"), py::arg("delta"), py::arg("base"), py::arg("rest"),
          doc("Other weights than softmax, other scores than dot products"))
      .def(
          "set_isa",
          +[](Call& c, const std::string& name) { c.options.isa = attn::cpu::isa_index(name); },
          doc("Whose kernels serve the call where no ISA is forced; '' = the best one's"))
      .def(
          "forward",
          +[](const Call& c, int threads) {
            check(c.p, c.ptr, threads);
            py::gil_scoped_release release;
            attn::cpu::forward(c.p, c.ptr, c.options, threads);
          },
          doc("O, LSE (and row statistics)"))
      .def(
          "backward",
          +[](const Call& c, int threads) {
            check(c.p, c.ptr, threads);
            py::gil_scoped_release release;
            attn::cpu::backward(c.p, c.ptr, c.options, threads);
          },
          doc("The gradients whose addresses are set"))
      .def("tangent", &run_on_tangents<&attn::cpu::tangent>,
           doc("The tangents of O and LSE; False where nothing was done"))
      .def(
          "backward_tangent", &run_on_tangents<&attn::cpu::backward_tangent>,
          doc("The gradients whose addresses are set, and their tangents; False where none counts"))
      .def("inspect", &inspect,
           doc("Row statistics (0), top-k keys (1), column mass (2) or pooled map (3) of a call"));
}

py::list supported_isas() {
  py::list names;
  for (const std::string& name : attn::cpu::supported_isas()) names.append(name);
  return names;
}

py::list isa_table() {
  py::list table;
  for (const auto& [name, features, kernels] : attn::cpu::isa_table()) {
    py::dict addresses;
    for (const auto& [kernel, address] : kernels) addresses[kernel.c_str()] = py::int_(address);
    table.append(py::make_tuple(name, features, addresses));
  }
  return table;
}

attn::Held held_by(PyObject* x) {
  if (py::isinstance<Call>(x)) {
    const auto* call = py::handle(x).cast<const Call*>();
    return {&call->p, &call->options};
  }
  PyErr_SetString(PyExc_TypeError, "call must be a Call");
  return {};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::class_<Call> call = attn::define_call<Call>(m);
  define_whole(call);

  m.def("ceilings", &attn::cpu::ceiling, py::arg("name"), py::arg("isa") = "",
        py::arg("threads") = 1, py::arg("seconds") = 0.05, py::call_guard<py::gil_scoped_release>(),
        "What this machine reaches: fma, bf16 (GFLOP/s), exp (10^9/s) or read (GB/s)");

  m.attr("SECOND_WHOLE") = attn::cpu::kSecondWhole;  // keys up to which O' and L' are not read

  m.def("use_openmp", &attn::cpu::use_openmp,
        doc("Run on the OpenMP team whose GOMP_parallel has this address; 0: on our own threads"));
  m.def("supported_isas", &supported_isas);
  m.def("isa", &attn::cpu::isa);
  m.def("isa_forced", &attn::cpu::isa_forced);
  m.def("set_isa", &attn::cpu::set_isa,
        doc("For tests: force an ISA of supported_isas(), '' = best"));
  m.def("isa_table", &isa_table,
        doc("For tests: (name, CPU features, addresses of kernels) of each compiled ISA"));
  m.def("plant", &attn::cpu::plant, py::arg("tangent") = 0, py::arg("backward_tangent") = 0,
        py::arg("inspect") = 0, py::arg("backward") = 0,
        "For tests: the kernels of derivatives, and of attn_ext.inspect, at these addresses run; "
        "0: our own");
  m.def("cpu_has", &attn::cpu::cpu_has,
        doc("For tests: whether this machine has the CPU features, named as in isa_table()"));
  m.def("emulate_amx", &attn::cpu::amx::emulate,
        doc("For tests: take AMX for supported, since its instructions are emulated"));

  if (!attn::add_dense_calls(m.ptr(), held_by) || !attn::add_cache_calls(m.ptr(), held_by))
    throw py::error_already_set();

  py::module_ cuda = m.def_submodule("cuda", "csrc/cuda's kernels on NVIDIA's driver, if any");
  attn::cuda::bind_driver(cuda);
}
