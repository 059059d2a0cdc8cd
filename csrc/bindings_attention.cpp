// bindings_attention.cpp: the CPU attention functions for Python, addresses and strides as
// integers. Owns: nothing; the Python wrapper keeps the tensors alive.  Thread-safety: releases the
// GIL.
#include "bindings_attention.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <optional>

#include "attention_cpu.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace vmalloc {
namespace {

// A tensor as the wrapper passes it: (address, strides), strides as torch counts them.
using Tensor = py::tuple;

std::int64_t integer(py::handle value) {
  const long long result = PyLong_AsLongLong(value.ptr());
  if (result == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return result;
}

// Raises TypeError or IndexError through Python on anything but tuples of integers.
py::handle item(py::handle tuple, py::ssize_t index) {
  PyObject* value = PyTuple_GetItem(tuple.ptr(), index);
  if (value == nullptr) throw py::error_already_set();
  return value;
}

void* address(py::handle value) {
  void* result = PyLong_AsVoidPtr(value.ptr());
  if (result == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return result;
}

PackedRows packed_rows(const Tensor& tensor) {
  const py::handle strides = item(tensor, 1);
  return {address(item(tensor, 0)), integer(item(strides, 0)), integer(item(strides, 1))};
}

CacheRows cache_rows(const Tensor& tensor) {
  const py::handle strides = item(tensor, 1);
  return {address(item(tensor, 0)), integer(item(strides, 0)), integer(item(strides, 1)),
          integer(item(strides, 2))};
}

const std::int32_t* indices(std::uintptr_t pointer) {
  return reinterpret_cast<const std::int32_t*>(pointer);
}

// `block_table` is (address, entries from one row to the next, entries per row) or None.
VarlenBatch varlen_batch(std::uintptr_t cu_seqlens_q, std::uintptr_t seqused_k,
                         std::uintptr_t cache_batch_idx,
                         const std::optional<py::tuple>& block_table, std::int64_t batch,
                         std::int64_t total_q, std::int64_t num_slots, std::int64_t num_rows) {
  VarlenBatch result = {};
  result.cu_seqlens_q = indices(cu_seqlens_q);
  result.seqused_k = indices(seqused_k);
  result.cache_batch_idx = indices(cache_batch_idx);
  result.batch = batch;
  result.total_q = total_q;
  result.num_slots = num_slots;
  result.num_rows = num_rows;
  if (block_table) {
    result.by_block_table = true;
    result.block_table = static_cast<const std::int32_t*>(address(item(*block_table, 0)));
    result.block_table_stride = integer(item(*block_table, 1));
    result.max_blocks = integer(item(*block_table, 2));
  }
  return result;
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def(
      "varlen_attention",
      [](int dtype, const Tensor& query, const Tensor& out, const Tensor& k_cache,
         const Tensor& v_cache, std::uintptr_t cu_seqlens_q, std::uintptr_t seqused_k,
         std::uintptr_t cache_batch_idx, const std::optional<py::tuple>& block_table,
         std::int64_t batch, std::int64_t total_q, std::int64_t num_slots, std::int64_t num_rows,
         std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t k_head_dim,
         std::int64_t v_head_dim, float softmax_scale, std::int64_t window_left, float softcap,
         std::uintptr_t sinks) {
        AttentionArgs args;
        args.dtype = static_cast<AttentionDtype>(dtype);
        args.query = packed_rows(query);
        args.out = packed_rows(out);
        args.k_cache = cache_rows(k_cache);
        args.v_cache = cache_rows(v_cache);
        args.batch = varlen_batch(cu_seqlens_q, seqused_k, cache_batch_idx, block_table, batch,
                                  total_q, num_slots, num_rows);
        args.num_heads = num_heads;
        args.num_kv_heads = num_kv_heads;
        args.k_head_dim = k_head_dim;
        args.v_head_dim = v_head_dim;
        args.softmax_scale = softmax_scale;
        args.window_left = window_left;
        args.softcap = softcap;
        args.sinks = reinterpret_cast<const float*>(sinks);
        const py::gil_scoped_release release;
        varlen_attention(args);
      },
      py::arg("dtype"), py::arg("query"), py::arg("out"), py::arg("k_cache"), py::arg("v_cache"),
      py::arg("cu_seqlens_q"), py::arg("seqused_k"), py::arg("cache_batch_idx"),
      py::arg("block_table"), py::arg("batch"), py::arg("total_q"), py::arg("num_slots"),
      py::arg("num_rows"), py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("k_head_dim"),
      py::arg("v_head_dim"), py::arg("softmax_scale"), py::arg("window_left"), py::arg("softcap"),
      py::arg("sinks"),
      "Attend packed queries to their cached rows; vmalloc.kernels.cpu is the checked way in.");
  m.def(
      "append_kv",
      [](std::int64_t element_bytes, const Tensor& key, const Tensor& value, const Tensor& k_cache,
         const Tensor& v_cache, std::uintptr_t cu_seqlens_q, std::uintptr_t seqused_k,
         std::uintptr_t cache_batch_idx, const std::optional<py::tuple>& block_table,
         std::int64_t batch, std::int64_t total_q, std::int64_t num_slots, std::int64_t num_rows,
         std::int64_t num_kv_heads, std::int64_t k_head_dim, std::int64_t v_head_dim) {
        AppendArgs args;
        args.element_bytes = element_bytes;
        args.key = packed_rows(key);
        args.value = packed_rows(value);
        args.k_cache = cache_rows(k_cache);
        args.v_cache = cache_rows(v_cache);
        args.batch = varlen_batch(cu_seqlens_q, seqused_k, cache_batch_idx, block_table, batch,
                                  total_q, num_slots, num_rows);
        args.num_kv_heads = num_kv_heads;
        args.k_head_dim = k_head_dim;
        args.v_head_dim = v_head_dim;
        const py::gil_scoped_release release;
        append_kv(args);
      },
      py::arg("element_bytes"), py::arg("key"), py::arg("value"), py::arg("k_cache"),
      py::arg("v_cache"), py::arg("cu_seqlens_q"), py::arg("seqused_k"), py::arg("cache_batch_idx"),
      py::arg("block_table"), py::arg("batch"), py::arg("total_q"), py::arg("num_slots"),
      py::arg("num_rows"), py::arg("num_kv_heads"), py::arg("k_head_dim"), py::arg("v_head_dim"),
      "Copy packed new rows into the cache; vmalloc.kernels.cpu is the checked way in.");
  m.def("attention_isa", &attention_isa,
        "Instruction set of the attention kernel: portable, avx2 or avx512.");
  m.def(
      "set_num_threads",
      [](std::size_t count) {
        const py::gil_scoped_release release;
        set_num_threads(count);
      },
      py::arg("count"), "Threads that CPU attention and copies may use, the caller included.");
  m.def("num_threads", &num_threads, "Threads that CPU attention and copies may use.");
}

}  // namespace vmalloc
