// C++ functions as functions and methods of a Python module, by CPython's C interface alone: what
// the bindings need of such a layer, whose templates compile in a tenth of pybind11's time.
//
//   PyMethodDef methods[] = {method<&forward>("forward", "self, threads", "O and LSE"), {}};
//
// The text of names gives each parameter, also by keyword.  A std::optional parameter may be absent
// or None.  A Python error on the way is the C++ exception Raised.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "gil.h"

namespace attn::python {

// A reference that is given back.
class Owned {
 public:
  explicit Owned(PyObject* x = nullptr) : x_(x) {}
  Owned(Owned&& other) noexcept : x_(std::exchange(other.x_, nullptr)) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(x_, other.x_);
    return *this;
  }
  ~Owned() { Py_XDECREF(x_); }
  PyObject* get() const { return x_; }
  PyObject* release() { return std::exchange(x_, nullptr); }

 private:
  PyObject* x_;
};

// Python's current error, taken from the thread that has it; made and restored with the GIL.
class Raised : public std::exception {
 public:
  Raised() : error_(new Error, dropped) {
    PyErr_Fetch(&error_->type, &error_->value, &error_->trace);
  }
  const char* what() const noexcept override { return "an error of Python"; }
  void restore() const {
    Py_XINCREF(error_->type), Py_XINCREF(error_->value), Py_XINCREF(error_->trace);
    PyErr_Restore(error_->type, error_->value, error_->trace);
  }

 private:
  struct Error {
    PyObject *type, *value, *trace;
  };
  static void dropped(Error* e) {
    const WithGil gil;
    Py_XDECREF(e->type), Py_XDECREF(e->value), Py_XDECREF(e->trace);
    delete e;
  }
  std::shared_ptr<Error> error_;
};

inline Owned made(PyObject* x) {
  if (!x) throw Raised();
  return Owned(x);
}

[[noreturn]] inline void refuse(const char* wanted, PyObject* got) {
  PyErr_Format(PyExc_TypeError, "%s is wanted, got %.100s", wanted, Py_TYPE(got)->tp_name);
  throw Raised();
}

// Sets Python's error for the exception that is being handled.
inline void set_error() {
  try {
    throw;
  } catch (const Raised& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  } catch (...) {
    PyErr_SetString(PyExc_RuntimeError, "an unknown exception of C++");
  }
}

// ---- Python to C++ ------------------------------------------------------------------------------

// A whole number, or what has __index__, but no float.
inline int64_t whole(PyObject* x) {
  const Owned number = made(PyNumber_Index(x));
  const int64_t value = PyLong_AsLongLong(number.get());
  if (value == -1 && PyErr_Occurred()) throw Raised();
  return value;
}

inline uintptr_t address(PyObject* x) {
  const Owned number = made(PyNumber_Index(x));
  const uintptr_t value = PyLong_AsSize_t(number.get());
  if (value == uintptr_t(-1) && PyErr_Occurred()) throw Raised();
  return value;
}

inline double real(PyObject* x) {
  const double value = PyFloat_AsDouble(x);
  if (value == -1 && PyErr_Occurred()) throw Raised();
  return value;
}

inline bool truth(PyObject* x) {
  if (!PyBool_Check(x)) refuse("a bool", x);
  return x == Py_True;
}

inline std::string text(PyObject* x) {
  Py_ssize_t size = 0;
  if (!PyUnicode_Check(x)) refuse("a str", x);
  const char* data = PyUnicode_AsUTF8AndSize(x, &size);
  if (!data) throw Raised();
  return {data, size_t(size)};
}

// A dict that the caller holds.
struct Dict {
  PyObject* x;
  size_t size() const { return size_t(PyDict_Size(x)); }
  PyObject* at(const char* name) const {
    PyObject* found = PyDict_GetItemString(x, name);
    if (found) return found;
    PyErr_SetString(PyExc_KeyError, name);
    throw Raised();
  }
  template <class Use>
  void each(const Use& use) const {
    PyObject *key, *value;
    for (Py_ssize_t i = 0; PyDict_Next(x, &i, &key, &value);) use(key, value);
  }
};

// The classes that make_type made.
template <class T>
inline PyTypeObject* type_of = nullptr;

template <class T>
struct Object {
  PyObject head;
  T value;
};

