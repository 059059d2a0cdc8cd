#include "cuda_driver.h"

#include <vector>

#include "dlpack.h"
#include "error.h"

namespace vmalloc {
namespace {

std::string describe_run(std::size_t num_pages) {
  return std::to_string(num_pages) + (num_pages == 1 ? " page" : " pages");
}

}  // namespace

CudaDriver::CudaDriver(const CudaOptions& options)
    : library_(cuda::Library::load(options.library)),
      options_(options),
      device_(library_, options.device, {options.exportable, options.gpu_direct_rdma}),
      granularity_(device_.granularity(cuda::kGranularityMinimum)),
      page_bytes_(options.page_bytes == 0 ? granularity_ : options.page_bytes),
      stream_(library_),
      window_(library_, page_bytes_, access_desc(Access::kReadWrite)) {
  check_page_bytes("cuda", page_bytes_, granularity_);
  if (options_.cpu_tensors && !library_.is_stand_in()) {
    throw ConfigError(
        "CPU tensors over the cuda driver need the stand-in driver of the tests: the CPU cannot "
        "read a GPU's memory");
  }
  host_buffers_ = std::make_shared<cuda::HostBuffers>(library_, device_.context(), page_bytes_);
  probe();
}

CudaDriver::~CudaDriver() {
  if (guard_.is_forked_child()) {
    device_.forget();
    return;
  }
  // As with all that is given back: one refusal is asked again. At exit the driver may be gone, and
  // everything with it.
  if (try_give_back() || try_give_back()) return;
  device_.forget();
  host_buffers_->forget();
}

bool CudaDriver::try_give_back() noexcept {
  try {
    const cuda::CurrentContext current(library_, device_.context());
    // A copy that still reads the window would meet error 700, which others in the process share.
    if (!stream_.is_done(stream_.num_enqueued())) stream_.wait();
    for (const auto& [handle, page] : pages_) {
      // Nobody destroyed it: its owner is gone, or was refused twice.
      const cuda::Handle left = handle;
      const Address window = page.window;
      if (window != 0) {
        cuda::Library::give_back([&] { return library_.cuMemUnmap(window, page_bytes_); });
      }
      cuda::Library::give_back([&] { return library_.cuMemRelease(left); });
    }
    window_.close();
    stream_.close();
    host_buffers_->close();
    return true;
  } catch (const DriverError&) {  // from before anything was given back
    return false;
  }
}

cuda::CurrentContext CudaDriver::enter() const {
  guard_.check("this CUDA driver");
  return {library_, device_.context()};
}

// ---- what the device can do

/// Try on one page what only the device can tell. Lack of memory leaves the careful ways.
void CudaDriver::probe() {
  const cuda::CurrentContext current = enter();
  cuda::DevicePointer base = 0;
  if (!library_.try_check("cuMemAddressReserve",
                          library_.cuMemAddressReserve(&base, 2 * page_bytes_, 0, 0, 0))) {
    return;
  }
  cuda::Handle page = 0;
  const cuda::Result created = library_.cuMemCreate(&page, page_bytes_, &device_.prop(), 0);
  if (created == cuda::kSuccess) {
    const cuda::Handle twice[] = {page, page};
    probe_runs(base, twice);
    cuda::Library::give_back([&] { return library_.cuMemRelease(page); });
  }
  cuda::Library::give_back([&] { return library_.cuMemAddressFree(base, 2 * page_bytes_); });
  if (created != cuda::kOutOfMemory) library_.check("cuMemCreate", created);
}

void CudaDriver::probe_runs(cuda::DevicePointer base, const cuda::Handle* pages) {
  std::size_t num_mapped = 0;
  for (; num_mapped < 2; ++num_mapped) {
    const cuda::DevicePointer at = base + num_mapped * page_bytes_;
    if (library_.cuMemMap(at, page_bytes_, 0, pages[num_mapped], 0) != cuda::kSuccess) break;
  }
  if (num_mapped == 2) {
    const cuda::AccessDesc writable = access_desc(Access::kReadWrite);
    const cuda::AccessDesc readable = access_desc(Access::kReadOnly);
    probe_.access_runs =
        library_.cuMemSetAccess(base, 2 * page_bytes_, &writable, 1) == cuda::kSuccess;
    probe_.read_only = library_.cuMemSetAccess(base, page_bytes_, &readable, 1) == cuda::kSuccess;
    probe_.unmap_runs = library_.cuMemUnmap(base, 2 * page_bytes_) == cuda::kSuccess;
    if (probe_.unmap_runs) {
      // A call that took only the first away would show now.
      const cuda::DevicePointer second = base + page_bytes_;
      probe_.unmap_runs = library_.cuMemMap(second, page_bytes_, 0, pages[1], 0) == cuda::kSuccess;
      cuda::Library::give_back([&] { return library_.cuMemUnmap(second, page_bytes_); });
      return;
    }
  }
  for (std::size_t i = 0; i < num_mapped; ++i) {
    cuda::Library::give_back(
        [&] { return library_.cuMemUnmap(base + i * page_bytes_, page_bytes_); });
  }
}

CudaInfo CudaDriver::info() const {
  const cuda::CurrentContext current = enter();
  CudaInfo info;
  info.device_name = device_.name();
  info.compute_capability = device_.compute_capability();
  info.granularity = granularity_;
  info.recommended_granularity = device_.granularity(cuda::kGranularityRecommended);
  info.total_bytes = device_.total_bytes();
  info.driver_version = device_.driver_version();
  info.probe = probe_;
  return info;
}

TensorDevice CudaDriver::tensor_device() const {
  if (options_.cpu_tensors) return {dlpack::kDeviceCpu, 0};
  return {dlpack::kDeviceCuda, options_.device};
}

MemoryInfo CudaDriver::memory_info() const {
  const cuda::CurrentContext current = enter();
  MemoryInfo info{};
  library_.check("cuMemGetInfo", library_.cuMemGetInfo(&info.free_bytes, &info.total_bytes));
  return info;
}

DriverCounters CudaDriver::counters() const {
  return {map_calls_,    unmap_calls_,   access_calls_,
          create_calls_, destroy_calls_, stream_.num_waits()};
}

// ---- addresses and pages

std::optional<Address> CudaDriver::try_reserve(std::size_t bytes) {
  const cuda::CurrentContext current = enter();
  // The driver takes powers of two, and 0 for the granularity.
  const bool is_power = (page_bytes_ & (page_bytes_ - 1)) == 0;
  cuda::DevicePointer address = 0;
  if (!library_.try_check(
          "cuMemAddressReserve",
          library_.cuMemAddressReserve(&address, bytes, is_power ? page_bytes_ : 0, 0, 0),
          std::to_string(bytes) + " bytes")) {
    return std::nullopt;
  }
  return address;
}

void CudaDriver::release(Address address, std::size_t bytes) {
  const cuda::CurrentContext current = enter();
  library_.check("cuMemAddressFree", library_.cuMemAddressFree(address, bytes));
}

std::optional<PageHandle> CudaDriver::try_create_page(std::uint32_t index) {
  const cuda::CurrentContext current = enter();
  cuda::Handle handle = 0;
  if (!library_.try_check("cuMemCreate",
                          library_.cuMemCreate(&handle, page_bytes_, &device_.prop(), 0))) {
    return std::nullopt;
  }
  ++create_calls_;
  const std::lock_guard<std::mutex> lock(mutex_);
  pages_.emplace(handle, Page{index});
  return handle;
}

void CudaDriver::destroy_page(PageHandle handle) {
  const cuda::CurrentContext current = enter();
  const std::lock_guard<std::mutex> lock(mutex_);
  Page& page = find(handle);
  if (page.window != 0) {
    // Freed pages may be the source of a copy that the device has not come to yet.
    if (!stream_.is_done(page.last_access)) stream_.wait();
    window_.unmap(page.window);
    page.window = 0;
  }
  library_.check("cuMemRelease", library_.cuMemRelease(handle));
  ++destroy_calls_;
  pages_.erase(handle);
}

int CudaDriver::export_page(PageHandle page) const {
  if (!options_.exportable) throw ConfigError("pages of this driver were not made exportable");
  const cuda::CurrentContext current = enter();
  int fd = -1;
  library_.check("cuMemExportToShareableHandle",
                 library_.cuMemExportToShareableHandle(&fd, page, cuda::kHandlePosixFd, 0));
  return fd;
}

CudaDriver::Page& CudaDriver::find(PageHandle handle) {
  const auto page = pages_.find(handle);
  check_invariant(page != pages_.end(), "a page is used that this driver did not create");
  return page->second;
}

// ---- mapping

cuda::AccessDesc CudaDriver::access_desc(Access access) const {
  return {device_.prop().location,
          access == Access::kReadWrite ? cuda::kAccessReadWrite : cuda::kAccessRead};
}

cuda::Result CudaDriver::set_access(Address address, std::size_t num_pages, Access access) {
  const cuda::AccessDesc desc = access_desc(access);
  const std::size_t pages_per_call = probe_.access_runs ? num_pages : 1;
  for (std::size_t i = 0; i < num_pages; i += pages_per_call) {
    ++access_calls_;
    const cuda::Result result =
        library_.cuMemSetAccess(address + i * page_bytes_, pages_per_call * page_bytes_, &desc, 1);
    if (result != cuda::kSuccess) return result;
  }
  return cuda::kSuccess;
}

bool CudaDriver::try_map(Address address, const PageHandle* pages, std::size_t num_pages,
                         Access access) {
  if (num_pages == 0) return true;
  const cuda::CurrentContext current = enter();
  const char* call = "cuMemMap";
  cuda::Result result = cuda::kSuccess;
  std::size_t num_mapped = 0;
  while (num_mapped < num_pages && result == cuda::kSuccess) {
    result =
        library_.cuMemMap(address + num_mapped * page_bytes_, page_bytes_, 0, pages[num_mapped], 0);
    if (result == cuda::kSuccess) ++num_mapped;
  }
  ++map_calls_;
  if (result == cuda::kSuccess) {
    call = "cuMemSetAccess";
    result = set_access(address, num_pages, access);
  }
  if (result != cuda::kSuccess) {
    if (num_mapped > 0) unmap(address, num_mapped);
    return library_.try_check(call, result, describe_run(num_pages));
  }
  bool is_clear = false;
  try {
    is_clear = try_clear_fresh(address, pages, num_pages);
  } catch (...) {
    stream_.wait();
    unmap(address, num_pages);
    throw;
  }
  if (!is_clear) {
    stream_.wait();
    unmap(address, num_pages);
  }
  return is_clear;
}

/// Clear what the driver left in new pages: it may be anything, NaN and other processes' data too.
bool CudaDriver::try_clear_fresh(Address address, const PageHandle* pages, std::size_t num_pages) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto is_fresh = [this](PageHandle handle) {
    const auto page = pages_.find(handle);
    return page != pages_.end() && page->second.is_fresh;
  };
  for (std::size_t first = 0; first < num_pages; ++first) {
    std::size_t end = first;
    while (end < num_pages && is_fresh(pages[end])) ++end;
    if (end == first) continue;
    if (!try_zero(address + first * page_bytes_, (end - first) * page_bytes_)) return false;
    for (std::size_t i = first; i < end; ++i) find(pages[i]).is_fresh = false;
    first = end;
  }
  return true;
}

