// The Python class of a call, the same for every device: its numbers, strides and addresses by
// name.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <string>
#include <utility>

#include "binding_parts.h"

// What pybind11 makes of a function is compiled once for each type of it and of what is said beside
// it.  So functions are handed over as pointers (+[]), what they say of themselves as a pointer
// (doc), and sequences as they are.
namespace attn {

namespace py = pybind11;

constexpr const char* doc(const char* text) { return text; }

// How an error says what was told: "q[1] must be an integer, got 'a'".
inline std::string wrong(const std::string& name, const std::string& rule, py::handle told) {
  const py::str value = py::repr(told);
  const bool cut = py::len(value) > 80;  // characters, not bytes
  const std::string shown = py::str(cut ? value[py::slice(0, 80, 1)] : py::object(value));
  return name + " must be " + rule + ", got " + shown + (cut ? "..." : "");
}

// Whether Python's error is about something else than what was told.
inline bool not_of_the_value() {
  return !PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError);
}

// What Python holds an integer, numpy's and torch's too; no fraction and no string.
inline py::object whole(const std::string& name, py::handle told) {
  PyObject* found = PyNumber_Index(told.ptr());
  if (!found) {
    if (not_of_the_value()) throw py::error_already_set();
    PyErr_Clear();
    throw py::type_error(wrong(name, "an integer", told));
  }
  return py::reinterpret_steal<py::object>(found);
}
inline int64_t integer(const std::string& name, py::handle told) {
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(whole(name, told).ptr(), &overflow);
  if (overflow) throw py::value_error(wrong(name, "an integer of 64 bits", told));
  return value;
}
inline int integer_below(int end, const std::string& name, py::handle told) {
  const int64_t value = integer(name, told);
  if (value < 0 || value >= end)
    throw py::value_error(wrong(name, "0 to " + std::to_string(end - 1), told));
  return int(value);
}
inline uintptr_t address(const std::string& name, py::handle told) {
  const size_t value = PyLong_AsSize_t(whole(name, told).ptr());
  if (!PyErr_Occurred()) return value;
  PyErr_Clear();
  throw py::value_error(wrong(name, "an address", told));
}
inline double real(const std::string& name, py::handle told) {
  const double value = PyFloat_AsDouble(told.ptr());
  if (!PyErr_Occurred()) return value;
  const bool large = PyErr_ExceptionMatches(PyExc_OverflowError);
  if (not_of_the_value()) throw py::error_already_set();
  PyErr_Clear();
  if (large) throw py::value_error(wrong(name, "a number of double precision", told));
  throw py::type_error(wrong(name, "a number", told));
}

inline void read_integers(const std::string& name, py::handle told, int64_t* to, size_t count) {
  const std::string rule = "a sequence of " + std::to_string(count) + " integers";
  if (!PyList_Check(told.ptr()) && !PyTuple_Check(told.ptr()))
    throw py::type_error(wrong(name, rule, told));
  const auto items = py::reinterpret_borrow<py::sequence>(told);
  if (items.size() != count) throw py::value_error(wrong(name, rule, told));
  for (size_t i = 0; i < count; ++i)
    to[i] = integer(name + "[" + std::to_string(i) + "]", py::object(items[i]));
}
template <size_t N>
std::array<int64_t, N> integers(const std::string& name, py::handle told) {
  std::array<int64_t, N> found{};
  read_integers(name, told, found.data(), N);
  return found;
}

inline Strides strides(const std::string& name, py::handle told) {
  const auto s = integers<3>(name, told);
  return {s[0], s[1], s[2]};
}
inline ScoreStrides score_strides(const std::string& name, py::handle told) {
  const auto s = integers<4>(name, told);
  return {s[0], s[1], s[2], s[3]};
}

// What a native call is told by keywords: all of them are wanted, and no other.
class Told {
 public:
  Told(const char* what, py::dict told, size_t count) : what_(what), told_(std::move(told)) {
    if (told_.size() != count)
      throw py::type_error(what_ + " takes " + std::to_string(count) + " names, got " +
                           std::string(py::str(py::list(told_))));
  }
  py::object operator[](const char* name) const {
    if (!told_.contains(name)) throw py::type_error(what_ + " must be told " + name);
    return told_[name];
  }

 private:
  std::string what_;
  py::dict told_;
};

// The numbers of a call by their names, all of those in kScalars and no other.
inline void set_scalars(Problem& p, const py::object& numbers) {
  if (!PyDict_Check(numbers.ptr())) throw py::type_error(wrong("scalars", "a dict", numbers));
  const Told told("scalars", numbers, std::size(kScalars));
  for (const Scalar& scalar : kScalars) {
    const py::object value = told[scalar.name];
    if (scalar.real)
      p.*scalar.real = real(scalar.name, value);
    else
      p.*scalar.whole = integer(scalar.name, value);
  }
}

