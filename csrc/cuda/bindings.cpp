// What attn_ext._cuda and attn_ext._emulated have in common: integers and flat structs in, nothing
// else.  The Python side has validated what the pointers mean (attn_ext/backends/native_gpu.py).
// The GIL is released in every call.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../binding_call.h"
#include "launch.h"
#ifndef ATTN_EMULATED
#include "driver.h"
#endif

namespace attn::cuda {
namespace {

using python::function;
using python::method;
using python::WithoutGil;

// For questions about a call: no device is asked.
Target target(int multiprocessors, bool sm90) { return {0, 0, multiprocessors, sm90, 0}; }

void run_forward(const NativeCall& c, uintptr_t workspace, const Target& target) {
  on_device(target, [&](Executor& to) {
    forward(c.p, c.ptr, reinterpret_cast<float*>(workspace), target, to);
  });
}

// Keeps of launches what needs no GPU.
class List : public Executor {
 public:
  using Entry = std::tuple<std::string, int, int>;  // kernel, threads, bytes of shared memory
  std::vector<Entry> entries;

  void launch(const Launch& x) override { entries.push_back({x.kernel, x.threads, x.smem_bytes}); }
  ptx::TensorMap tensor_map(const ptx::TensorSpec&) override { return {}; }
};

std::vector<List::Entry> launches(const NativeCall& c, bool is_backward, int multiprocessors,
                                  bool sm90, int shared_memory) {
  check(c.p, c.ptr);
  const Target target = {0, 0, multiprocessors, sm90, shared_memory};
  List list;
  (is_backward ? backward : forward)(c.p, c.ptr, reinterpret_cast<float*>(128), target, list);
  return list.entries;
}

void set_rows(NativeCall& c, int64_t rows_q, int64_t rows_k) {
  c.p.rows_q = rows_q, c.p.rows_k = rows_k;
}

int64_t workspace_of_forward(const NativeCall& c, int multiprocessors) {
  check(c.p, c.ptr);
  return forward_workspace(c.p, c.ptr, target(multiprocessors, false));
}

int64_t workspace_of_backward(const NativeCall& c, bool sm90, std::optional<int> device) {
  check(c.p, c.ptr);
  const int index = device.value_or(0);
  return backward_workspace(c.p, c.ptr, {index, 0, 1, sm90, shared_memory(index)});
}

std::string kernel_of_forward(const NativeCall& c, int multiprocessors, bool sm90) {
  check(c.p, c.ptr);
  return forward_kernel(c.p, c.ptr, target(multiprocessors, sm90));
}

std::string kernel_of_backward(const NativeCall& c, int multiprocessors, bool sm90) {
  check(c.p, c.ptr);
  Target where = target(multiprocessors, sm90);
  where.shared_memory = shared_memory(0);
  return backward_kernel(c.p, c.ptr, where);
}

void call_forward(const NativeCall& c, uintptr_t workspace, int device, uintptr_t stream,
                  int multiprocessors, bool sm90) {
  check(c.p, c.ptr);
  const WithoutGil release;
  run_forward(c, workspace, {device, stream, multiprocessors, sm90, 0});
}

void plain_forward(const NativeCall& shared, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t o,
                   uintptr_t lse, int device, uintptr_t stream, int multiprocessors, bool sm90) {
  NativeCall c = shared;  // other threads may be in the same call without the GIL
  c.ptr.q = reinterpret_cast<const void*>(q);
  c.ptr.k = reinterpret_cast<const void*>(k);
  c.ptr.v = reinterpret_cast<const void*>(v);
  c.ptr.o = reinterpret_cast<void*>(o), c.ptr.lse = reinterpret_cast<void*>(lse);
  call_forward(c, 0, device, stream, multiprocessors, sm90);
}

void call_backward(const NativeCall& c, uintptr_t workspace, int device, uintptr_t stream,
                   int multiprocessors, bool sm90) {
  check(c.p, c.ptr);
  const WithoutGil release;
  const Target where = {device, stream, multiprocessors, sm90, shared_memory(device)};
  on_device(where, [&](Executor& to) {
    backward(c.p, c.ptr, reinterpret_cast<float*>(workspace), where, to);
  });
}

PyMethodDef methods[] = {
    gradients_method<NativeCall>(),
    addresses_method<NativeCall>(),
    method<&set_rows>("set_rows", "self, rows_q, rows_k", "Rows of packed sequences in all"),
    method<&workspace_of_forward>("forward_workspace", "self, multiprocessors",
                                  "Floats of scratch that forward needs"),
    method<&kernel_of_forward>(
        "forward_kernel", "self, multiprocessors, sm90",
        "What forward launches: 'sm90', 'sm80 plain', 'sm80 features' or 'sm80 general'"),
    method<&kernel_of_backward>("backward_kernel", "self, multiprocessors, sm90",
                                "What backward launches, in the words of forward_kernel"),
    method<&workspace_of_backward>(
        "backward_workspace", "self, sm90, device",
        "Floats of scratch that backward needs on a device, once all addresses are set"),
    method<&call_forward>("forward", "self, workspace, device, stream, multiprocessors, sm90",
                          "O, LSE (and row statistics); asynchronous on the stream"),
    method<&plain_forward>("plain_forward",
                           "self, q, k, v, o, lse, device, stream, multiprocessors, sm90",
                           "forward without scratch or side inputs, of the five addresses given"),
    method<&call_backward>("backward", "self, workspace, device, stream, multiprocessors, sm90",
                           "The gradients whose addresses are set; asynchronous on the stream"),
    method<&launches>(
        "launches", "self, backward, multiprocessors, sm90, shared_memory",
        "(kernel as C++ names it, threads, bytes of shared memory) of each launch that the call "
        "would make on such a device; nothing runs"),
    {}};

PyMethodDef device_functions[] = {
    function<&device_problem>(
        "device_problem", "device",
        "'' when kernels run on the device, else the reason; makes no context"),
    function<&multiprocessors>("multiprocessors", "device"),
    function<&sm90_problem>("sm90_problem", "device",
                            "'' when the device is a Hopper GPU, else the reason"),
    {}};

}  // namespace

void bind(PyObject* module) {
  add_call<NativeCall>(module, methods);
  python::add_functions(module, device_functions);
}

#ifndef ATTN_EMULATED
namespace {

void set_compile(PyObject* compile) {
  Py_INCREF(compile);  // for good: a call may come from a thread that outlives the interpreter
  driver::set_compile([compile](const std::string& kernel, int capability) {
    const python::WithGil gil;
    const python::Owned image =
        python::made(PyObject_CallFunction(compile, "si", kernel.c_str(), capability));
    const char *symbol, *cubin;
    Py_ssize_t size;
    if (!PyArg_ParseTuple(image.get(), "sy#", &symbol, &cubin, &size)) throw python::Raised();
    return driver::Image{symbol, std::string(cubin, size_t(size))};
  });
}

PyMethodDef driver_functions[] = {
    function<&set_compile>(
        "set_compile", "compile",
        "compile(kernel as C++ names it, 10 * major + minor) -> (symbol, machine code)"),
    function<&driver::version>("driver_version", "",
                               "1000 * major + 10 * minor of CUDA; 0: no driver"),
    function<&driver::problem>("driver_problem", "",
                               "'' when NVIDIA's driver is there, else the reason"),
    function<&driver::capability>("capability", "device", "10 * major + minor of a device"),
    function<&driver::open>("open_driver", "path",
                            "For tests: this library is the driver from now on"),
    {}};

void fill(PyObject* module) {
  bind(module);
  python::add_functions(module, driver_functions);
}

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "attn_ext._cuda",
                          "The CUDA kernels of attn_ext",
                          -1,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace
#endif

}  // namespace attn::cuda

#ifndef ATTN_EMULATED
PyMODINIT_FUNC PyInit__cuda() {
  return attn::python::make_module(attn::cuda::definition, attn::cuda::fill);
}
#endif
