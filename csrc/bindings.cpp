// bindings.cpp: the Python face of the core: drivers, the arena, tensors as DLPack capsules.
// Owns: nothing.  Thread-safety: the GIL is released around every call that can block.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings_attention.h"
#include "bindings_decoder.h"
#include "bindings_draw.h"
#include "bindings_linear.h"
#include "cuda_driver.h"
#include "dlpack.h"
#include "driver.h"
#include "elastic_memory.h"
#include "error.h"
#include "fault_driver.h"
#include "kv_arena.h"

namespace py = pybind11;

namespace vmalloc {
namespace {

using Int64Array = py::array_t<std::int64_t, py::array::c_style>;
using NoGil = py::call_guard<py::gil_scoped_release>;

/// Raise the class of that name in vmalloc.errors, which is the one home of our exceptions.
template <typename... Args>
void raise(const char* name, Args&&... args) {
  const py::object type = py::module_::import("vmalloc.errors").attr(name);
  const py::object error = type(std::forward<Args>(args)...);
  PyErr_SetObject(type.ptr(), error.ptr());
}

void translate_exception(std::exception_ptr failure) {
  try {
    if (failure) std::rethrow_exception(failure);
  } catch (const DriverError& error) {
    raise("DriverError", error.call, error.code, error.name, error.detail);
  } catch (const ConfigError& error) {
    raise("ConfigError", error.what());
  } catch (const ClosedError& error) {
    raise("ClosedError", error.what());
  } catch (const InvariantError& error) {
    raise("InvariantError", error.what());
  }
}

/// What a capsule keeps alive: the addresses, and the shape that the tensor points to.
struct TensorContext {
  std::shared_ptr<Region> region;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;
  dlpack::ManagedTensor managed;
};

void delete_tensor(dlpack::ManagedTensor* managed) {
  delete static_cast<TensorContext*>(managed->context);
}

void destroy_capsule(PyObject* capsule) {
  // A consumer renames the capsule and takes the tensor; one that nobody took is ours to delete.
  if (PyCapsule_IsValid(capsule, "dltensor") == 0) return;
  auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  managed->deleter(managed);
}

dlpack::DataType to_dlpack_type(const std::string& dtype) {
  if (dtype == "float32") return {dlpack::kTypeFloat, 32, 1};
  if (dtype == "float16") return {dlpack::kTypeFloat, 16, 1};
  if (dtype == "bfloat16") return {dlpack::kTypeBfloat, 16, 1};
  if (dtype == "uint8") return {dlpack::kTypeUInt, 8, 1};
  throw ConfigError("dtype is '" + dtype + "'; supported: float32, float16, bfloat16, uint8");
}

/// `Memory` has regions: a KVArena or an ElasticMemory.
template <typename Memory>
py::object make_tensor_capsule(const Memory& memory, std::size_t region_idx,
                               std::size_t byte_offset, const std::string& dtype,
                               std::vector<std::int64_t> shape, std::vector<std::int64_t> strides) {
  memory.check_open();
  auto context = std::make_unique<TensorContext>();
  context->region = memory.region(region_idx);
  context->shape = std::move(shape);
  context->strides = std::move(strides);
  dlpack::Tensor& tensor = context->managed.tensor;
  tensor.data = reinterpret_cast<void*>(context->region->address() + byte_offset);
  const TensorDevice device = context->region->tensor_device();
  tensor.device = {device.type, device.id};
  tensor.ndim = static_cast<std::int32_t>(context->shape.size());
  tensor.dtype = to_dlpack_type(dtype);
  tensor.shape = context->shape.data();
  tensor.strides = context->strides.data();
  tensor.byte_offset = 0;
  context->managed.context = context.get();
  context->managed.deleter = delete_tensor;
  PyObject* capsule = PyCapsule_New(&context->managed, "dltensor", destroy_capsule);
  if (capsule == nullptr) throw py::error_already_set();
  static_cast<void>(context.release());  // the capsule owns it now
  return py::reinterpret_steal<py::object>(capsule);
}

bool extend(KVArena& arena, const Int64Array& slots, const Int64Array& num_rows) {
  if (slots.size() != num_rows.size()) {
    throw ConfigError("got " + std::to_string(slots.size()) + " slots but " +
                      std::to_string(num_rows.size()) + " row counts");
  }
  const auto count = static_cast<std::size_t>(slots.size());
  const std::int64_t* slot_data = slots.data();
  const std::int64_t* row_data = num_rows.data();
  const py::gil_scoped_release release;
  return arena.try_extend(slot_data, row_data, count);
}

void free_slots(KVArena& arena, const Int64Array& slots) {
  const auto count = static_cast<std::size_t>(slots.size());
  const std::int64_t* data = slots.data();
  const py::gil_scoped_release release;
  arena.free(data, count);
}

py::dict stats_dict(KVArena& arena) {
  ArenaStats stats;
  {
    const py::gil_scoped_release release;
    stats = arena.stats();
  }
  py::dict result;
  result["created_pages"] = stats.pool.num_created;
  result["free_pages"] = stats.pool.num_free;
  result["in_use_pages"] = stats.pool.num_in_use;
  result["retired_pages"] = stats.pool.num_retired;
  result["max_pages"] = stats.pool.max_pages;
  result["map_calls"] = stats.driver.map_calls;
  result["unmap_calls"] = stats.driver.unmap_calls;
  result["access_calls"] = stats.driver.access_calls;
  result["wait_calls"] = stats.driver.wait_calls;
  result["create_calls"] = stats.driver.create_calls;
  result["destroy_calls"] = stats.driver.destroy_calls;
  result["reserved_bytes"] = stats.reserved_bytes;
  result["page_bytes"] = stats.page_bytes;
  result["cached_pages"] = stats.pool.num_cached;
  result["held_pages"] = stats.pool.num_held;
  result["shared_refs"] = stats.pool.num_extra;
  result["live_bytes"] = stats.live_bytes;
  result["logical_bytes"] = stats.logical_bytes;
  result["swapped_bytes"] = stats.swapped_bytes;
  result["committed_pages"] = stats.committed_pages;
  result["ahead_pages"] = stats.ahead_pages;
  result["parked_pages"] = stats.parked_pages;
  result["peak_committed_pages"] = stats.peak_committed_pages;
  result["peak_live_bytes"] = stats.peak_live_bytes;
  result["num_live"] = stats.num_live;
  result["peak_live"] = stats.peak_live;
  result["critical_pages"] = stats.critical_pages;
  result["critical_creates"] = stats.critical_creates;
  result["background_pages"] = stats.background_pages;
  result["adopted_pages"] = stats.adopted_pages;
  result["reclaimed_pages"] = stats.reclaimed_pages;
  result["aliased_pages"] = stats.aliased_pages;
  result["cow_copies"] = stats.cow_copies;
  result["swap_out_pages"] = stats.swap_out_pages;
  result["swap_in_pages"] = stats.swap_in_pages;
  result["stall_us"] = stats.stall_us;
  result["num_steps"] = stats.num_steps;
  result["live_byte_steps"] = stats.live_byte_steps;
  result["committed_byte_steps"] = stats.committed_byte_steps;
  result["worker_error"] = stats.worker_error;
  return result;
}

const char* kind_name(PageKind kind) {
  switch (kind) {
    case PageKind::kLive:
      return "live";
    case PageKind::kShared:
      return "shared";
    case PageKind::kAhead:
      return "ahead";
    case PageKind::kParked:
      return "parked";
    case PageKind::kRetired:
      return "retired";
  }
  throw InvariantError("a page has a kind without a name");
}

/// [(slot, per region [(kind, num_pages), ...]), ...]
py::list page_map_list(KVArena& arena) {
  std::vector<SlotMap> map;
  {
    const py::gil_scoped_release release;
    map = arena.page_map();
  }
  py::list result;
  for (const SlotMap& slot : map) {
    py::list regions;
    for (const std::vector<PageRun>& runs : slot.regions) {
      py::list region;
      for (const PageRun& run : runs) {
        region.append(py::make_tuple(kind_name(run.kind), run.num_pages));
      }
      regions.append(region);
    }
    result.append(py::make_tuple(slot.slot, regions));
  }
  return result;
}

std::optional<std::vector<py::bytes>> read_pages(Driver& driver,
                                                 const std::vector<PageHandle>& pages) {
  std::vector<std::string> contents(pages.size(), std::string(driver.page_bytes(), '\0'));
  std::vector<char*> targets;
  for (std::string& content : contents) targets.push_back(content.data());
  {
    const py::gil_scoped_release release;
    if (!driver.try_read_pages(pages.data(), targets.data(), pages.size())) return std::nullopt;
  }
  return std::vector<py::bytes>(contents.begin(), contents.end());
}

bool write_pages(Driver& driver, const std::vector<PageHandle>& pages,
                 const std::vector<std::string>& contents) {
  std::vector<const char*> sources;
  for (const std::string& content : contents) {
    if (content.size() != driver.page_bytes()) {
      throw ConfigError(with_limit("bytes to write", content.size(),
                                   "a page, " + std::to_string(driver.page_bytes())));
    }
    sources.push_back(content.data());
  }
  if (sources.size() != pages.size()) {
    throw ConfigError(
        with_limit("contents", sources.size(), "one a page, " + std::to_string(pages.size())));
  }
  const py::gil_scoped_release release;
  return driver.try_write_pages(pages.data(), sources.data(), pages.size());
}

py::dict cuda_info(const CudaDriver& driver) {
  const CudaInfo info = driver.info();
  py::dict result;
  result["device_name"] = info.device_name;
  result["compute_capability"] = info.compute_capability;
  result["granularity_bytes"] = info.granularity;
  result["recommended_granularity_bytes"] = info.recommended_granularity;
  result["total_bytes"] = info.total_bytes;
  result["driver_version"] = info.driver_version;
  result["unmap_runs"] = info.probe.unmap_runs;
  result["access_runs"] = info.probe.access_runs;
  result["read_only"] = info.probe.read_only;
  return result;
}

void bind_cuda_driver(py::module_& m) {
  py::class_<CudaDriver, Driver, std::shared_ptr<CudaDriver>>(m, "CudaDriver")
      .def("info", &cuda_info)
      .def("calls", &CudaDriver::calls)
      .def("export_page", &CudaDriver::export_page, py::arg("page"), NoGil());
  m.def(
      "make_cuda_driver",
      [](std::size_t page_bytes, int device, const std::string& library, bool cpu_tensors,
         bool exportable, bool gpu_direct_rdma) {
        CudaOptions options;
        options.page_bytes = page_bytes;
        options.device = device;
        options.library = library;
        options.cpu_tensors = cpu_tensors;
        options.exportable = exportable;
        options.gpu_direct_rdma = gpu_direct_rdma;
        return make_cuda_driver(options);
      },
      py::arg("page_bytes") = 0, py::arg("device") = 0, py::kw_only(), py::arg("library") = "",
      py::arg("cpu_tensors") = false, py::arg("exportable") = false,
      py::arg("gpu_direct_rdma") = false, NoGil());
  m.def(
      "cuda_absence",
      [](const std::string& library, int device) -> std::optional<std::string> {
        const std::string reason = cuda_absence(library, device);
        if (reason.empty()) return std::nullopt;
        return reason;
      },
      py::arg("library") = "", py::arg("device") = 0, NoGil());
}

void bind_drivers(py::module_& m) {
  py::class_<Driver, std::shared_ptr<Driver>>(m, "Driver")
      .def_property_readonly("name", &Driver::name)
      .def_property_readonly("granularity", &Driver::granularity)
      .def_property_readonly("page_bytes", &Driver::page_bytes)
      .def("memory_info",
           [](const Driver& driver) {
             const MemoryInfo info = driver.memory_info();
             return py::make_tuple(info.free_bytes, info.total_bytes);
           })
      .def("counters",
           [](const Driver& driver) {
             const DriverCounters counters = driver.counters();
             py::dict result;
             result["map_calls"] = counters.map_calls;
             result["unmap_calls"] = counters.unmap_calls;
             result["access_calls"] = counters.access_calls;
             result["wait_calls"] = counters.wait_calls;
             result["create_calls"] = counters.create_calls;
             result["destroy_calls"] = counters.destroy_calls;
             return result;
           })
      .def("try_reserve", &Driver::try_reserve, py::arg("num_bytes"), NoGil())
      .def("release", &Driver::release, py::arg("address"), py::arg("num_bytes"), NoGil())
      .def("try_create_page", &Driver::try_create_page, py::arg("index"), NoGil())
      .def("destroy_page", &Driver::destroy_page, py::arg("page"), NoGil())
      .def(
          "try_map",
          [](Driver& driver, Address address, const std::vector<PageHandle>& pages,
             bool is_writable) {
            return driver.try_map(address, pages.data(), pages.size(),
                                  is_writable ? Access::kReadWrite : Access::kReadOnly);
          },
          py::arg("address"), py::arg("pages"), py::kw_only(), py::arg("is_writable") = true,
          NoGil())
      .def("unmap", &Driver::unmap, py::arg("address"), py::arg("num_pages"), NoGil())
      .def(
          "protect",
          [](Driver& driver, Address address, std::size_t num_pages, bool is_writable) {
            driver.protect(address, num_pages,
                           is_writable ? Access::kReadWrite : Access::kReadOnly);
          },
          py::arg("address"), py::arg("num_pages"), py::kw_only(), py::arg("is_writable"), NoGil())
      .def("try_zero", &Driver::try_zero, py::arg("address"), py::arg("num_bytes"), NoGil())
      .def("try_copy_page", &Driver::try_copy_page, py::arg("to"), py::arg("page"),
           py::arg("num_bytes"), NoGil())
      .def("try_read_pages", &read_pages, py::arg("pages"))
      .def("try_write_pages", &write_pages, py::arg("pages"), py::arg("contents"))
      .def_property_readonly("tensor_device",
                             [](const Driver& driver) {
                               const TensorDevice device = driver.tensor_device();
                               return py::make_tuple(device.type, device.id);
                             })
      .def_property_readonly("is_async", &Driver::is_async)
      .def("use_stream", &Driver::use_stream, py::arg("stream"), NoGil())
      .def("wait_enqueued", &Driver::wait_enqueued, NoGil())
      .def("try_record_fence", &Driver::try_record_fence, NoGil())
      .def("fence_passed", &Driver::fence_passed, py::arg("fence"), NoGil());
  m.def("make_host_driver", &make_host_driver, py::arg("page_bytes"));
  m.def("make_null_driver", &make_null_driver, py::arg("page_bytes"));

  bind_cuda_driver(m);

  py::enum_<Fault>(m, "Fault")
      .value("NONE", Fault::kNone)
      .value("OUT_OF_MEMORY", Fault::kOutOfMemory)
      .value("ERROR", Fault::kError);
  py::class_<FaultDriver, Driver, std::shared_ptr<FaultDriver>>(m, "FaultDriver")
      .def(py::init<std::shared_ptr<Driver>>(), py::arg("inner"))
      .def("fail_call", &FaultDriver::fail_call, py::arg("call"), py::arg("fault"))
      .def("num_calls", &FaultDriver::num_calls)
      .def("fail_release_call", &FaultDriver::fail_release_call, py::arg("call"))
      .def("delay_maps", &FaultDriver::delay_maps, py::arg("microseconds"))
      .def("hold_fences", &FaultDriver::hold_fences, py::arg("hold"))
      .def("ignore_fences", &FaultDriver::ignore_fences, py::arg("ignore"));
}

std::optional<std::vector<PageId>> acquire_pages(PagePool& pool, std::size_t num_pages,
                                                 std::optional<PageId> after) {
  std::vector<PageId> pages(num_pages);
  bool any_used = false;
  if (!pool.try_acquire(num_pages, after.value_or(kNoPage), pages.data(), &any_used)) {
    return std::nullopt;
  }
  return pages;
}

void bind_pool(py::module_& m) {
  py::class_<PagePool>(m, "PagePool")
      .def(py::init<std::shared_ptr<Driver>, std::size_t>(), py::arg("driver"),
           py::arg("max_pages"))
      .def("try_acquire", &acquire_pages, py::arg("num_pages"), py::arg("after") = py::none(),
           NoGil())
      .def("release", &PagePool::release, py::arg("page"), NoGil())
      .def("retire", &PagePool::retire, py::arg("page"), NoGil())
      .def("restore", &PagePool::restore, py::arg("page"), NoGil())
      .def("settle", &PagePool::settle, py::arg("page"), NoGil())
      .def("try_share", &PagePool::try_share, py::arg("page"), NoGil())
      .def("try_hold", &PagePool::try_hold, py::arg("page"), NoGil())
      .def("unhold", &PagePool::unhold, py::arg("page"), NoGil())
      .def("try_cache", &PagePool::try_cache, py::arg("page"), NoGil())
      .def("uncache", &PagePool::uncache, py::arg("page"), NoGil())
      .def("available", &PagePool::available, NoGil())
      .def("trim", &PagePool::trim, py::arg("keep_free"), NoGil())
      .def("set_max_pages", &PagePool::set_max_pages, py::arg("max_pages"), NoGil())
      .def("try_grant", &PagePool::try_grant, py::arg("num_pages"), NoGil())
      .def("end_grant", &PagePool::end_grant, py::arg("num_pages"), py::arg("keeps_pages"), NoGil())
      .def("check_invariants", &PagePool::check_invariants, py::arg("live"), py::arg("held"),
           py::arg("cached"), py::arg("retired"), NoGil())
      .def("stats", [](const PagePool& pool) {
        const PoolStats stats = pool.stats();
        py::dict result;
        result["created_pages"] = stats.num_created;
        result["free_pages"] = stats.num_free;
        result["in_use_pages"] = stats.num_in_use;
        result["cached_pages"] = stats.num_cached;
        result["shared_refs"] = stats.num_extra;
        result["retired_pages"] = stats.num_retired;
        result["max_pages"] = stats.max_pages;
        return result;
      });
}

void bind_arena(py::module_& m) {
  py::class_<LayerKVSpec>(m, "LayerKVSpec")
      .def(py::init([](std::uint32_t num_kv_heads, std::uint32_t k_head_dim,
                       std::uint32_t v_head_dim, std::uint32_t element_bytes) {
             return LayerKVSpec{num_kv_heads, k_head_dim, v_head_dim, element_bytes};
           }),
           py::kw_only(), py::arg("num_kv_heads"), py::arg("k_head_dim"), py::arg("v_head_dim"),
           py::arg("element_bytes"));

  py::class_<Prefix>(m, "Prefix")
      .def(py::init([](std::size_t num_rows, std::vector<std::vector<PageId>> pages,
                       const std::vector<std::optional<PageId>>& tails) {
             Prefix prefix{num_rows, std::move(pages), {}};
             for (const auto& tail : tails) prefix.tails.push_back(tail.value_or(kNoPage));
             return prefix;
           }),
           py::kw_only(), py::arg("num_rows"), py::arg("pages"), py::arg("tails"));

  py::class_<KVArena>(m, "KVArena")
      .def(py::init([](std::shared_ptr<Driver> driver, std::vector<LayerKVSpec> layers,
                       std::size_t layers_per_group, bool kv_split, std::size_t num_slots,
                       std::size_t max_rows, std::size_t max_pages, std::size_t low_pages,
                       std::size_t high_pages, std::size_t ahead_rows, std::size_t lookahead_rows,
                       std::size_t spare_pages, bool zero_on_reuse, std::size_t swap_bytes,
                       bool protect_shared) {
             ArenaConfig config{};
             config.layers = std::move(layers);
             config.layers_per_group = layers_per_group;
             config.kv_split = kv_split;
             config.num_slots = num_slots;
             config.max_rows = max_rows;
             config.max_pages = max_pages;
             config.low_pages = low_pages;
             config.high_pages = high_pages;
             config.ahead_rows = ahead_rows;
             config.lookahead_rows = lookahead_rows;
             config.spare_pages = spare_pages;
             config.zero_on_reuse = zero_on_reuse;
             config.swap_bytes = swap_bytes;
             config.protect_shared = protect_shared;
             return std::make_unique<KVArena>(std::move(driver), config);
           }),
           py::arg("driver").none(false), py::kw_only(), py::arg("layers"),
           py::arg("layers_per_group"), py::arg("kv_split") = false, py::arg("num_slots"),
           py::arg("max_rows"), py::arg("max_pages"), py::arg("low_pages") = 0,
           py::arg("high_pages") = SIZE_MAX, py::arg("ahead_rows") = 0,
           py::arg("lookahead_rows") = 0, py::arg("spare_pages") = 0,
           py::arg("zero_on_reuse") = false, py::arg("swap_bytes") = 0,
           py::arg("protect_shared") = false)
      .def("try_admit", &KVArena::try_admit, py::arg("num_slots"), py::arg("num_rows"),
           py::arg("reserved_rows") = 0, py::arg("prefix") = nullptr, NoGil())
      .def("can_admit", &KVArena::can_admit, py::arg("num_slots"), py::arg("num_rows"), NoGil())
      .def("try_fork", &KVArena::try_fork, py::arg("parent"), py::arg("num_children"),
           py::arg("num_rows"), NoGil())
      .def("try_assign", &KVArena::try_assign, py::arg("slots"), py::arg("sources"),
           py::arg("num_rows"), NoGil())
      .def("prepare_write", &KVArena::prepare_write, py::arg("slot"), NoGil())
      .def("page_ids", &KVArena::page_ids, py::arg("slot"), py::arg("regions"),
           py::arg("page_idxs"), NoGil())
      .def("cache_pages", &KVArena::cache_pages, py::arg("slot"), py::arg("regions"),
           py::arg("page_idxs"), NoGil())
      .def("uncache_pages", &KVArena::uncache_pages, py::arg("pages"), NoGil())
      .def("try_swap_out", &KVArena::try_swap_out, py::arg("slots"), py::arg("with_held") = false,
           NoGil())
      .def("try_swap_in", &KVArena::try_swap_in, py::arg("group"), NoGil())
      .def("drop_swapped", &KVArena::drop_swapped, py::arg("group"), py::arg("idx"), NoGil())
      .def("pin_pages", &KVArena::pin_pages, py::arg("pages"), NoGil())
      .def("unpin_pages", &KVArena::unpin_pages, py::arg("pages"), NoGil())
      .def("last_shortage", &KVArena::last_shortage, NoGil())
      .def("available_pages", &KVArena::available_pages, NoGil())
      .def("try_extend", &extend, py::arg("slots"), py::arg("num_rows"))
      .def("truncate", &KVArena::truncate, py::arg("slot"), py::arg("num_rows"), NoGil())
      .def("free", &free_slots, py::arg("slots"))
      .def("prefetch", &KVArena::prefetch, py::arg("num_rows"), NoGil())
      .def("begin_step", &KVArena::begin_step, py::arg("stream") = 0, NoGil())
      .def("end_step", &KVArena::end_step, py::arg("epoch"), NoGil())
      .def("check_between_steps", &KVArena::check_between_steps, NoGil())
      .def("trim", &KVArena::trim, py::arg("keep_free"), NoGil())
      .def("resize", &KVArena::resize, py::arg("max_pages"), py::arg("low_pages") = 0,
           py::arg("high_pages") = SIZE_MAX, NoGil())
      .def("try_grant", &KVArena::try_grant, py::arg("num_pages"), NoGil())
      .def("end_grant", &KVArena::end_grant, py::arg("num_pages"), py::arg("keeps_pages"), NoGil())
      .def("set_low_pages", &KVArena::set_low_pages, py::arg("low_pages"), NoGil())
      .def("max_pages", &KVArena::max_pages, NoGil())
      .def("mapped_rows", &KVArena::mapped_rows, py::arg("slot"), NoGil())
      .def("max_slot_rows", &KVArena::max_slot_rows, NoGil())
      .def("wait_worker", &KVArena::wait_worker, NoGil())
      .def("pause_worker", &KVArena::pause_worker, NoGil())
      .def("run_worker", &KVArena::run_worker, py::arg("max_jobs"), NoGil())
      .def("check_invariants", &KVArena::check_invariants,
           py::arg("cached") = std::vector<PageId>{}, NoGil())
      .def("close", &KVArena::close, NoGil())
      .def("stats", &stats_dict)
      .def("page_map", &page_map_list)
      .def_property_readonly("num_regions", &KVArena::num_regions)
      .def(
          "region_row_bytes",
          [](const KVArena& arena, std::size_t idx) { return arena.region(idx)->row_bytes(); },
          py::arg("region"))
      .def(
          "region_slot_bytes",
          [](const KVArena& arena, std::size_t idx) { return arena.region(idx)->slot_bytes(); },
          py::arg("region"))
      .def("tensor_capsule", &make_tensor_capsule<KVArena>, py::arg("region"),
           py::arg("byte_offset"), py::arg("dtype"), py::arg("shape"), py::arg("strides"));
}

using ByteRanges = std::vector<std::pair<std::size_t, std::size_t>>;

std::vector<ByteSpan> to_spans(const ByteRanges& ranges) {
  std::vector<ByteSpan> spans;
  for (const auto& [first, end] : ranges) spans.push_back({first, end});
  return spans;
}

py::dict elastic_stats(ElasticMemory& memory) {
  ElasticStats stats;
  {
    const py::gil_scoped_release release;
    stats = memory.stats();
  }
  py::dict result;
  result["created_pages"] = stats.pool.num_created;
  result["free_pages"] = stats.pool.num_free;
  result["in_use_pages"] = stats.pool.num_in_use;
  result["retired_pages"] = stats.pool.num_retired;
  result["max_pages"] = stats.pool.max_pages;
  result["shared_refs"] = stats.pool.num_extra;
  result["aliased_pages"] = stats.aliased_pages;
  result["page_bytes"] = stats.page_bytes;
  result["reserved_bytes"] = stats.reserved_bytes;
  result["map_calls"] = stats.driver.map_calls;
  result["unmap_calls"] = stats.driver.unmap_calls;
  result["create_calls"] = stats.driver.create_calls;
  result["destroy_calls"] = stats.driver.destroy_calls;
  result["wait_calls"] = stats.driver.wait_calls;
  return result;
}

void bind_elastic_memory(py::module_& m) {
  py::class_<ElasticMemory>(m, "ElasticMemory")
      .def(py::init([](std::shared_ptr<Driver> driver, std::size_t num_regions,
                       std::size_t region_bytes, std::size_t max_pages, std::size_t spare_pages,
                       bool zero_on_reuse) {
             return std::make_unique<ElasticMemory>(std::move(driver), num_regions, region_bytes,
                                                    max_pages, spare_pages, zero_on_reuse);
           }),
           py::arg("driver").none(false), py::kw_only(), py::arg("num_regions"),
           py::arg("region_bytes"), py::arg("max_pages"), py::arg("spare_pages") = 0,
           py::arg("zero_on_reuse") = false)
      .def(
          "try_commit",
          [](ElasticMemory& memory, const ByteRanges& spans, Stream stream) {
            return memory.try_commit(to_spans(spans), stream);
          },
          py::arg("spans"), py::arg("stream") = 0, NoGil())
      .def(
          "decommit",
          [](ElasticMemory& memory, const ByteRanges& spans, Stream stream) {
            memory.decommit(to_spans(spans), stream);
          },
          py::arg("spans"), py::arg("stream") = 0, NoGil())
      .def(
          "try_alias",
          [](ElasticMemory& memory, std::pair<std::size_t, std::size_t> source, std::size_t target,
             Stream stream) {
            return memory.try_alias({source.first, source.second}, target, stream);
          },
          py::arg("source"), py::arg("target"), py::arg("stream") = 0, NoGil())
      .def("try_create_spare", &ElasticMemory::try_create_spare, py::arg("num_pages"), NoGil())
      .def("trim", &ElasticMemory::trim, py::arg("keep_free"), NoGil())
      .def("resize", &ElasticMemory::resize, py::arg("max_pages"), NoGil())
      .def("check_invariants", &ElasticMemory::check_invariants, NoGil())
      .def("check_open", &ElasticMemory::check_open, NoGil())
      .def("close", &ElasticMemory::close, NoGil())
      .def("stats", &elastic_stats)
      .def_property_readonly("num_regions", &ElasticMemory::num_regions)
      .def("tensor_capsule", &make_tensor_capsule<ElasticMemory>, py::arg("region"),
           py::arg("byte_offset"), py::arg("dtype"), py::arg("shape"), py::arg("strides"));
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "C++ core of vmalloc; see _core.pyi for the typed interface.";
  py::register_exception_translator(&translate_exception);
  bind_drivers(m);
  bind_pool(m);
  bind_arena(m);
  bind_elastic_memory(m);
  bind_attention(m);
  bind_decoder(m);
  bind_draw(m);
  bind_linear(m);
}

}  // namespace vmalloc