template <class T>
struct Convert {  // of an object of a class
  static T& from(PyObject* x) {
    if (!PyObject_TypeCheck(x, type_of<T>)) refuse(type_of<T>->tp_name, x);
    return reinterpret_cast<Object<T>*>(x)->value;
  }
};
template <>
struct Convert<int64_t> {
  static int64_t from(PyObject* x) { return whole(x); }
};
template <>
struct Convert<int> {
  static int from(PyObject* x) {
    const int64_t value = whole(x);
    if (value == int(value)) return int(value);
    PyErr_Format(PyExc_OverflowError, "%lld is no 32-bit number", (long long)value);
    throw Raised();
  }
};
template <>
struct Convert<uintptr_t> {
  static uintptr_t from(PyObject* x) { return address(x); }
};
template <>
struct Convert<double> {
  static double from(PyObject* x) { return real(x); }
};
template <>
struct Convert<bool> {
  static bool from(PyObject* x) { return truth(x); }
};
template <>
struct Convert<std::string> {
  static std::string from(PyObject* x) { return text(x); }
};
template <>
struct Convert<PyObject*> {
  static PyObject* from(PyObject* x) { return x; }
};
template <>
struct Convert<Dict> {
  static Dict from(PyObject* x) {
    if (!PyDict_Check(x)) refuse("a dict", x);
    return {x};
  }
};
template <size_t N>
struct Convert<std::array<int64_t, N>> {
  static std::array<int64_t, N> from(PyObject* x) {
    const Owned items = made(PySequence_Fast(x, "a sequence of whole numbers is wanted"));
    if (PySequence_Fast_GET_SIZE(items.get()) != Py_ssize_t(N)) {
      PyErr_Format(PyExc_TypeError, "%zu numbers are wanted, got %zd", N,
                   PySequence_Fast_GET_SIZE(items.get()));
      throw Raised();
    }
    std::array<int64_t, N> out;
    for (size_t i = 0; i < N; ++i) out[i] = whole(PySequence_Fast_GET_ITEM(items.get(), i));
    return out;
  }
};
template <class T>
struct Convert<std::optional<T>> {
  static std::optional<T> from(PyObject* x) {
    if (!x || x == Py_None) return {};
    return Convert<T>::from(x);
  }
};

// ---- C++ to Python ------------------------------------------------------------------------------

inline PyObject* to(Owned x) { return x.release(); }
inline PyObject* to(bool x) { return PyBool_FromLong(x); }
inline PyObject* to(int x) { return PyLong_FromLong(x); }
inline PyObject* to(int64_t x) { return PyLong_FromLongLong(x); }
inline PyObject* to(uintptr_t x) { return PyLong_FromSize_t(x); }
inline PyObject* to(double x) { return PyFloat_FromDouble(x); }
inline PyObject* to(const std::string& x) {
  return PyUnicode_FromStringAndSize(x.data(), Py_ssize_t(x.size()));
}
template <class... T>
PyObject* to(const std::tuple<T...>& x);
template <class T>
PyObject* to(const std::map<std::string, T>& x) {
  Owned out = made(PyDict_New());
  for (const auto& [name, value] : x)
    if (PyDict_SetItemString(out.get(), name.c_str(), made(to(value)).get())) throw Raised();
  return out.release();
}
template <class T>
PyObject* to(const std::vector<T>& x) {
  Owned out = made(PyList_New(0));
  for (const T& each : x)
    if (PyList_Append(out.get(), made(to(each)).get())) throw Raised();
  return out.release();
}
template <class... T>
PyObject* to(const std::tuple<T...>& x) {
  Owned out = made(PyTuple_New(sizeof...(T)));
  Py_ssize_t i = 0;
  std::apply(
      [&](const auto&... each) {
        (PyTuple_SET_ITEM(out.get(), i++, made(to(each)).release()), ...);
      },
      x);
  return out.release();
}

// ---- functions ----------------------------------------------------------------------------------

// The names of a function's parameters, interned; made once.
struct Parameters {
  std::vector<PyObject*> names;

  void read(const std::string& text) {
    names.clear();
    for (size_t at = 0; at < text.size();) {
      const size_t end = std::min(text.find(", ", at), text.size());
      names.push_back(PyUnicode_InternFromString(text.substr(at, end - at).c_str()));
      at = end + 2;
    }
  }
  // Puts the arguments into `found`, by the parameters from `first` on; absent ones are null.
  // False with Python's error set.
  bool sort(PyObject* const* args, Py_ssize_t count, PyObject* keywords, size_t first,
            PyObject** found) const {
    const size_t all = names.size();
    if (size_t(count) > all - first) {
      PyErr_Format(PyExc_TypeError, "at most %zu arguments are wanted, got %zd", all - first,
                   count);
      return false;
    }
    for (Py_ssize_t i = 0; i < count; ++i) found[first + i] = args[i];
    const Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;
    for (Py_ssize_t i = 0; i < named; ++i)
      if (!put(PyTuple_GET_ITEM(keywords, i), args[count + i], first, found)) return false;
    return true;
  }
  // True where an argument is there, or may be absent.
  bool complete(PyObject* const* found, const bool* optional) const {
    for (size_t i = 0; i < names.size(); ++i)
      if (!found[i] && !optional[i]) {
        PyErr_Format(PyExc_TypeError, "argument '%U' is missing", names[i]);
        return false;
      }
    return true;
  }

 private:
  bool put(PyObject* name, PyObject* value, size_t first, PyObject** found) const {
    for (size_t i = first; i < names.size(); ++i) {
      const int same = names[i] == name ? 1 : PyUnicode_Compare(names[i], name) == 0;
      if (!same) continue;
      if (found[i]) break;
      found[i] = value;
      return true;
    }
    PyErr_Format(PyExc_TypeError, "argument '%U' is unknown, or given twice", name);
    return false;
  }
};

