// attn_ext._C: integers and flat structs in, nothing else.  The Python side has validated what the
// pointers mean (attn_ext/backends/cpu.py); here only what a wrong struct could break is checked.
// The GIL is released in every kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>

#include "binding_parts.h"
#include "dense_calls.h"
#include "cpu/isa/amx.h"
#include "cpu/measure/ceilings.h"
#include "cpu/isa/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/isa/features.h"

namespace py = pybind11;
using attn::Pointers;
using attn::Problem;

namespace {

template <class T>
const T* in(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

void check(const Problem& p, const Pointers& ptr, int threads) {
  attn::check(p, ptr);
  attn::check_at_least("num_threads", threads, 1);
}

// q k v mask bias alibi rng_state cu_seqlens_q cu_seqlens_k seqlens_k block_table o lse dout dlse
// dq dk dv dbias w dw; 0 where absent.
using Addresses = std::array<uintptr_t, 21>;

Pointers pointers(const Addresses& a, int64_t alibi_stride_b) {
  Pointers ptr;
  ptr.q = in<void>(a[0]), ptr.k = in<void>(a[1]), ptr.v = in<void>(a[2]);
  ptr.mask = in<void>(a[3]), ptr.bias = in<void>(a[4]);
  ptr.alibi_slopes = in<void>(a[5]), ptr.alibi_stride_b = alibi_stride_b;
  ptr.rng_state = in<int64_t>(a[6]);
  ptr.cu_seqlens_q = in<int32_t>(a[7]), ptr.cu_seqlens_k = in<int32_t>(a[8]);
  ptr.seqlens_k = in<int32_t>(a[9]), ptr.block_table = in<int32_t>(a[10]);
  ptr.o = reinterpret_cast<void*>(a[11]), ptr.lse = reinterpret_cast<void*>(a[12]);
  ptr.dout = in<void>(a[13]), ptr.dlse = in<void>(a[14]);
  ptr.dq = reinterpret_cast<void*>(a[15]), ptr.dk = reinterpret_cast<void*>(a[16]);
  ptr.dv = reinterpret_cast<void*>(a[17]), ptr.dbias = reinterpret_cast<void*>(a[18]);
  return ptr;
}

const Problem* problem_of(PyObject* x) {
  if (py::isinstance<Problem>(x)) return py::handle(x).cast<const Problem*>();
  PyErr_SetString(PyExc_TypeError, "problem must be a Problem");
  return nullptr;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::class_<Problem>(m, "Problem")
      .def(py::init(&attn::make_problem), py::kw_only(), py::arg("dtype"), py::arg("bias_dtype"),
           py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("o"),
           py::arg("mask"), py::arg("bias"), py::arg("lse"), py::arg("pages"), py::arg("scale"),
           py::arg("softcap"), py::arg("dropout_p"), py::arg("window_left"),
           py::arg("window_right"), py::arg("bottom_right"), py::arg("num_splits"))
      .def("set_gradient_strides", &attn::set_gradient_strides);

  m.def(
      "cpu_forward",
      [](const Problem& p, int threads, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t o,
         uintptr_t lse, uintptr_t mask, uintptr_t bias, uintptr_t alibi, int64_t alibi_stride_b,
         uintptr_t sink, uintptr_t rng_state, uintptr_t cu_seqlens_q, uintptr_t cu_seqlens_k,
         uintptr_t seqlens_k, uintptr_t block_table, uintptr_t max_logit, uintptr_t entropy) {
        Pointers ptr;
        ptr.q = in<void>(q), ptr.k = in<void>(k), ptr.v = in<void>(v);
        ptr.o = reinterpret_cast<void*>(o), ptr.lse = reinterpret_cast<void*>(lse);
        ptr.mask = in<void>(mask), ptr.bias = in<void>(bias);
        ptr.alibi_slopes = in<void>(alibi), ptr.alibi_stride_b = alibi_stride_b;
        ptr.sink = in<void>(sink), ptr.rng_state = in<int64_t>(rng_state);
        ptr.cu_seqlens_q = in<int32_t>(cu_seqlens_q), ptr.cu_seqlens_k = in<int32_t>(cu_seqlens_k);
        ptr.seqlens_k = in<int32_t>(seqlens_k), ptr.block_table = in<int32_t>(block_table);
        ptr.max_logit = reinterpret_cast<void*>(max_logit);
        ptr.entropy = reinterpret_cast<void*>(entropy);
        check(p, ptr, threads);
        py::gil_scoped_release release;
        attn::cpu::forward(p, ptr, threads);
      },
      "O, LSE (and row statistics) of one call; addresses, 0 where absent");

  m.def(
      "cpu_backward",
      [](const Problem& p, int threads, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t o,
         uintptr_t lse, uintptr_t mask, uintptr_t bias, uintptr_t alibi, int64_t alibi_stride_b,
         uintptr_t sink, uintptr_t rng_state, uintptr_t cu_seqlens_q, uintptr_t cu_seqlens_k,
         uintptr_t dout, uintptr_t dlse, uintptr_t dq, uintptr_t dk, uintptr_t dv, uintptr_t dbias,
         uintptr_t dsink) {
        Pointers ptr;
        ptr.q = in<void>(q), ptr.k = in<void>(k), ptr.v = in<void>(v);
        ptr.o = reinterpret_cast<void*>(o), ptr.lse = reinterpret_cast<void*>(lse);
        ptr.mask = in<void>(mask), ptr.bias = in<void>(bias);
        ptr.alibi_slopes = in<void>(alibi), ptr.alibi_stride_b = alibi_stride_b;
        ptr.sink = in<void>(sink), ptr.rng_state = in<int64_t>(rng_state);
        ptr.cu_seqlens_q = in<int32_t>(cu_seqlens_q), ptr.cu_seqlens_k = in<int32_t>(cu_seqlens_k);
        ptr.dout = in<void>(dout), ptr.dlse = in<void>(dlse);
        ptr.dq = reinterpret_cast<void*>(dq), ptr.dk = reinterpret_cast<void*>(dk);
        ptr.dv = reinterpret_cast<void*>(dv), ptr.dbias = reinterpret_cast<void*>(dbias);
        ptr.dsink = reinterpret_cast<void*>(dsink);
        check(p, ptr, threads);
        py::gil_scoped_release release;
        attn::cpu::backward(p, ptr, threads);
      },
      "Gradients of one call; addresses, 0 where absent or not wanted");

  m.def(
      "cpu_family",
      [](const Problem& p, int threads, bool is_backward, const Addresses& addresses,
         int64_t alibi_stride_b, bool sigmoid, std::optional<double> sigmoid_bias) {
        const Pointers ptr = pointers(addresses, alibi_stride_b);
        attn::cpu::Options options;
        options.sigmoid = sigmoid, options.length_bias = !sigmoid_bias;
        options.sigmoid_bias = sigmoid_bias.value_or(0);
        options.w = in<void>(addresses[19]);
        options.dw = reinterpret_cast<void*>(addresses[20]);
        check(p, ptr, threads);
        py::gil_scoped_release release;
        if (is_backward)
          attn::cpu::backward(p, ptr, options, threads);
        else
          attn::cpu::forward(p, ptr, options, threads);
      },
      "Sigmoid and additive attention; the order of the addresses is that of `Addresses`");

  m.def(
      "cpu_inspect",
      [](const Problem& p, int threads, int what, const Addresses& addresses,
         int64_t alibi_stride_b, bool sigmoid, std::optional<double> sigmoid_bias,
         std::array<int64_t, 3> sizes, uintptr_t out, uintptr_t entropy, uintptr_t keys) {
        const Pointers ptr = pointers(addresses, alibi_stride_b);
        attn::cpu::Options options;
        options.sigmoid = sigmoid, options.length_bias = !sigmoid_bias;
        options.sigmoid_bias = sigmoid_bias.value_or(0);
        options.w = in<void>(addresses[19]);
        attn::cpu::InspectOptions wanted;
        if (what < 0 || what > attn::cpu::InspectOptions::kPooledMap)
          throw std::invalid_argument("what must be 0 to 3, got " + std::to_string(what));
        wanted.what = attn::cpu::InspectOptions::What(what);
        wanted.n = sizes[0], wanted.rows = sizes[1], wanted.cols = sizes[2];
        wanted.out = reinterpret_cast<void*>(out);
        wanted.entropy = reinterpret_cast<void*>(entropy);
        wanted.keys = reinterpret_cast<int64_t*>(keys);
        check(p, ptr, threads);
        py::gil_scoped_release release;
        attn::cpu::inspect(p, ptr, options, wanted, threads);
      },
      "Row statistics (0), top-k keys (1), column mass (2) or pooled map (3) of a dense call");

  m.def("ceilings", &attn::cpu::ceiling, py::arg("name"), py::arg("isa") = "",
        py::arg("threads") = 1, py::arg("seconds") = 0.05, py::call_guard<py::gil_scoped_release>(),
        "What this machine reaches: fma, bf16 (GFLOP/s), exp (10^9/s) or read (GB/s)");

  m.def("use_openmp", &attn::cpu::use_openmp,
        "Run on the OpenMP team whose GOMP_parallel has this address; 0: on our own threads");
  m.def("supported_isas", &attn::cpu::supported_isas);
  m.def("isa", &attn::cpu::isa);
  m.def("set_isa", &attn::cpu::set_isa, "For tests: force an ISA of supported_isas(), '' = best");
  m.def("isa_table", &attn::cpu::isa_table,
        "For tests: (name, CPU features, addresses of kernels) of each ISA that was compiled");
  m.def("cpu_has", &attn::cpu::cpu_has,
        "For tests: whether this machine has the CPU features, named as in isa_table()");
  m.def("emulate_amx", &attn::cpu::amx::emulate,
        "For tests: take AMX for supported, since an emulator of its instructions is installed");

  if (!attn::add_dense_calls(m.ptr(), problem_of)) throw py::error_already_set();
}
