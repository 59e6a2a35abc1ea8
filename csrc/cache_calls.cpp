// The short way of a cache of keys and values, contiguous or paged: a call of few queries, with
// what it appends, is one native call, and so is each change of a cache.  Tensors are those of the
// CPU that `looks` has seen; what their values address is checked here, before anything is written.
#include <array>
#include <cstring>
#include <vector>

#include "cpu/isa/dispatch.h"
#include "cpu/parallel.h"
#include "dense_calls.h"

namespace attn {
namespace {

HeldBy held_by = nullptr;

// The tensors of decode_forward behind (call, threads), in their order.
enum { Q, K, V, MASK, BIAS, ALIBI, SINK, LENGTHS, TABLE, K_NEW, V_NEW, K_SCALE, V_SCALE, OUT, LSE };
constexpr int kTensors = LSE + 1;

struct Tensors {
  std::array<DLTensor, kTensors> x{};  // data null where absent
  std::array<bool, kTensors> there{};

  bool read(PyObject* const* args) {
    for (int i = 0; i < kTensors; ++i) {
      there[i] = args[i] != Py_None;
      if (there[i] && !view(args[i], x[i])) return false;
    }
    return true;
  }
  void* at(int i) const { return there[i] ? address_of(x[i]) : nullptr; }
};

Strides first_three(const DLTensor& x) { return {x.strides[0], x.strides[1], x.strides[2]}; }

// Lengths with `added` more each; false where one, or a page that it reaches, is out of range.
bool lengths_of(const Tensors& t, const Problem& p, int64_t added, std::vector<int32_t>* lengths) {
  const auto* given = static_cast<const int32_t*>(t.at(LENGTHS));
  const auto* table = static_cast<const int32_t*>(t.at(TABLE));
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t length = given[b * t.x[LENGTHS].strides[0]] + added;
    if (length < added || length > p.seqlen_k) return false;
    lengths->push_back(int32_t(length));
    for (int64_t n = 0; table && n * p.page_size < length; ++n) {
      const int32_t page = table[b * t.x[TABLE].strides[0] + n];
      if (page < 0 || page >= t.x[K].shape[0]) return false;
    }
  }
  return true;
}

// Copies `count` rows of each head from row `first` of new[row] to the page's rows from `slot` on;
// rows and pages are [., H, S, D].
void copy_rows(const DLTensor& pages, int64_t page, int64_t slot, const DLTensor& from, int64_t row,
               int64_t first, int64_t count) {
  const int64_t bytes = pages.bits / 8, width = pages.shape[3] * bytes;
  char* to = static_cast<char*>(address_of(pages)) +
             (page * pages.strides[0] + slot * pages.strides[2]) * bytes;
  const char* source = static_cast<const char*>(address_of(from)) +
                       (row * from.strides[0] + first * from.strides[2]) * bytes;
  const bool together =
      pages.strides[2] == pages.shape[3] && (count == 1 || from.strides[2] == pages.shape[3]);
  for (int64_t h = 0; h < pages.shape[1]; ++h) {
    if (together)
      std::memmove(to, source, count * width);
    else
      for (int64_t i = 0; i < count; ++i)
        std::memmove(to + i * pages.strides[2] * bytes, source + i * from.strides[2] * bytes,
                     width);
    to += pages.strides[1] * bytes, source += from.strides[1] * bytes;
  }
}

// Writes the new rows of a call behind those of each sequence, whose lengths count them already.
void append(const Tensors& t, const Problem& p, const std::vector<int32_t>& lengths,
            int64_t added) {
  const auto* table = static_cast<const int32_t*>(t.at(TABLE));
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t i = 0; i < added;) {
      const int64_t j = lengths[b] - added + i, size = table ? p.page_size : p.seqlen_k;
      const int64_t page = table ? table[b * t.x[TABLE].strides[0] + j / size] : b;
      const int64_t count = std::min(added - i, size - j % size);
      copy_rows(t.x[K], page, j % size, t.x[K_NEW], b, i, count);
      copy_rows(t.x[V], page, j % size, t.x[V_NEW], b, i, count);
      i += count;
    }
}

