// The short way of small dense calls: functions of attn_ext._C that take torch's tensors
// themselves.
#pragma once
#include <Python.h>

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

}  // namespace attn
