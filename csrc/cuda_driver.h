// cuda_driver.h: physical pages on an NVIDIA GPU, through the driver's virtual-memory calls.
// Owns: pages, window, events, host buffers, a reference to the primary context.
// Thread-safety: as driver.h.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>

#include "cuda_device.h"
#include "cuda_host_buffers.h"
#include "cuda_stream.h"
#include "cuda_window.h"
#include "driver.h"
#include "fork_guard.h"

namespace vmalloc {

struct CudaOptions {
  std::size_t page_bytes = 0;  ///< 0: the granularity
  int device = 0;
  std::string library;       ///< path of libcuda; empty: see cuda::Library::load
  bool cpu_tensors = false;  ///< over the stand-in only: tensors say that they are on the CPU
  bool exportable = false;
  bool gpu_direct_rdma = false;
};

/// What only the device can tell, found out by trying when a driver is made.
struct CudaProbe {
  bool unmap_runs = false;   ///< one call unmaps several pages
  bool access_runs = false;  ///< one call makes several pages accessible
  bool read_only = false;    ///< pages can be mapped for reading only
};

struct CudaInfo {
  std::string device_name;
  std::string compute_capability;
  std::size_t granularity = 0;
  std::size_t recommended_granularity = 0;
  std::size_t total_bytes = 0;
  int driver_version = 0;
  CudaProbe probe;
};

/// Memory comes by cuMemCreate and goes by cuMemRelease; one cuMemSetAccess makes a run of mapped
/// pages accessible and one cuMemUnmap takes a run away, where the device takes runs. New pages are
/// cleared when they are first mapped: the driver promises nothing about their contents.
class CudaDriver final : public Driver {
 public:
  /// Throws ConfigError if there is no driver or device, or it lacks what is asked for.
  explicit CudaDriver(const CudaOptions& options);
  ~CudaDriver() override;

  const char* name() const override { return "cuda"; }
  std::size_t granularity() const override { return granularity_; }
  std::size_t page_bytes() const override { return page_bytes_; }
  TensorDevice tensor_device() const override;
  bool is_async() const override { return true; }
  bool can_protect() const override { return probe_.read_only; }
  std::uint64_t num_enqueued() const override { return stream_.num_enqueued(); }
  void attach_thread() override;
  void use_stream(Stream stream) override;
  std::optional<Address> try_reserve(std::size_t bytes) override;
  void release(Address address, std::size_t bytes) override;
  std::optional<PageHandle> try_create_page(std::uint32_t index) override;
  void destroy_page(PageHandle page) override;
  bool try_map(Address address, const PageHandle* pages, std::size_t num_pages,
               Access access) override;
  void unmap(Address address, std::size_t num_pages) override;
  void protect(Address address, std::size_t num_pages, Access access) override;
  bool try_zero(Address address, std::size_t bytes) override;
  bool try_copy_page(Address to, PageHandle from, std::size_t bytes) override;
  std::shared_ptr<char[]> try_allocate_host(std::size_t bytes) override;
  bool try_read_pages(const PageHandle* from, char* const* to, std::size_t num_pages) override;
  bool try_write_pages(const PageHandle* to, const char* const* from,
                       std::size_t num_pages) override;
  std::optional<Fence> try_record_fence() override;
  bool fence_passed(Fence fence) override;
  void wait_enqueued() override;
  MemoryInfo memory_info() const override;
  DriverCounters counters() const override;

  [[nodiscard]] CudaInfo info() const;

  /// Calls of the driver by all objects of this process, by name.
  [[nodiscard]] std::map<std::string, std::uint64_t> calls() const { return library_.calls(); }

  /// A file descriptor for the page, which the caller closes. Throws ConfigError unless pages are
  /// exportable.
  [[nodiscard]] int export_page(PageHandle page) const;

 private:
  struct Page {
    std::uint32_t index;
    bool is_fresh = true;           // never written, so its contents are unknown
    Address window = 0;             // where it is mapped in the window; 0: not
    std::uint64_t last_access = 0;  // number of the work that last used the window
  };

  // What is left of pages, addresses, events and host memory; false if the driver refused to begin.
  bool try_give_back() noexcept;
  /// The context is current as long as this lives. Throws ClosedError in a forked child.
  [[nodiscard]] cuda::CurrentContext enter() const;
  void probe();
  void probe_runs(cuda::DevicePointer base, const cuda::Handle* pages);
  [[nodiscard]] cuda::AccessDesc access_desc(Access access) const;
  [[nodiscard]] cuda::Result set_access(Address address, std::size_t num_pages, Access access);
  [[nodiscard]] bool try_clear_fresh(Address address, const PageHandle* pages,
                                     std::size_t num_pages);
  [[nodiscard]] std::optional<Address> try_window(PageHandle handle, Page& page);
  [[nodiscard]] Page& find(PageHandle handle);
  template <typename Work>
  [[nodiscard]] bool try_enqueue(const char* call, std::uint64_t* number, Work work);
  template <typename Copy>
  [[nodiscard]] bool try_move_pages(std::size_t num_pages, const char* call,
                                    const PageHandle* pages, Copy copy);

  cuda::Library& library_;
  CudaOptions options_;
  ForkGuard guard_;
  cuda::DeviceContext device_;
  std::size_t granularity_;
  std::size_t page_bytes_;
  CudaProbe probe_;
  cuda::WorkStream stream_;
  std::shared_ptr<cuda::HostBuffers> host_buffers_;

  mutable std::mutex mutex_;  // the books below; before the stream's
  cuda::PageWindow window_;
  std::unordered_map<PageHandle, Page> pages_;
  std::set<Address> unmapped_;  // of a run that an error left half unmapped

  std::atomic<std::uint64_t> map_calls_{0}, unmap_calls_{0}, access_calls_{0}, create_calls_{0},
      destroy_calls_{0};
};

[[nodiscard]] std::shared_ptr<CudaDriver> make_cuda_driver(const CudaOptions& options);

/// Why device `ordinal` cannot be used, for people; empty if it can.
[[nodiscard]] std::string cuda_absence(const std::string& library, int ordinal);

}  // namespace vmalloc