// decode_forward(call, threads, q, k, v, mask, bias, alibi_slopes, sink, seqlens_k, block_table,
// k_new, v_new, k_scale, v_scale, out, lse): writes k_new and v_new, then O, and LSE where it is no
// None.  False, with nothing done, where a length or a page is out of range.
PyObject* decode_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2 + kTensors)
    return PyErr_Format(PyExc_TypeError, "a call, threads and %d tensors are wanted, got %zd",
                        kTensors, count);
  const Held held = held_by(args[0]);
  if (!held.problem) return nullptr;
  int threads;
  Tensors t;
  if (!read_threads(args[1], threads) || !t.read(args + 2)) return nullptr;
  Problem p = *held.problem;
  cpu::Options options = *held.options;
  const int64_t added = t.there[K_NEW] ? t.x[K_NEW].shape[2] : 0;
  if (t.there[TABLE]) p.block_table_stride = t.x[TABLE].strides[0];
  std::vector<int32_t> lengths;
  if (t.there[LENGTHS]) {
    if (!lengths_of(t, p, added, &lengths)) Py_RETURN_FALSE;
    append(t, p, lengths, added);
  }
  Pointers ptr;
  ptr.q = t.at(Q), ptr.k = t.at(K), ptr.v = t.at(V), ptr.mask = t.at(MASK), ptr.bias = t.at(BIAS);
  ptr.alibi_slopes = t.at(ALIBI), ptr.sink = t.at(SINK);
  ptr.alibi_stride_b =
      t.there[ALIBI] && t.x[ALIBI].ndim == 2 && t.x[ALIBI].shape[0] > 1 ? t.x[ALIBI].strides[0] : 0;
  ptr.seqlens_k = t.there[LENGTHS] ? lengths.data() : nullptr;
  ptr.block_table = static_cast<const int32_t*>(t.at(TABLE));
  ptr.o = t.at(OUT), ptr.lse = t.at(LSE);
  if (t.there[K_SCALE]) {
    options.kept = {true, static_cast<float*>(t.at(K_SCALE)), static_cast<float*>(t.at(V_SCALE)),
                    first_three(t.x[K_SCALE]), first_three(t.x[V_SCALE])};
  }
  if (!compute(cpu::forward, {&p, &options}, ptr, threads)) return nullptr;
  Py_RETURN_TRUE;
}

// The ints of a list of lists or tuples of them; false with Python's error set.
bool rows_of(PyObject* list, std::vector<std::vector<int64_t>>* rows) {
  if (!PyList_Check(list)) return PyErr_SetString(PyExc_TypeError, "a list is wanted"), false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    PyObject* row = PySequence_Fast(PyList_GET_ITEM(list, i), "a list or tuple of ints is wanted");
    if (!row) return false;
    rows->emplace_back();
    for (Py_ssize_t n = 0; n < PySequence_Fast_GET_SIZE(row); ++n)
      rows->back().push_back(PyLong_AsLongLong(PySequence_Fast_GET_ITEM(row, n)));
    Py_DECREF(row);
    if (PyErr_Occurred()) return false;
  }
  return true;
}

bool inside(int64_t first, int64_t count, int64_t size) {
  return first >= 0 && count >= 0 && count <= size && first <= size - count;
}

constexpr int64_t kAlone = 1 << 18;  // bytes that one thread copies in the time that two need

