// host_driver.cpp: physical pages on the CPU: one memfd whose pages are mapped with MAP_FIXED.
// Owns: the memfd.  Thread-safety: as driver.h; one mutex guards the run table.
//
// The only file that names mmap or memfd. A reservation is read-only private memory that nothing
// backs: reading it gives the zero page, writing it faults, and it costs nothing. Every page sits
// at file offset index * page_bytes, so pages with neighbouring indices merge into one kernel
// mapping (VMA); the number of those is limited per process (vm.max_map_count) and past the limit
// even malloc fails, so this driver keeps its own count and refuses early.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <new>
#include <string>

#include "dlpack.h"
#include "driver.h"
#include "error.h"

#ifndef MADV_POPULATE_READ  // Linux 5.14; older C libraries lack the name
#define MADV_POPULATE_READ 22
#endif

namespace vmalloc {
namespace {

constexpr std::size_t kDefaultMaxMapCount = 65530;

DriverError last_error(const char* call, const std::string& detail = "") {
  const int code = errno;
#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 32)
  const char* symbol = strerrorname_np(code);
#else
  const char* symbol = std::strerror(code);
#endif
  return DriverError(call, code, symbol != nullptr ? symbol : "?", detail);
}

bool is_out_of_memory(int code) { return code == ENOMEM || code == ENOSPC || code == EAGAIN; }

std::size_t read_max_map_count() {
  std::ifstream file("/proc/sys/vm/max_map_count");
  std::size_t count = 0;
  return file >> count ? count : kDefaultMaxMapCount;
}

std::size_t count_process_mappings() {
  std::ifstream file("/proc/self/maps");
  std::size_t count = 0;
  for (std::string line; std::getline(file, line);) ++count;
  return count;
}

/// Kernel mappings we may make: 80% of what the process has left, so that malloc never starves.
std::size_t mapping_budget() {
  const std::size_t limit = read_max_map_count() * 8 / 10;
  const std::size_t used = count_process_mappings();
  return limit > used ? limit - used : 0;
}

/// What all host drivers of the process have taken of the kernel's limit.
class MappingBudget {
 public:
  static MappingBudget& instance() {
    static MappingBudget* budget = new MappingBudget;  // never destroyed: drivers may outlive exit
    return *budget;
  }

  /// Measure anew what the rest of the process leaves, while no driver has anything.
  void measure() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (used_ == 0) limit_ = mapping_budget();
  }
  void update(std::size_t before, std::size_t after) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ += after - before;  // unsigned: a decrease wraps twice and comes out right
  }
  [[nodiscard]] bool has_left(std::size_t count) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return used_ + count <= limit_;
  }

 private:
  mutable std::mutex mutex_;
  std::size_t used_ = 0;
  std::size_t limit_ = 0;
};

/// Address ranges that the kernel holds as one mapping each.
class RunTable {
 public:
  void insert(Address address, std::size_t bytes, std::uint64_t offset, Access access) {
    auto next = runs_.lower_bound(address);
    if (next != runs_.begin()) {
      auto previous = std::prev(next);
      if (previous->second.access == access &&
          previous->first + previous->second.bytes == address &&
          previous->second.offset + previous->second.bytes == offset) {
        address = previous->first;
        offset = previous->second.offset;
        bytes += previous->second.bytes;
        runs_.erase(previous);
      }
    }
    if (next != runs_.end() && next->second.access == access && address + bytes == next->first &&
        offset + bytes == next->second.offset) {
      bytes += next->second.bytes;
      runs_.erase(next);
    }
    runs_[address] = Run{bytes, offset, access};
  }

  void erase(Address address, std::size_t bytes) {
    const Address end = address + bytes;
    auto run = runs_.upper_bound(address);
    if (run != runs_.begin()) --run;
    while (run != runs_.end() && run->first < end) {
      const Address run_begin = run->first;
      const Address run_end = run_begin + run->second.bytes;
      const auto [bytes_before, offset, access] = run->second;
      static_cast<void>(bytes_before);
      if (run_end <= address) {
        ++run;
        continue;
      }
      run = runs_.erase(run);
      if (run_begin < address) runs_[run_begin] = Run{address - run_begin, offset, access};
      if (run_end > end) runs_[end] = Run{run_end - end, offset + (end - run_begin), access};
    }
  }

  void protect(Address address, std::size_t bytes, Access access) {
    const Address end = address + bytes;
    auto run = runs_.upper_bound(address);
    if (run != runs_.begin()) --run;
    std::map<Address, Run> changed;
    for (; run != runs_.end() && run->first < end; ++run) {
      const Address begin = std::max(run->first, address);
      const Address run_end = std::min(run->first + run->second.bytes, end);
      if (begin >= run_end) continue;
      changed[begin] = Run{run_end - begin, run->second.offset + (begin - run->first), access};
    }
    erase(address, bytes);
    for (const auto& [begin, piece] : changed) insert(begin, piece.bytes, piece.offset, access);
  }

  [[nodiscard]] std::size_t size() const { return runs_.size(); }

 private:
  struct Run {
    std::size_t bytes;
    std::uint64_t offset;
    Access access;
  };
  std::map<Address, Run> runs_;
};

