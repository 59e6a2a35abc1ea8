// The interpreter's lock, given up or taken for a block.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace attn::python {

struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

struct WithGil {
  PyGILState_STATE state = PyGILState_Ensure();
  ~WithGil() { PyGILState_Release(state); }
};

}  // namespace attn::python