// cache_write(pages, new, copies, pieces, threads): copies (source, target, count) between pages
// [., H, page_size, D], and then pieces (row, first, page, slot, count) of new rows [B, H, S, D],
// whose rows of D numbers are contiguous in both.
PyObject* cache_write(PyObject*, PyObject* const* args, Py_ssize_t count) {
  DLTensor pages, from;
  std::vector<std::vector<int64_t>> copies, pieces;
  if (count != 5) return PyErr_Format(PyExc_TypeError, "5 arguments are wanted, got %zd", count);
  if (!view(args[0], pages) || !view(args[1], from) || !rows_of(args[2], &copies) ||
      !rows_of(args[3], &pieces))
    return nullptr;
  int threads;
  if (!read_threads(args[4], threads)) return nullptr;
  bool right = pages.ndim == 4 && from.ndim == 4 && pages.bits == from.bits &&
               pages.shape[1] == from.shape[1] && pages.shape[3] == from.shape[3];
  for (const auto& c : copies)
    right = right && c.size() == 3 && inside(c[0], 1, pages.shape[0]) &&
            inside(c[1], 1, pages.shape[0]) && inside(0, c[2], pages.shape[2]);
  int64_t rows = 0;
  for (const auto& c : pieces) {
    right = right && c.size() == 5 && inside(c[0], 1, from.shape[0]) &&
            inside(c[1], c[4], from.shape[2]) && inside(c[2], 1, pages.shape[0]) &&
            inside(c[3], c[4], pages.shape[2]);
    rows += right ? c[4] : 0;
  }
  if (!right) return PyErr_SetString(PyExc_ValueError, "a row or page is out of range"), nullptr;
  const auto write = [&](int64_t i) {
    const auto& c = pieces[i];
    copy_rows(pages, c[2], c[3], from, c[0], c[1], c[4]);
  };
  const bool alone = rows * pages.shape[1] * pages.shape[3] * (pages.bits / 8) < kAlone;
  WithoutGil release;
  for (const auto& c : copies) copy_rows(pages, c[1], 0, pages, c[0], 0, c[2]);
  if (alone)
    for (size_t i = 0; i < pieces.size(); ++i) write(int64_t(i));
  else
    cpu::parallel_for(int64_t(pieces.size()), threads, write);
  Py_RETURN_NONE;
}

// Where the next row of each sequence goes: its page and the slot there; false where `count` rows
// do not go there, or a page is none.
bool next_slots(const DLTensor& pages, const DLTensor& table, const DLTensor& lengths,
                int64_t count, std::vector<std::array<int64_t, 2>>* slots) {
  const auto* held = static_cast<const int32_t*>(address_of(lengths)) + lengths.strides[0];
  const auto* numbers = static_cast<const int32_t*>(address_of(table));
  const int64_t size = pages.shape[2];
  for (int64_t b = 0; b < lengths.shape[1]; ++b) {
    const int64_t length = held[b * lengths.strides[1]];
    if (length < 0 || length / size >= table.shape[1] || length % size + count > size) return false;
    const int64_t page = numbers[b * table.strides[0] + length / size * table.strides[1]];
    if (!inside(page, 1, pages.shape[0])) return false;
    slots->push_back({page, length % size});
  }
  return true;
}

// cache_extend(k_pages, v_pages, table, lengths, k, v): puts k and v [B, H, S, D] behind the rows
// of each sequence, in its last page, and adds S to the lengths [2, B].  False, with nothing done,
// where they do not go there, have numbers apart from each other, or are so many that threads shall
// share the work (cache_write).
PyObject* cache_extend(PyObject*, PyObject* const* args, Py_ssize_t count) {
  std::array<DLTensor, 6> x;
  if (count != 6) return PyErr_Format(PyExc_TypeError, "6 tensors are wanted, got %zd", count);
  for (int i = 0; i < 6; ++i)
    if (!view(args[i], x[i])) return nullptr;
  const auto& [k_pages, v_pages, table, lengths, k, v] = x;
  bool right = lengths.ndim == 2 && table.ndim == 2 && lengths.shape[0] == 2 &&
               lengths.bits == 32 && table.bits == 32 && table.shape[0] == lengths.shape[1];
  for (const auto& [pages, rows] : {std::pair(&k_pages, &k), std::pair(&v_pages, &v)})
    right = right && pages->ndim == 4 && rows->ndim == 4 && pages->bits == rows->bits &&
            rows->shape[0] == lengths.shape[1] && pages->shape[1] == rows->shape[1] &&
            pages->shape[3] == rows->shape[3] && pages->shape[0] == k_pages.shape[0] &&
            pages->shape[2] == k_pages.shape[2] && rows->shape[2] == k.shape[2];
  if (!right)
    return PyErr_SetString(PyExc_ValueError, "rows, pages and lengths do not fit"), nullptr;
  const int64_t batch = lengths.shape[1], added = k.shape[2];
  const int64_t bytes = batch * added * k.shape[1] * (k.shape[3] + v.shape[3]) * (k.bits / 8);
  bool whole = true;  // rows lie in one piece
  for (const DLTensor* t : {&k_pages, &v_pages, &k, &v}) whole = whole && t->strides[3] == 1;
  std::vector<std::array<int64_t, 2>> slots;
  if (!whole || bytes >= kAlone || !next_slots(k_pages, table, lengths, added, &slots))
    Py_RETURN_FALSE;
  auto* numbers = static_cast<int32_t*>(address_of(lengths));
  for (int64_t b = 0; b < batch; ++b) {
    const auto [page, slot] = slots[size_t(b)];
    copy_rows(k_pages, page, slot, k, b, 0, added);
    copy_rows(v_pages, page, slot, v, b, 0, added);
    for (int64_t i = 0; i < 2; ++i)
      numbers[i * lengths.strides[0] + b * lengths.strides[1]] += int32_t(added);
  }
  Py_RETURN_TRUE;
}