// What a Call is made of: dtype, bias_dtype, bottom_right, alibi_stride_b; strides q, k, v, o, mask
// and bias; sizes: batch, heads_q, heads_k, seqlen_q, seqlen_k, head_dim, head_dim_v; lse: strides
// of batch and head; pages: stride of the block table, page_size; scalars: those of params.h.
constexpr size_t kToldOfACall = 14;
constexpr int kDTypes = 4;

inline Problem make_problem(const Told& told) {
  Problem p;
  p.dtype = DType(integer_below(kDTypes, "dtype", told["dtype"]));
  p.bias_dtype = DType(integer_below(kDTypes, "bias_dtype", told["bias_dtype"]));
  const auto sizes = integers<7>("sizes", told["sizes"]);
  p.batch = sizes[0], p.heads_q = sizes[1], p.heads_k = sizes[2];
  p.seqlen_q = sizes[3], p.seqlen_k = sizes[4];
  p.head_dim = sizes[5], p.head_dim_v = sizes[6];
  p.q = strides("q", told["q"]), p.k = strides("k", told["k"]);
  p.v = strides("v", told["v"]), p.o = strides("o", told["o"]);
  p.mask = score_strides("mask", told["mask"]), p.bias = score_strides("bias", told["bias"]);
  const auto lse = integers<2>("lse", told["lse"]), pages = integers<2>("pages", told["pages"]);
  p.lse_stride_b = lse[0], p.lse_stride_h = lse[1];
  p.block_table_stride = pages[0], p.page_size = pages[1];
  p.bottom_right = integer_below(2, "bottom_right", told["bottom_right"]);
  set_scalars(p, told["scalars"]);
  return p;
}

// Problem and addresses of one call.
struct NativeCall {
  Problem p;
  Pointers ptr;
};

// The addresses of a call by the names of params.h.
struct Address {
  const char* name;
  void (*set)(Pointers&, uintptr_t);
};
#define ATTN_ADDRESS(field)                                   \
  Address {                                                   \
    #field, [](Pointers& x, uintptr_t address) {              \
      x.field = reinterpret_cast<decltype(x.field)>(address); \
    }                                                         \
  }
inline const Address kAddresses[] = {
    ATTN_ADDRESS(q),
    ATTN_ADDRESS(k),
    ATTN_ADDRESS(v),
    ATTN_ADDRESS(mask),
    ATTN_ADDRESS(bias),
    ATTN_ADDRESS(alibi_slopes),
    ATTN_ADDRESS(sink),
    ATTN_ADDRESS(rng_state),
    ATTN_ADDRESS(cu_seqlens_q),
    ATTN_ADDRESS(cu_seqlens_k),
    ATTN_ADDRESS(seqlens_k),
    ATTN_ADDRESS(block_table),
    ATTN_ADDRESS(o),
    ATTN_ADDRESS(lse),
    ATTN_ADDRESS(max_logit),
    ATTN_ADDRESS(entropy),
    ATTN_ADDRESS(dout),
    ATTN_ADDRESS(dlse),
    ATTN_ADDRESS(dq),
    ATTN_ADDRESS(dk),
    ATTN_ADDRESS(dv),
    ATTN_ADDRESS(dbias),
    ATTN_ADDRESS(dsink),
    ATTN_ADDRESS(frame),
};
#undef ATTN_ADDRESS

// Sets the addresses of a dict, by the names of params.h.
inline void set_addresses(Pointers& x, const py::dict& addresses) {
  for (const auto& [name, told] : addresses) {
    const std::string wanted = py::str(name);
    const auto* field = std::find_if(std::begin(kAddresses), std::end(kAddresses),
                                     [&](const Address& each) { return wanted == each.name; });
    if (field == std::end(kAddresses)) throw py::value_error("no pointer is called " + wanted);
    field->set(x, address(wanted, told));
  }
}

// The Python class "Call" of a module: how the fields of a `Call`, a NativeCall or more, are told.
template <class Call>
py::class_<Call> define_call(py::module_& m) {
  return py::class_<Call>(m, "Call", py::module_local())
      .def(py::init([](const py::kwargs& given) {
        const Told told("a Call", given, kToldOfACall);
        Call c;
        c.p = make_problem(told);
        c.ptr.alibi_stride_b = integer("alibi_stride_b", told["alibi_stride_b"]);
        return c;
      }))
      .def(
          "set_gradients",
          +[](Call& c, const py::object& dout, const py::object& dq, const py::object& dk,
              const py::object& dv, const py::object& dbias, bool deterministic) {
            c.p.dout = strides("dout", dout), c.p.dq = strides("dq", dq);
            c.p.dk = strides("dk", dk), c.p.dv = strides("dv", dv);
            c.p.dbias = score_strides("dbias", dbias);
            c.p.deterministic = deterministic;
          })
      .def(
          "set_addresses", +[](Call& c, const py::dict& told) { set_addresses(c.ptr, told); },
          doc("Addresses by the names of params.h; absent ones are null"));
}

}  // namespace attn