void CudaDriver::unmap(Address address, std::size_t num_pages) {
  if (num_pages == 0) return;
  const cuda::CurrentContext current = enter();
  if (probe_.unmap_runs) {
    library_.check("cuMemUnmap", library_.cuMemUnmap(address, num_pages * page_bytes_),
                   describe_run(num_pages));
    ++unmap_calls_;
    return;
  }
  // Page by page an error may strike in the middle; the caller tries the whole run again.
  const std::lock_guard<std::mutex> lock(mutex_);
  for (std::size_t i = 0; i < num_pages; ++i) {
    const Address page = address + i * page_bytes_;
    if (unmapped_.count(page) != 0) continue;
    library_.check("cuMemUnmap", library_.cuMemUnmap(page, page_bytes_), describe_run(num_pages));
    ++unmap_calls_;
    unmapped_.insert(page);
  }
  for (std::size_t i = 0; i < num_pages; ++i) unmapped_.erase(address + i * page_bytes_);
}

void CudaDriver::protect(Address address, std::size_t num_pages, Access access) {
  if (access == Access::kReadOnly && !probe_.read_only) {
    throw ConfigError("this CUDA device cannot map pages for reading only (protect_shared)");
  }
  const cuda::CurrentContext current = enter();
  library_.check("cuMemSetAccess", set_access(address, num_pages, access), describe_run(num_pages));
}

