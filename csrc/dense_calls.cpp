// Reads torch's tensors through DLPack's exchange table (torch 2.10 and newer), a C interface that
// is the same in every version of torch, and by CPython's own calling convention: together a
// quarter of what attributes asked from Python and pybind11's conversions of each number cost.
// Where torch has no such table, `looks` is not used and addresses come from Tensor.data_ptr().
#include "dense_calls.h"

#include <array>
#include <climits>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <new>
#include <stdexcept>

#include "binding_parts.h"
#include "cpu/isa/dispatch.h"

namespace attn {
namespace {

constexpr int32_t kCPU = 1;

// The table behind type.__dlpack_c_exchange_api__; of its functions one is used here.
struct ExchangeTable {
  uint32_t major, minor;
  ExchangeTable* previous;
  void *allocate, *from_object, *to_object;
  int (*view)(void* object, DLTensor* out);  // 0, or -1 with Python's error set
  void* stream;
};

const ExchangeTable* exchange = nullptr;
PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;
PyObject *is_neg = nullptr, *data_ptr = nullptr;
HeldBy held_by = nullptr;

// use_exchange(table, Tensor, Parameter): whether the table is one that `looks` can read.
PyObject* use_exchange(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3 || !PyType_Check(args[1]) || !PyType_Check(args[2])) {
    PyErr_SetString(PyExc_TypeError, "use_exchange takes a capsule and two types");
    return nullptr;
  }
  void* table = PyCapsule_GetPointer(args[0], "dlpack_exchange_api");
  if (!table) return nullptr;
  const auto* found = static_cast<const ExchangeTable*>(table);
  if (found->major != 1 || !found->view) Py_RETURN_FALSE;
  for (int i = 1; i < 3; ++i) Py_INCREF(args[i]);  // for as long as the process lives
  tensor_type = reinterpret_cast<PyTypeObject*>(args[1]);
  parameter_type = reinterpret_cast<PyTypeObject*>(args[2]);
  exchange = found;
  Py_RETURN_TRUE;
}

constexpr int kMostTensors = 13, kMostDims = 8;

// Appends dtype, sizes and strides; false for what is no plain tensor of the CPU with its values
// as they are in memory.
bool append_look(PyObject* x, int64_t*& at) {
  if (x == Py_None) {
    *at++ = -1;
    return true;
  }
  if (Py_TYPE(x) != tensor_type && Py_TYPE(x) != parameter_type) return false;
  DLTensor seen;
  if (exchange->view(x, &seen) != 0) {  // sparse, or wrapped by a transform: it has no strides
    PyErr_Clear();
    return false;
  }
  if (seen.device_type != kCPU || seen.ndim > kMostDims) return false;
  PyObject* negated = PyObject_CallMethodNoArgs(x, is_neg);  // a view whose memory holds -x
  if (!negated) PyErr_Clear();
  Py_XDECREF(negated);
  if (negated != Py_False) return false;
  *at++ = int64_t(seen.lanes) << 32 | seen.code << 24 | seen.bits << 8 | seen.ndim;
  std::memcpy(at, seen.shape, sizeof(int64_t) * seen.ndim), at += seen.ndim;
  std::memcpy(at, seen.strides, sizeof(int64_t) * seen.ndim), at += seen.ndim;
  return true;
}

// looks(*tensors): bytes, equal for tensors that a kernel cannot tell apart but by their values and
// addresses; None where one of them is no tensor, or none that a plan can be kept for.
PyObject* looks(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!exchange || count > kMostTensors) Py_RETURN_NONE;
  std::array<int64_t, kMostTensors * (1 + 2 * kMostDims)> text;
  int64_t* at = text.data();
  for (Py_ssize_t i = 0; i < count; ++i)
    if (!append_look(args[i], at)) Py_RETURN_NONE;
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(text.data()),
                                   (at - text.data()) * Py_ssize_t(sizeof(int64_t)));
}

}  // namespace

bool view(PyObject* x, DLTensor& seen) {
  if (exchange && PyObject_TypeCheck(x, tensor_type)) return exchange->view(x, &seen) == 0;
  if (exchange)  // torch would read whatever lies there
    PyErr_Format(PyExc_TypeError, "a tensor is wanted, got %.80R", x);
  else
    PyErr_SetString(PyExc_RuntimeError, "use_exchange has not been called");
  return false;
}

