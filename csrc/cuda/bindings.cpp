// attn_ext._cuda (and the kernels' half of attn_ext._emulated): integers and flat structs in,
// nothing else.  The Python side has validated what the pointers mean (attn_ext/backends/cuda.py).
// The GIL is released in every call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../binding_parts.h"
#include "launch.h"

namespace py = pybind11;

namespace attn::cuda {
namespace {

// Problem and addresses of one call.
struct NativeCall {
  Problem p;
  Pointers ptr;
};

// The addresses of a call by the names of params.h.
struct Field {
  const char* name;
  void (*set)(Pointers&, uintptr_t);
};
#define ATTN_FIELD(field)                                     \
  Field {                                                     \
    #field, [](Pointers& x, uintptr_t address) {              \
      x.field = reinterpret_cast<decltype(x.field)>(address); \
    }                                                         \
  }
const Field kFields[] = {
    ATTN_FIELD(q),
    ATTN_FIELD(k),
    ATTN_FIELD(v),
    ATTN_FIELD(mask),
    ATTN_FIELD(bias),
    ATTN_FIELD(alibi_slopes),
    ATTN_FIELD(sink),
    ATTN_FIELD(rng_state),
    ATTN_FIELD(cu_seqlens_q),
    ATTN_FIELD(cu_seqlens_k),
    ATTN_FIELD(seqlens_k),
    ATTN_FIELD(block_table),
    ATTN_FIELD(o),
    ATTN_FIELD(lse),
    ATTN_FIELD(max_logit),
    ATTN_FIELD(entropy),
    ATTN_FIELD(dout),
    ATTN_FIELD(dlse),
    ATTN_FIELD(dq),
    ATTN_FIELD(dk),
    ATTN_FIELD(dv),
    ATTN_FIELD(dbias),
    ATTN_FIELD(dsink),
};
#undef ATTN_FIELD

void set_address(Pointers& x, const std::string& name, uintptr_t address) {
  for (const Field& field : kFields)
    if (name == field.name) return field.set(x, address);
  throw std::invalid_argument("no pointer is called " + name);
}

Target target(int device, uintptr_t stream, int multiprocessors, bool sm90) {
  return {device, stream, multiprocessors, sm90};
}

}  // namespace

