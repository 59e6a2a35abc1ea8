// The short way of small calls: functions of attn_ext._C that take torch's tensors themselves.
// dense_calls.cpp has those of dense calls, cache_calls.cpp those of a cache of keys and values.
#pragma once
#include <Python.h>

#include <cstdint>

#include "cpu/kernels/options.h"
#include "params.h"

namespace attn {

// What a native call holds but for its addresses.
struct Held {
  const Problem* problem = nullptr;
  const cpu::Options* options = nullptr;
};

// What a Python object holds; nothing, with Python's error set, where it is no native call.
using HeldBy = Held (*)(PyObject*);

// Adds use_exchange, looks, dense_forward and dense_backward to the module; false with Python's
// error set.
bool add_dense_calls(PyObject* module, HeldBy held_by);

// Adds decode_forward, cache_write and cache_publish, which only serve where use_exchange was True.
bool add_cache_calls(PyObject* module, HeldBy held_by);

// DLPack 1.x (dmlc.github.io/dlpack): a tensor that its owner keeps.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

// A tensor through the table that use_exchange was given; false with Python's error set.
bool view(PyObject* x, DLTensor& seen);

inline void* address_of(const DLTensor& x) { return static_cast<char*>(x.data) + x.byte_offset; }

struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

// A number of threads; false with Python's error set.
bool read_threads(PyObject* x, int& threads);

using Kernel = void (*)(const Problem&, const Pointers&, const cpu::Options&, int);

// Runs the kernel; false with Python's error set.
bool compute(Kernel kernel, const Held& held, const Pointers& pointers, int threads);

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyCFunction fastcall() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace attn