// ---- work on the stream

void CudaDriver::attach_thread() {
  guard_.check("this CUDA driver");
  cuda::Context current = nullptr;
  library_.check("cuCtxGetCurrent", library_.cuCtxGetCurrent(&current));
  if (current == device_.context()) return;
  library_.check("cuCtxSetCurrent", library_.cuCtxSetCurrent(device_.context()));
}

void CudaDriver::use_stream(Stream stream) {
  if (stream_.is_on(stream)) return;
  const cuda::CurrentContext current = enter();
  stream_.use(stream);
}

/// Enqueue; where the CPU stands in for the GPU's kernels, it must find the work done.
template <typename Work>
bool CudaDriver::try_enqueue(const char* call, std::uint64_t* number, Work work) {
  if (!stream_.try_enqueue(call, number, work)) return false;
  if (options_.cpu_tensors) stream_.wait();
  return true;
}

bool CudaDriver::try_zero(Address address, std::size_t bytes) {
  const cuda::CurrentContext current = enter();
  std::uint64_t number = 0;
  return try_enqueue("cuMemsetD8Async", &number, [&](cuda::StreamHandle stream) {
    return library_.cuMemsetD8Async(address, 0, bytes, stream);
  });
}

std::optional<Address> CudaDriver::try_window(PageHandle handle, Page& page) {
  if (page.window == 0) {
    const std::optional<Address> address = window_.try_map(page.index, handle);
    if (!address) return std::nullopt;
    page.window = *address;
  }
  return page.window;
}

