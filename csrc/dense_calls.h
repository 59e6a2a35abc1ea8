// The short way of small dense calls: functions of attn_ext._C that take torch's tensors
// themselves.
#pragma once
#include <Python.h>

#include "params.h"

namespace attn {

// The Problem that a Python object holds; nullptr with Python's error set where it holds none.
using ProblemOf = const Problem* (*)(PyObject*);

// Adds use_exchange, looks, dense_forward and dense_backward to the module; false with Python's
// error set.
bool add_dense_calls(PyObject* module, ProblemOf problem_of);

}  // namespace attn
