// attn_ext._cuda (and the kernels' half of attn_ext._emulated): integers and flat structs in,
// nothing else.  The Python side has validated what the pointers mean (attn_ext/backends/cuda.py).
// The GIL is released in every call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../binding_call.h"
#include "launch.h"

namespace py = pybind11;

namespace attn::cuda {
namespace {

Target target(int device, uintptr_t stream, int multiprocessors, bool sm90) {
  return {device, stream, multiprocessors, sm90};
}

}  // namespace

void bind(py::module_& m) {
  define_call<NativeCall>(m)
      .def("set_rows", [](NativeCall& c, int64_t rows_q,
                          int64_t rows_k) { c.p.rows_q = rows_q, c.p.rows_k = rows_k; })
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
