// The Python class of a call, the same for every device: its numbers, strides and addresses by
// name.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <iterator>

#include "binding_parts.h"

namespace attn {

namespace py = pybind11;
using Triple = std::array<int64_t, 3>;
using Quad = std::array<int64_t, 4>;

inline Strides strides(const Triple& t) { return {t[0], t[1], t[2]}; }
inline ScoreStrides score_strides(const Quad& t) { return {t[0], t[1], t[2], t[3]}; }

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

// sizes: batch, heads_q, heads_k, seqlen_q, seqlen_k, head_dim, head_dim_v; lse: strides of batch
// and head; pages: stride of the block table, page_size.
inline Problem make_problem(int dtype, int bias_dtype, const std::array<int64_t, 7>& sizes,
                            const Triple& q, const Triple& k, const Triple& v, const Triple& o,
                            const Quad& mask, const Quad& bias, const std::array<int64_t, 2>& lse,
                            const std::array<int64_t, 2>& pages, int bottom_right,
                            const py::dict& scalars) {
  Problem p;
  p.dtype = DType(dtype), p.bias_dtype = DType(bias_dtype);
  p.batch = sizes[0], p.heads_q = sizes[1], p.heads_k = sizes[2];
  p.seqlen_q = sizes[3], p.seqlen_k = sizes[4];
  p.head_dim = sizes[5], p.head_dim_v = sizes[6];
  p.q = strides(q), p.k = strides(k), p.v = strides(v), p.o = strides(o);
  p.mask = score_strides(mask), p.bias = score_strides(bias);
  p.lse_stride_b = lse[0], p.lse_stride_h = lse[1];
  p.block_table_stride = pages[0], p.page_size = pages[1];
  p.bottom_right = bottom_right;
  set_scalars(p, scalars);
  return p;
}

inline void set_gradient_strides(Problem& p, const Triple& dout, const Triple& dq, const Triple& dk,
                                 const Triple& dv, const Quad& dbias) {
  p.dout = strides(dout), p.dq = strides(dq), p.dk = strides(dk), p.dv = strides(dv);
  p.dbias = score_strides(dbias);
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
      .def(py::init([](int dtype, int bias_dtype, const std::array<int64_t, 7>& sizes,
                       const Triple& q, const Triple& k, const Triple& v, const Triple& o,
                       const Quad& mask, const Quad& bias, const std::array<int64_t, 2>& lse,
                       const std::array<int64_t, 2>& pages, int bottom_right,
                       const py::dict& scalars, int64_t alibi_stride_b) {
             Call c;
             c.p = make_problem(dtype, bias_dtype, sizes, q, k, v, o, mask, bias, lse, pages,
                                bottom_right, scalars);
             c.ptr.alibi_stride_b = alibi_stride_b;
             return c;
           }),
           py::kw_only(), py::arg("dtype"), py::arg("bias_dtype"), py::arg("sizes"), py::arg("q"),
           py::arg("k"), py::arg("v"), py::arg("o"), py::arg("mask"), py::arg("bias"),
           py::arg("lse"), py::arg("pages"), py::arg("bottom_right"), py::arg("scalars"),
           py::arg("alibi_stride_b"))
      .def("set_gradients",
           [](Call& c, const Triple& dout, const Triple& dq, const Triple& dk, const Triple& dv,
              const Quad& dbias, bool deterministic) {
             set_gradient_strides(c.p, dout, dq, dk, dv, dbias);
             c.p.deterministic = deterministic;
           })
      .def(
          "set_addresses",
          [](Call& c, const py::dict& addresses) {
            for (const auto& [name, address] : addresses)
              set_address(c.ptr, py::cast<std::string>(name), py::cast<uintptr_t>(address));
          },
          "Addresses by the names of params.h; absent ones are null");
}

}  // namespace attn