namespace {

// Checks the call and runs the kernel; false with Python's error set.
bool guarded(const Held& held, const Pointers& pointers, int threads,
             const std::function<void()>& kernel) {
  try {
    check(*held.problem, pointers);
    check_at_least("num_threads", threads, 1);
    WithoutGil release;
    kernel();
    return true;
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const cpu::NotServed& error) {
    PyErr_SetString(PyExc_NotImplementedError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return false;
}

}  // namespace

bool read_threads(PyObject* x, int& threads) {
  if (!PyIndex_Check(x))
    return PyErr_Format(PyExc_TypeError, "num_threads must be an integer, got %.80R", x), false;
  const Py_ssize_t count = PyNumber_AsSsize_t(x, nullptr);
  if (PyErr_Occurred()) return false;
  if (count >= 1 && count <= INT_MAX) return threads = int(count), true;
  return PyErr_Format(PyExc_ValueError, "num_threads must be at least 1 and an int, got %.80R", x),
         false;
}

bool compute(Kernel kernel, const Held& held, const Pointers& pointers, int threads) {
  return guarded(held, pointers, threads,
                 [&] { kernel(*held.problem, pointers, *held.options, threads); });
}

namespace {

// Finds the address of a tensor's first element, nullptr for None; false with Python's error set.
bool find_address(PyObject* x, void*& found) {
  found = nullptr;
  if (x == Py_None) return true;
  if (exchange && (Py_TYPE(x) == tensor_type || Py_TYPE(x) == parameter_type)) {
    DLTensor seen;
    if (exchange->view(x, &seen) != 0) return false;
    found = address_of(seen);
    return true;
  }
  PyObject* number = PyObject_CallMethodNoArgs(x, data_ptr);
  if (!number) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return false;
    return PyErr_Format(PyExc_TypeError, "a tensor or None is wanted, got %.80R", x), false;
  }
  found = PyLong_AsVoidPtr(number);
  Py_DECREF(number);
  return !PyErr_Occurred();
}

constexpr int kMostAddresses = 12;
using Addresses = std::array<void*, kMostAddresses>;

// Runs a kernel on (call, threads, tensors...).  `fill` takes the `wanted` tensors' addresses in
// their order.
PyObject* run(Kernel kernel, PyObject* const* args, Py_ssize_t count, Py_ssize_t wanted,
              void (*fill)(Pointers&, const Addresses&)) {
  if (count != 2 + wanted)
    return PyErr_Format(PyExc_TypeError,
                        "a call, threads and %zd tensors are wanted, got %zd arguments", wanted,
                        count);
  const Held held = held_by(args[0]);
  if (!held.problem) return nullptr;
  int threads;
  if (!read_threads(args[1], threads)) return nullptr;
  Addresses at{};
  for (Py_ssize_t i = 0; i < wanted; ++i)
    if (!find_address(args[2 + i], at[i])) return nullptr;
  Pointers pointers;
  fill(pointers, at);
  if (!compute(kernel, held, pointers, threads)) return nullptr;
  Py_RETURN_NONE;
}

// dense_forward(call, threads, q, k, v, mask, bias, out, lse): O, and LSE where it is no None.
PyObject* dense_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return run(cpu::forward, args, count, 7, [](Pointers& p, const Addresses& at) {
    p.q = at[0], p.k = at[1], p.v = at[2], p.mask = at[3], p.bias = at[4];
    p.o = at[5], p.lse = at[6];
  });
}

// dense_backward(call, threads, q, k, v, mask, bias, out, lse, dout, dq, dk, dv, dbias): the
// gradients that are no None; dbias is added to.
PyObject* dense_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return run(cpu::backward, args, count, 12, [](Pointers& p, const Addresses& at) {
    p.q = at[0], p.k = at[1], p.v = at[2], p.mask = at[3], p.bias = at[4];
    p.o = at[5], p.lse = at[6], p.dout = at[7];
    p.dq = at[8], p.dk = at[9], p.dv = at[10], p.dbias = at[11];
  });
}

// The tensors of a side of a second pass, of the call or of its tangents, in their order.
constexpr int kSide = 12;
bool read_side(PyObject* const* args, Pointers& p) {
  std::array<void*, kSide> at{};
  for (int i = 0; i < kSide; ++i)
    if (!find_address(args[i], at[i])) return false;
  p.q = at[0], p.k = at[1], p.v = at[2], p.bias = at[3];
  p.o = at[4], p.lse = at[5], p.dout = at[6], p.dlse = at[7];
  p.dq = at[8], p.dk = at[9], p.dv = at[10], p.dbias = at[11];
  return true;
}

// second_pass(backward, call, tangents, threads, mask, (q, k, v, bias, out, lse, dout, dlse, dq,
// dk, dv, dbias) of the call, the same of its tangents): cpu::backward_tangent or cpu::tangent of a
// dense call; whether the kernel served it.
PyObject* second_pass(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 5 + 2 * kSide)
    return PyErr_Format(PyExc_TypeError, "%d arguments are wanted, got %zd", 5 + 2 * kSide, count);
  const auto kernel = args[0] == Py_True ? cpu::backward_tangent : cpu::tangent;
  const Held call = held_by(args[1]);
  const Held tangents = call.problem ? held_by(args[2]) : Held{};
  if (!tangents.problem) return nullptr;
  int threads;
  if (!read_threads(args[3], threads)) return nullptr;
  Pointers ptr, tptr;
  void* mask;
  if (!find_address(args[4], mask) || !read_side(args + 5, ptr) ||
      !read_side(args + 5 + kSide, tptr))
    return nullptr;
  ptr.mask = mask;
  if (call.problem->dtype == DType::kFloat64)
    return PyErr_Format(PyExc_ValueError,
                        "dtype must be float32, bfloat16 or float16, got float64");
  bool served = false;
  if (!guarded(call, ptr, threads, [&] {
        served = kernel(*call.problem, ptr, *call.options, *tangents.problem, tptr, threads);
      }))
    return nullptr;
  return PyBool_FromLong(served);
}

PyMethodDef methods[] = {
    {"use_exchange", fastcall<use_exchange>(), METH_FASTCALL,
     "Whether tensors can be read through this DLPack exchange table"},
    {"looks", fastcall<looks>(), METH_FASTCALL,
     "All of CPU tensors that a plan depends on, as bytes; None where there is no plan"},
    {"dense_forward", fastcall<dense_forward>(), METH_FASTCALL,
     "O (and LSE) of a dense call: call, threads, q, k, v, mask, bias, out, lse"},
    {"dense_backward", fastcall<dense_backward>(), METH_FASTCALL,
     "Gradients of a dense call: call, threads, q, k, v, mask, bias, out, lse, dout, dq, dk, "
     "dv, dbias"},
    {"second_pass", fastcall<second_pass>(), METH_FASTCALL,
     "A pass of second derivatives of a dense call"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_dense_calls(PyObject* module, HeldBy of) {
  held_by = of;
  is_neg = PyUnicode_InternFromString("is_neg");
  data_ptr = PyUnicode_InternFromString("data_ptr");
  return is_neg && data_ptr && PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace attn
