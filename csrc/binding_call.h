// The Python class of a call, the same for every device: its numbers, strides and addresses by
// name.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <iterator>

#include "binding_parts.h"

// What pybind11 makes of a function is compiled once for each type of it and of what is said beside
// it.  So functions are handed over as pointers (+[]), what they say of themselves as a pointer
// (doc), and sequences as they are.
namespace attn {

namespace py = pybind11;

constexpr const char* doc(const char* text) { return text; }

inline void read_integers(const py::sequence& told, int64_t* to, size_t count) {
  if (told.size() != count)
    throw std::invalid_argument("a sequence must have " + std::to_string(count) +
                                " integers, got " + std::to_string(told.size()));
  for (size_t i = 0; i < count; ++i) to[i] = py::cast<int64_t>(told[i]);
}
template <size_t N>
std::array<int64_t, N> integers(const py::sequence& told) {
  std::array<int64_t, N> found{};
  read_integers(told, found.data(), N);
  return found;
}

inline Strides strides(const py::sequence& told) {
  const auto s = integers<3>(told);
  return {s[0], s[1], s[2]};
}
inline ScoreStrides score_strides(const py::sequence& told) {
  const auto s = integers<4>(told);
  return {s[0], s[1], s[2], s[3]};
}

// The numbers of a call by their names, all of those in kScalars and no other.
inline void set_scalars(Problem& p, const py::dict& numbers) {
  if (numbers.size() != std::size(kScalars))
    throw std::invalid_argument("scalars must be the " + std::to_string(std::size(kScalars)) +
                                " of params.h, got " + std::to_string(numbers.size()));
  for (const Scalar& scalar : kScalars) {
    const py::object value = numbers[scalar.name];
    if (scalar.real)
      p.*scalar.real = py::cast<double>(value);
    else
      p.*scalar.whole = py::cast<int64_t>(value);
  }
}

// What a Call is made of: dtype, bias_dtype, bottom_right, alibi_stride_b; strides q, k, v, o, mask
// and bias; sizes: batch, heads_q, heads_k, seqlen_q, seqlen_k, head_dim, head_dim_v; lse: strides
// of batch and head; pages: stride of the block table, page_size; scalars: those of params.h.
constexpr size_t kToldOfACall = 14;

inline Problem make_problem(const py::kwargs& told) {
  if (told.size() != kToldOfACall)
    throw std::invalid_argument("a Call must be told " + std::to_string(kToldOfACall) +
                                " things, got " + std::to_string(told.size()));
  const auto number = [&](const char* name) { return py::cast<int>(told[name]); };
  const auto sequence = [&](const char* name) { return py::cast<py::sequence>(told[name]); };
  Problem p;
  p.dtype = DType(number("dtype")), p.bias_dtype = DType(number("bias_dtype"));
  const auto sizes = integers<7>(sequence("sizes"));
  p.batch = sizes[0], p.heads_q = sizes[1], p.heads_k = sizes[2];
  p.seqlen_q = sizes[3], p.seqlen_k = sizes[4];
  p.head_dim = sizes[5], p.head_dim_v = sizes[6];
  p.q = strides(sequence("q")), p.k = strides(sequence("k"));
  p.v = strides(sequence("v")), p.o = strides(sequence("o"));
  p.mask = score_strides(sequence("mask")), p.bias = score_strides(sequence("bias"));
  const auto lse = integers<2>(sequence("lse")), pages = integers<2>(sequence("pages"));
  p.lse_stride_b = lse[0], p.lse_stride_h = lse[1];
  p.block_table_stride = pages[0], p.page_size = pages[1];
  p.bottom_right = number("bottom_right");
  set_scalars(p, py::cast<py::dict>(told["scalars"]));
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

inline void set_address(Pointers& x, const std::string& name, uintptr_t address) {
  for (const Address& field : kAddresses)
    if (name == field.name) return field.set(x, address);
  throw std::invalid_argument("no pointer is called " + name);
}

// The Python class "Call" of a module: how the fields of a `Call`, a NativeCall or more, are told.
template <class Call>
py::class_<Call> define_call(py::module_& m) {
  return py::class_<Call>(m, "Call", py::module_local())
      .def(py::init([](const py::kwargs& told) {
        Call c;
        c.p = make_problem(told);
        c.ptr.alibi_stride_b = py::cast<int64_t>(told["alibi_stride_b"]);
        return c;
      }))
      .def(
          "set_gradients",
          +[](Call& c, const py::sequence& dout, const py::sequence& dq, const py::sequence& dk,
              const py::sequence& dv, const py::sequence& dbias, bool deterministic) {
            c.p.dout = strides(dout), c.p.dq = strides(dq), c.p.dk = strides(dk);
            c.p.dv = strides(dv), c.p.dbias = score_strides(dbias);
            c.p.deterministic = deterministic;
          })
      .def(
          "set_addresses",
          +[](Call& c, const py::dict& addresses) {
            for (const auto& [name, address] : addresses)
              set_address(c.ptr, py::cast<std::string>(name), py::cast<uintptr_t>(address));
          },
          doc("Addresses by the names of params.h; absent ones are null"));
}

}  // namespace attn