template <class T>
inline constexpr bool is_optional = false;
template <class T>
inline constexpr bool is_optional<std::optional<T>> = true;

template <auto f>
Parameters& parameters_of() {
  static Parameters parameters;
  return parameters;
}

// self: the first parameter of a method, null for a function of the module.
template <auto f, class Result, class... Args, size_t... I>
PyObject* invoke(Result (*)(Args...), PyObject* self, PyObject* const* args, Py_ssize_t count,
                 PyObject* keywords, std::index_sequence<I...>) noexcept {
  PyObject* found[sizeof...(Args) + 1] = {self};
  constexpr bool optional[] = {is_optional<std::decay_t<Args>>..., false};
  const Parameters& parameters = parameters_of<f>();
  if (!parameters.sort(args, count, keywords, self ? 1 : 0, found) ||
      !parameters.complete(found, optional))
    return nullptr;
  try {
    if constexpr (std::is_void_v<Result>) {
      f(Convert<std::decay_t<Args>>::from(found[I])...);
      Py_RETURN_NONE;
    } else {
      return to(f(Convert<std::decay_t<Args>>::from(found[I])...));
    }
  } catch (...) {
    set_error();
    return nullptr;
  }
}

template <auto f, bool METHOD, class Result, class... Args>
PyMethodDef entry(Result (*)(Args...), const char* name, const char* names, const char* doc) {
  using Entry = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*);
  const Entry call = [](PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* kw) {
    return invoke<f>(f, METHOD ? self : nullptr, args, count, kw,
                     std::index_sequence_for<Args...>());
  };
  parameters_of<f>().read(names);
  if (parameters_of<f>().names.size() != sizeof...(Args))
    throw std::logic_error(std::string(name) + " has other parameters than " + names);
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)),
          METH_FASTCALL | METH_KEYWORDS, doc};
}

// A function of a module; each C++ function has one name.
template <auto f>
PyMethodDef function(const char* name, const char* names = "", const char* doc = "") {
  return entry<f, false>(f, name, names, doc);
}

// A method: names begin with self, whose parameter is T& of a class that make_type made.
template <auto f>
PyMethodDef method(const char* name, const char* names, const char* doc = "") {
  return entry<f, true>(f, name, names, doc);
}

// Adds a class whose objects hold a T; init(T&, ...) takes what its constructor is given, with
// parameters as those of a method.
template <class T, auto init>
void add_class(PyObject* module, const char* name, const char* names, PyMethodDef* methods) {
  static const PyMethodDef constructor = method<init>("__init__", names);
  const newfunc create = [](PyTypeObject* type, PyObject*, PyObject*) -> PyObject* {
    PyObject* x = type->tp_alloc(type, 0);
    if (x) new (&reinterpret_cast<Object<T>*>(x)->value) T();
    return x;
  };
  const initproc start = [](PyObject* self, PyObject* args, PyObject* keywords) -> int {
    const Py_ssize_t count = PyTuple_GET_SIZE(args);
    std::vector<PyObject*> all(&PyTuple_GET_ITEM(args, 0), &PyTuple_GET_ITEM(args, 0) + count);
    Owned named(keywords ? PyDict_Keys(keywords) : PyList_New(0));
    if (named.get()) named = Owned(PyList_AsTuple(named.get()));
    if (!named.get()) return -1;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(named.get()); ++i)
      all.push_back(PyDict_GetItem(keywords, PyTuple_GET_ITEM(named.get(), i)));
    using Entry = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*);
    const auto call = reinterpret_cast<Entry>(reinterpret_cast<void (*)()>(constructor.ml_meth));
    return Owned(call(self, all.data(), count, named.get())).get() ? 0 : -1;
  };
  const destructor end = [](PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    reinterpret_cast<Object<T>*>(self)->value.~T();
    type->tp_free(self);
    Py_DECREF(type);
  };
  PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(create)},
                         {Py_tp_init, reinterpret_cast<void*>(start)},
                         {Py_tp_dealloc, reinterpret_cast<void*>(end)},
                         {Py_tp_methods, methods},
                         {0, nullptr}};
  static const std::string whole_name = std::string(PyModule_GetName(module)) + "." + name;
  PyType_Spec spec = {whole_name.c_str(), int(sizeof(Object<T>)), 0, Py_TPFLAGS_DEFAULT, slots};
  PyObject* type = made(PyType_FromSpec(&spec)).release();  // for as long as the process lives
  type_of<T> = reinterpret_cast<PyTypeObject*>(type);
  if (PyObject_SetAttrString(module, name, type) < 0) throw Raised();
}

// What a module's PyInit_ function returns: the module, with what `fill` adds to it.
inline PyObject* make_module(PyModuleDef& definition, void (*fill)(PyObject*)) {
  try {
    Owned module = made(PyModule_Create(&definition));
    fill(module.get());
    return module.release();
  } catch (...) {
    set_error();
    return nullptr;
  }
}

inline void add_functions(PyObject* module, PyMethodDef* functions) {
  if (PyModule_AddFunctions(module, functions) < 0) throw Raised();
}

}  // namespace attn::python
