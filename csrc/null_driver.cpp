// null_driver.cpp: a driver that counts and holds no memory, for simulations.
// Owns: nothing but counters.  Thread-safety: all methods.
#include <atomic>

#include "dlpack.h"
#include "driver.h"

namespace vmalloc {
namespace {

constexpr std::size_t kGranularity = 4096;
constexpr Address kFirstAddress = Address{1} << 46;  // never a real mapping of ours
constexpr std::size_t kTotalBytes = std::size_t{1} << 50;

class NullDriver final : public Driver {
 public:
  explicit NullDriver(std::size_t page_bytes) : page_bytes_(page_bytes) {
    check_page_bytes("null", page_bytes, kGranularity);
  }

  const char* name() const override { return "null"; }
  std::size_t granularity() const override { return kGranularity; }
  std::size_t page_bytes() const override { return page_bytes_; }
  TensorDevice tensor_device() const override { return {dlpack::kDeviceCpu, 0}; }
  bool is_async() const override { return false; }
  bool can_protect() const override { return true; }
  std::uint64_t num_enqueued() const override { return 0; }
  void attach_thread() override {}
  void use_stream(Stream) override {}

  std::optional<Address> try_reserve(std::size_t bytes) override {
    return next_address_.fetch_add(bytes);
  }
  void release(Address, std::size_t) override {}

  std::optional<PageHandle> try_create_page(std::uint32_t index) override {
    ++create_calls_;
    return index;
  }
  void destroy_page(PageHandle) override { ++destroy_calls_; }

  bool try_map(Address, const PageHandle*, std::size_t, Access) override {
    ++map_calls_;
    return true;
  }
  void unmap(Address, std::size_t) override { ++unmap_calls_; }
  void protect(Address, std::size_t, Access) override {}
  bool try_zero(Address, std::size_t) override { return true; }
  bool try_copy_page(Address, PageHandle, std::size_t) override { return true; }
  std::shared_ptr<char[]> try_allocate_host(std::size_t) override {
    return std::shared_ptr<char[]>(new char[1]);  // nobody reads or writes it
  }
  bool try_read_pages(const PageHandle*, char* const*, std::size_t) override { return true; }
  bool try_write_pages(const PageHandle*, const char* const*, std::size_t) override { return true; }

  std::optional<Fence> try_record_fence() override { return 0; }
  bool fence_passed(Fence) override { return true; }
  void wait_enqueued() override {}

  MemoryInfo memory_info() const override { return {kTotalBytes, kTotalBytes}; }
  DriverCounters counters() const override {
    return {map_calls_, unmap_calls_, 0, create_calls_, destroy_calls_, 0};
  }

 private:
  std::size_t page_bytes_;
  std::atomic<Address> next_address_{kFirstAddress};
  std::atomic<std::uint64_t> map_calls_{0}, unmap_calls_{0}, create_calls_{0}, destroy_calls_{0};
};

}  // namespace

std::shared_ptr<Driver> make_null_driver(std::size_t page_bytes) {
  return std::make_shared<NullDriver>(page_bytes);
}

}  // namespace vmalloc
