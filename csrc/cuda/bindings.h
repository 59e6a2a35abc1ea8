// The functions of attn_ext._C.cuda, which attn_ext._emulated has, too: integers and flat structs
// in, nothing else.  The Python side has validated what the pointers mean
// (attn_ext/backends/native_gpu.py).  The GIL is released in every call.
//
// A header, since pybind11's own take longer to compile than all of this: the file of each module
// includes it.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

#include "../binding_call.h"
#include "launch.h"
#ifndef ATTN_EMULATED
#include "driver.h"
#endif

namespace py = pybind11;

namespace attn::cuda {

// For questions about a call: no device is asked.
inline Target target(int multiprocessors, bool sm90) { return {0, 0, multiprocessors, sm90, 0}; }

inline void run_forward(const NativeCall& c, uintptr_t workspace, Target target) {
  if (target.sm90) target.l2_bytes = l2_bytes(target.device);
  on_device(target, [&](Executor& to) {
    forward(c.p, c.ptr, reinterpret_cast<float*>(workspace), target, to);
  });
}

// Keeps of launches what needs no GPU.
class List : public Executor {
 public:
  struct Entry {
    std::string kernel;
    int threads, smem_bytes;
  };
  std::vector<Entry> entries;

  void launch(const Launch& x) override { entries.push_back({x.kernel, x.threads, x.smem_bytes}); }
  ptx::TensorMap tensor_map(const ptx::TensorSpec&) override { return {}; }
  void clear(int*, int64_t) override {}
};

inline py::list launches(const NativeCall& c, bool is_backward, int multiprocessors, bool sm90,
                         int shared_memory) {
  check(c.p, c.ptr);
  const Target target = {0, 0, multiprocessors, sm90, shared_memory};
  List list;
  (is_backward ? backward : forward)(c.p, c.ptr, reinterpret_cast<float*>(128), target, list);
  py::list found;
  for (const List::Entry& each : list.entries)
    found.append(py::make_tuple(each.kernel, each.threads, each.smem_bytes));
  return found;
}

inline void bind(py::module_& m) {
  define_call<NativeCall>(m)
      .def(
          "set_rows", +[](NativeCall& c, int64_t rows_q,
                          int64_t rows_k) { c.p.rows_q = rows_q, c.p.rows_k = rows_k; })
      .def(
          "set_part", +[](NativeCall& c) { c.p.part = true; },
          doc("Results in float32; a backward is told the delta of whole rows as dlse"))
      .def(
          "forward_workspace",
          +[](const NativeCall& c, int multiprocessors, bool sm90) {
            check(c.p, c.ptr);
            return forward_workspace(c.p, c.ptr, target(multiprocessors, sm90));
          },
          doc("Floats of scratch that forward needs, once the addresses of inputs are set"))
      .def(
          "forward_kernel",
          +[](const NativeCall& c, int multiprocessors, bool sm90) {
            check(c.p, c.ptr);
            return forward_kernel(c.p, c.ptr, target(multiprocessors, sm90));
          },
          doc("What forward launches: 'sm90', 'sm80 plain', 'sm80 features' or 'sm80 general'"))
      .def(
          "backward_kernel",
          +[](const NativeCall& c, int multiprocessors, bool sm90) {
            check(c.p, c.ptr);
            Target where = target(multiprocessors, sm90);
            where.shared_memory = shared_memory(0);
            return backward_kernel(c.p, c.ptr, where);
          },
          doc("What backward launches, in the words of forward_kernel"))
      .def(
          "backward_workspace",
          +[](const NativeCall& c, bool sm90, int device) {
            check(c.p, c.ptr);
            return backward_workspace(c.p, c.ptr, {device, 0, 1, sm90, shared_memory(device)});
          },
          py::arg("sm90"), py::arg("device") = 0,
          doc("Floats of scratch that backward needs on a device, once all addresses are set"))
      .def(
          "forward",
          +[](const NativeCall& c, uintptr_t workspace, int device, uintptr_t stream,
              int multiprocessors, bool sm90) {
            check(c.p, c.ptr);
            py::gil_scoped_release release;
            run_forward(c, workspace, {device, stream, multiprocessors, sm90, 0});
          },
          doc("O, LSE (and row statistics); asynchronous on the stream"))
      .def(
          "plain_forward",
          +[](const NativeCall& shared, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t o,
              uintptr_t lse, uintptr_t workspace, int device, uintptr_t stream, int multiprocessors,
              bool sm90) {
            NativeCall c = shared;  // other threads may be in the same call without the GIL
            c.ptr.q = reinterpret_cast<const void*>(q);
            c.ptr.k = reinterpret_cast<const void*>(k);
            c.ptr.v = reinterpret_cast<const void*>(v);
            c.ptr.o = reinterpret_cast<void*>(o), c.ptr.lse = reinterpret_cast<void*>(lse);
            check(c.p, c.ptr);
            py::gil_scoped_release release;
            run_forward(c, workspace, {device, stream, multiprocessors, sm90, 0});
          },
          doc("forward without side inputs, of the addresses given"))
      .def(
          "backward",
          +[](const NativeCall& c, uintptr_t workspace, int device, uintptr_t stream,
              int multiprocessors, bool sm90) {
            check(c.p, c.ptr);
            py::gil_scoped_release release;
            const Target where = {device, stream, multiprocessors, sm90, shared_memory(device)};
            on_device(where, [&](Executor& to) {
              backward(c.p, c.ptr, reinterpret_cast<float*>(workspace), where, to);
            });
          },
          doc("The gradients whose addresses are set; asynchronous on the stream"))
      .def("launches", &launches, py::arg("backward"), py::arg("multiprocessors"), py::arg("sm90"),
           py::arg("shared_memory"),
           "(kernel as C++ names it, threads, bytes of shared memory) of each launch that the call "
           "would make on such a device; nothing runs");
  m.def("device_problem", &device_problem,
        "'' when kernels run on the device, else the reason; makes no context");
  m.def("multiprocessors", &multiprocessors);
  m.def("sm90_problem", &sm90_problem, "'' when the device is a Hopper GPU, else the reason");
}

#ifndef ATTN_EMULATED
inline void set_compile(const py::object& compile) {
  // kept for good: the call may come from a thread that outlives the interpreter's last statement
  auto* held = new py::object(compile);
  driver::set_compile([held](const std::string& kernel, int capability) {
    const py::gil_scoped_acquire gil;
    const auto [symbol, cubin] =
        (*held)(kernel, capability).cast<std::pair<std::string, py::bytes>>();
    return driver::Image{symbol, std::string(cubin)};
  });
}

// bind, and what only real devices need.
inline void bind_driver(py::module_& m) {
  bind(m);
  m.def("set_compile", &set_compile, py::arg("compile"),
        "compile(kernel as C++ names it, 10 * major + minor) -> (symbol, machine code)");
  m.def("driver_version", &driver::version, "1000 * major + 10 * minor of CUDA; 0: no driver");
  m.def("driver_problem", &driver::problem, "'' when NVIDIA's driver is there, else the reason");
  m.def("capability", &driver::capability, "10 * major + minor of a device");
  m.def("open_driver", &driver::open, py::arg("path"),
        "For tests: this library is the driver from now on");
}
#endif

}  // namespace attn::cuda