class HostDriver final : public Driver {
 public:
  explicit HostDriver(std::size_t page_bytes)
      : granularity_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))), page_bytes_(page_bytes) {
    check_page_bytes("host", page_bytes, granularity_);
    MappingBudget::instance().measure();
    fd_ = memfd_create("vmalloc", MFD_CLOEXEC);
    if (fd_ < 0) throw last_error("memfd_create");
  }

  ~HostDriver() override {
    note_mappings(0);
    close(fd_);
  }

  const char* name() const override { return "host"; }
  std::size_t granularity() const override { return granularity_; }
  std::size_t page_bytes() const override { return page_bytes_; }
  TensorDevice tensor_device() const override { return {dlpack::kDeviceCpu, 0}; }

  // The CPU runs no kernels of its own accord: all is in order, and done when a call returns.
  bool is_async() const override { return false; }
  bool can_protect() const override { return true; }
  std::uint64_t num_enqueued() const override { return 0; }
  void attach_thread() override {}
  void use_stream(Stream) override {}
  void wait_enqueued() override {}
  std::optional<Fence> try_record_fence() override { return 0; }
  bool fence_passed(Fence) override { return true; }

  std::optional<Address> try_reserve(std::size_t bytes) override {
    // mmap aligns to the system page only, so take one page more and cut both ends.
    const std::size_t padded = bytes + page_bytes_;
    if (padded < bytes) return std::nullopt;
    void* raw = mmap(nullptr, padded, PROT_READ, kReservationFlags, -1, 0);
    if (raw == MAP_FAILED) {
      if (is_out_of_memory(errno)) return std::nullopt;
      throw last_error("mmap", "reserving " + std::to_string(bytes) + " bytes");
    }
    const Address begin = reinterpret_cast<Address>(raw);
    const Address address = (begin + page_bytes_ - 1) / page_bytes_ * page_bytes_;
    if (address > begin) munmap(raw, address - begin);
    const Address end = begin + padded;
    if (end > address + bytes) munmap(to_pointer(address + bytes), end - address - bytes);
    madvise(to_pointer(address), bytes, MADV_DONTFORK);
    const std::lock_guard<std::mutex> lock(mutex_);
    ++num_reservations_;
    note_mappings(most_mappings());
    return address;
  }

  void release(Address address, std::size_t bytes) override {
    if (munmap(to_pointer(address), bytes) != 0) throw last_error("munmap");
    const std::lock_guard<std::mutex> lock(mutex_);
    --num_reservations_;
    note_mappings(most_mappings());
  }

  std::optional<PageHandle> try_create_page(std::uint32_t index) override {
    const auto offset = static_cast<off_t>(index) * static_cast<off_t>(page_bytes_);
    // fallocate takes the memory here and zeroed, so that lack of it is an answer, not a SIGBUS.
    int status = 0;
    do {
      status = fallocate(fd_, 0, offset, static_cast<off_t>(page_bytes_));
    } while (status != 0 && errno == EINTR);
    if (status != 0) {
      if (is_out_of_memory(errno) || errno == EFBIG) return std::nullopt;
      throw last_error("fallocate");
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    ++counters_.create_calls;
    return index;
  }

  void destroy_page(PageHandle page) override {
    const auto offset = static_cast<off_t>(page) * static_cast<off_t>(page_bytes_);
    if (fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset,
                  static_cast<off_t>(page_bytes_)) != 0) {
      throw last_error("fallocate(PUNCH_HOLE)");
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    ++counters_.destroy_calls;
  }

  bool try_map(Address address, const PageHandle* pages, std::size_t num_pages,
               Access access) override {
    std::size_t num_mapped = 0;
    while (num_mapped < num_pages) {
      const std::size_t run = contiguous_pages(pages + num_mapped, num_pages - num_mapped);
      if (!try_map_run(address + num_mapped * page_bytes_, pages[num_mapped], run, access)) {
        const int code = errno;
        if (num_mapped > 0) unmap(address, num_mapped);
        errno = code;
        if (is_out_of_memory(code)) return false;
        throw last_error("mmap", "mapping " + std::to_string(run) + " pages");
      }
      num_mapped += run;
    }
    return true;
  }

  void unmap(Address address, std::size_t num_pages) override {
    const std::size_t bytes = num_pages * page_bytes_;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (mmap(to_pointer(address), bytes, PROT_READ, kReservationFlags | MAP_FIXED, -1, 0) ==
        MAP_FAILED) {
      throw last_error("mmap", "unmapping " + std::to_string(num_pages) + " pages");
    }
    madvise(to_pointer(address), bytes, MADV_DONTFORK);
    runs_.erase(address, bytes);
    note_mappings(most_mappings());
    ++counters_.unmap_calls;
  }

  void protect(Address address, std::size_t num_pages, Access access) override {
    const std::size_t bytes = num_pages * page_bytes_;
    const int protection = access == Access::kReadWrite ? PROT_READ | PROT_WRITE : PROT_READ;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (mprotect(to_pointer(address), bytes, protection) != 0) throw last_error("mprotect");
    runs_.protect(address, bytes, access);
    note_mappings(most_mappings());
  }

  bool try_zero(Address address, std::size_t bytes) override {
    std::memset(to_pointer(address), 0, bytes);
    return true;
  }

  // Through the file, because a page need not be mapped anywhere.
  bool try_copy_page(Address to, PageHandle from, std::size_t bytes) override {
    read_bytes(from, static_cast<char*>(to_pointer(to)), bytes);
    return true;
  }

  std::shared_ptr<char[]> try_allocate_host(std::size_t bytes) override {
    return std::shared_ptr<char[]>(new (std::nothrow) char[bytes]);
  }

  bool try_read_pages(const PageHandle* from, char* const* to, std::size_t num_pages) override {
    for (std::size_t i = 0; i < num_pages; ++i) read_bytes(from[i], to[i], page_bytes_);
    return true;
  }

  bool try_write_pages(const PageHandle* to, const char* const* from,
                       std::size_t num_pages) override {
    for (std::size_t i = 0; i < num_pages; ++i) write_bytes(to[i], from[i]);
    return true;
  }

  MemoryInfo memory_info() const override {
    struct sysinfo info{};
    if (sysinfo(&info) != 0) throw last_error("sysinfo");
    return {static_cast<std::size_t>(info.freeram + info.bufferram) * info.mem_unit,
            static_cast<std::size_t>(info.totalram) * info.mem_unit};
  }

  DriverCounters counters() const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return counters_;
  }

 private:
  static constexpr int kReservationFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

  /// A run costs at most two kernel mappings: itself, and the gap after it.
  [[nodiscard]] std::size_t most_mappings() const { return 2 * runs_.size() + num_reservations_; }

  void note_mappings(std::size_t count) {
    MappingBudget::instance().update(noted_mappings_, count);
    noted_mappings_ = count;
  }

  void read_bytes(PageHandle from, char* to, std::size_t bytes) const {
    for (std::size_t done = 0; done < bytes;) {
      const ssize_t count =
          pread(fd_, to + done, bytes - done, static_cast<off_t>(from * page_bytes_ + done));
      if (count <= 0 && errno != EINTR) throw last_error("pread");
      if (count > 0) done += static_cast<std::size_t>(count);
    }
  }

  void write_bytes(PageHandle to, const char* from) const {
    for (std::size_t done = 0; done < page_bytes_;) {
      const ssize_t count =
          pwrite(fd_, from + done, page_bytes_ - done, static_cast<off_t>(to * page_bytes_ + done));
      if (count <= 0 && errno != EINTR) throw last_error("pwrite");
      if (count > 0) done += static_cast<std::size_t>(count);
    }
  }

  static void* to_pointer(Address address) { return reinterpret_cast<void*>(address); }

  static std::size_t contiguous_pages(const PageHandle* pages, std::size_t num_pages) {
    std::size_t run = 1;
    while (run < num_pages && pages[run] == pages[0] + run) ++run;
    return run;
  }

  /// False with errno set.
  bool try_map_run(Address address, PageHandle first, std::size_t num_pages, Access access) {
    const std::size_t bytes = num_pages * page_bytes_;
    const std::uint64_t offset = first * page_bytes_;
    const int protection = access == Access::kReadWrite ? PROT_READ | PROT_WRITE : PROT_READ;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!MappingBudget::instance().has_left(2)) {
        errno = ENOMEM;
        return false;
      }
      if (mmap(to_pointer(address), bytes, protection, MAP_SHARED | MAP_FIXED, fd_,
               static_cast<off_t>(offset)) == MAP_FAILED) {
        // Old kernels unmap first and then fail: close the hole, or somebody else's memory may
        // come to lie in it.
        const int code = errno;
        mmap(to_pointer(address), bytes, PROT_READ, kReservationFlags | MAP_FIXED, -1, 0);
        errno = code;
        return false;
      }
      // A forked child must not write into our pages.
      madvise(to_pointer(address), bytes, MADV_DONTFORK);
      runs_.insert(address, bytes, offset, access);
      note_mappings(most_mappings());
      ++counters_.map_calls;
    }
    // The page exists already, so this only fills page tables; where the kernel is too old for it
    // the first touch does the same.
    madvise(to_pointer(address), bytes, MADV_POPULATE_READ);
    return true;
  }

  std::size_t granularity_;
  std::size_t page_bytes_;
  std::size_t noted_mappings_ = 0;
  int fd_ = -1;
  mutable std::mutex mutex_;
  RunTable runs_;
  std::size_t num_reservations_ = 0;
  DriverCounters counters_;
};

}  // namespace

std::shared_ptr<Driver> make_host_driver(std::size_t page_bytes) {
  return std::make_shared<HostDriver>(page_bytes);
}

void check_page_bytes(const char* driver, std::size_t page_bytes, std::size_t granularity) {
  if (page_bytes == 0 || page_bytes % granularity != 0) {
    throw ConfigError("page_bytes is " + std::to_string(page_bytes) +
                      "; it must be a multiple of the " + driver + " driver's granularity, " +
                      std::to_string(granularity));
  }
}

}  // namespace vmalloc