void bind(py::module_& m) {
  py::class_<NativeCall>(m, "Call", py::module_local())
      .def(py::init([](int dtype, int bias_dtype, std::array<int64_t, 7> sizes,
                       std::array<int64_t, 2> rows, Triple q, Triple k, Triple v, Triple o,
                       Quad mask, Quad bias, std::array<int64_t, 2> lse,
                       std::array<int64_t, 2> pages, double scale, double softcap, double dropout_p,
                       int64_t window_left, int64_t window_right, int bottom_right,
                       int64_t num_splits, int64_t alibi_stride_b) {
             NativeCall c;
             c.p = make_problem(dtype, bias_dtype, sizes, q, k, v, o, mask, bias, lse, pages, scale,
                                softcap, dropout_p, window_left, window_right, bottom_right,
                                num_splits);
             c.p.rows_q = rows[0], c.p.rows_k = rows[1];
             c.ptr.alibi_stride_b = alibi_stride_b;
             return c;
           }),
           py::kw_only(), py::arg("dtype"), py::arg("bias_dtype"), py::arg("sizes"),
           py::arg("rows"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("o"), py::arg("mask"),
           py::arg("bias"), py::arg("lse"), py::arg("pages"), py::arg("scale"), py::arg("softcap"),
           py::arg("dropout_p"), py::arg("window_left"), py::arg("window_right"),
           py::arg("bottom_right"), py::arg("num_splits"), py::arg("alibi_stride_b"))
      .def("set_gradients",
           [](NativeCall& c, Triple dout, Triple dq, Triple dk, Triple dv, Quad dbias,
              bool deterministic) {
             set_gradient_strides(c.p, dout, dq, dk, dv, dbias);
             c.p.deterministic = deterministic;
           })
      .def(
          "set_addresses",
          [](NativeCall& c, const py::dict& addresses) {
            for (const auto& [name, address] : addresses)
              set_address(c.ptr, py::cast<std::string>(name), py::cast<uintptr_t>(address));
          },
          "Device addresses by the names of params.h; absent ones are null")
      .def(
          "forward_workspace",
          [](const NativeCall& c, int multiprocessors) {
            check(c.p, c.ptr);
            return forward_workspace(c.p, c.ptr, target(0, 0, multiprocessors, false));
          },
          "Floats of scratch that forward needs")
      .def(
          "forward_kernel",
          [](const NativeCall& c, int multiprocessors, bool sm90) {
            check(c.p, c.ptr);
            return forward_kernel(c.p, c.ptr, target(0, 0, multiprocessors, sm90));
          },
          "What forward launches: 'sm90', 'sm80 plain' or 'sm80 general'")
      .def(
          "backward_kernel",
          [](const NativeCall& c, int multiprocessors, bool sm90) {
            check(c.p, c.ptr);
            return backward_kernel(c.p, c.ptr, target(0, 0, multiprocessors, sm90));
          },
          "What backward launches, in the words of forward_kernel")
      .def(
          "backward_workspace",
          [](const NativeCall& c, bool sm90, int device) {
            check(c.p, c.ptr);
            return backward_workspace(c.p, c.ptr, target(device, 0, 1, sm90));
          },
          py::arg("sm90"), py::arg("device") = 0,
          "Floats of scratch that backward needs on a device, once all addresses are set")
      .def(
          "forward",
          [](const NativeCall& c, uintptr_t workspace, int device, uintptr_t stream,
             int multiprocessors, bool sm90) {
            check(c.p, c.ptr);
            py::gil_scoped_release release;
            forward(c.p, c.ptr, reinterpret_cast<float*>(workspace),
                    target(device, stream, multiprocessors, sm90));
          },
          "O, LSE (and row statistics); asynchronous on the stream")
      .def(
          "plain_forward",
          [](const NativeCall& shared, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t o,
             uintptr_t lse, int device, uintptr_t stream, int multiprocessors, bool sm90) {
            NativeCall c = shared;  // other threads may be in the same call without the GIL
            c.ptr.q = reinterpret_cast<const void*>(q);
            c.ptr.k = reinterpret_cast<const void*>(k);
            c.ptr.v = reinterpret_cast<const void*>(v);
            c.ptr.o = reinterpret_cast<void*>(o), c.ptr.lse = reinterpret_cast<void*>(lse);
            check(c.p, c.ptr);
            py::gil_scoped_release release;
            forward(c.p, c.ptr, nullptr, target(device, stream, multiprocessors, sm90));
          },
          "forward without scratch or side inputs, of the five addresses given")
      .def(
          "backward",
          [](const NativeCall& c, uintptr_t workspace, int device, uintptr_t stream,
             int multiprocessors, bool sm90) {
            check(c.p, c.ptr);
            py::gil_scoped_release release;
            backward(c.p, c.ptr, reinterpret_cast<float*>(workspace),
                     target(device, stream, multiprocessors, sm90));
          },
          "The gradients whose addresses are set; asynchronous on the stream");
  m.def("device_problem", &device_problem,
        "'' when this build has kernels for the device, else the reason; makes no context");
  m.def("kernel_problem", &kernel_problem,
        "'' when the driver loads a kernel of this build on the device, else CUDA's text");
  m.def("multiprocessors", &multiprocessors);
  m.def("sm90_problem", &sm90_problem,
        "'' when this build has Hopper kernels and the device is one, else the reason");
}

}  // namespace attn::cuda

#ifndef ATTN_EMULATED
PYBIND11_MODULE(_cuda, m) { attn::cuda::bind(m); }
#endif