bool CudaDriver::try_copy_page(Address to, PageHandle from, std::size_t bytes) {
  const cuda::CurrentContext current = enter();
  const std::lock_guard<std::mutex> lock(mutex_);
  Page& page = find(from);
  const std::optional<Address> source = try_window(from, page);
  return source &&
         try_enqueue("cuMemcpyDtoDAsync", &page.last_access, [&](cuda::StreamHandle stream) {
           return library_.cuMemcpyDtoDAsync(to, *source, bytes, stream);
         });
}

std::shared_ptr<char[]> CudaDriver::try_allocate_host(std::size_t bytes) {
  guard_.check("this CUDA driver");
  return host_buffers_->try_allocate(bytes);
}

bool CudaDriver::try_read_pages(const PageHandle* from, char* const* to, std::size_t num_pages) {
  return try_move_pages(num_pages, "cuMemcpyDtoHAsync", from,
                        [&](std::size_t i, Address window, cuda::StreamHandle stream) {
                          return library_.cuMemcpyDtoHAsync(to[i], window, page_bytes_, stream);
                        });
}

bool CudaDriver::try_write_pages(const PageHandle* to, const char* const* from,
                                 std::size_t num_pages) {
  return try_move_pages(num_pages, "cuMemcpyHtoDAsync", to,
                        [&](std::size_t i, Address window, cuda::StreamHandle stream) {
                          return library_.cuMemcpyHtoDAsync(window, from[i], page_bytes_, stream);
                        });
}

/// Enqueue one whole-page copy after the other, and wait for all of them once.
template <typename Copy>
bool CudaDriver::try_move_pages(std::size_t num_pages, const char* call, const PageHandle* pages,
                                Copy copy) {
  if (num_pages == 0) return true;
  const cuda::CurrentContext current = enter();
  const std::lock_guard<std::mutex> lock(mutex_);
  bool is_done = true;
  try {
    for (std::size_t i = 0; i < num_pages && is_done; ++i) {
      Page& page = find(pages[i]);
      const std::optional<Address> window = try_window(pages[i], page);
      is_done = window && stream_.try_enqueue(
                              call, &page.last_access,
                              [&](cuda::StreamHandle stream) { return copy(i, *window, stream); });
      if (is_done) page.is_fresh = false;  // written, or about to be dropped
    }
  } catch (...) {
    stream_.wait();  // the host's side of the copies may go once this returns
    throw;
  }
  stream_.wait();
  return is_done;
}

std::optional<Fence> CudaDriver::try_record_fence() {
  const cuda::CurrentContext current = enter();
  return stream_.try_record_fence();
}

bool CudaDriver::fence_passed(Fence fence) {
  const cuda::CurrentContext current = enter();
  return stream_.fence_passed(fence);
}

void CudaDriver::wait_enqueued() {
  const cuda::CurrentContext current = enter();
  stream_.wait();
}

std::shared_ptr<CudaDriver> make_cuda_driver(const CudaOptions& options) {
  return std::make_shared<CudaDriver>(options);
}

std::string cuda_absence(const std::string& library, int ordinal) {
  try {
    const cuda::DeviceContext device(cuda::Library::load(library), ordinal, {});
    static_cast<void>(device.granularity(cuda::kGranularityMinimum));
  } catch (const std::exception& failure) {
    return failure.what();
  }
  return "";
}

}  // namespace vmalloc