// cache_publish(lengths, table, numbers, lists): lengths int32 [2, B] become the two lists of
// `numbers`, and in the table, int32 [B, width], row list[0] of each list begins with the rest of
// it.
PyObject* cache_publish(PyObject*, PyObject* const* args, Py_ssize_t count) {
  DLTensor lengths, table;
  std::vector<std::vector<int64_t>> numbers, lists;
  if (count != 4) return PyErr_Format(PyExc_TypeError, "4 arguments are wanted, got %zd", count);
  if (!view(args[0], lengths) || !view(args[1], table) || !rows_of(args[2], &numbers) ||
      !rows_of(args[3], &lists))
    return nullptr;
  bool right = lengths.ndim == 2 && table.ndim == 2 &&
               lengths.shape[0] == int64_t(numbers.size()) && lengths.bits == 32 &&
               table.bits == 32;
  for (const auto& row : numbers) right = right && int64_t(row.size()) == lengths.shape[1];
  for (const auto& list : lists)
    right = right && !list.empty() && inside(list[0], 1, table.shape[0]) &&
            int64_t(list.size()) - 1 <= table.shape[1];
  if (!right) return PyErr_SetString(PyExc_ValueError, "lengths or pages do not fit"), nullptr;
  auto* to = static_cast<int32_t*>(address_of(lengths));
  for (size_t i = 0; i < numbers.size(); ++i)
    for (size_t b = 0; b < numbers[i].size(); ++b)
      to[int64_t(i) * lengths.strides[0] + int64_t(b) * lengths.strides[1]] =
          int32_t(numbers[i][b]);
  to = static_cast<int32_t*>(address_of(table));
  for (const auto& list : lists)
    for (size_t n = 1; n < list.size(); ++n)
      to[list[0] * table.strides[0] + (int64_t(n) - 1) * table.strides[1]] = int32_t(list[n]);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"decode_forward", fastcall<decode_forward>(), METH_FASTCALL,
     "O (and LSE) of few queries against a cache: call, threads, q, k, v, mask, bias, "
     "alibi_slopes, sink, seqlens_k, block_table, k_new, v_new, k_scale, v_scale, out, lse"},
    {"cache_write", fastcall<cache_write>(), METH_FASTCALL,
     "Rows into pages: pages, new, copies, pieces, threads"},
    {"cache_extend", fastcall<cache_extend>(), METH_FASTCALL,
     "Rows behind those of each sequence: k_pages, v_pages, table, lengths, k, v; False where that "
     "needs more than this"},
    {"cache_publish", fastcall<cache_publish>(), METH_FASTCALL,
     "Lengths and page numbers into tensors: lengths, table, numbers, lists"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_cache_calls(PyObject* module, HeldBy of) {
  held_by = of;
  return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace attn
