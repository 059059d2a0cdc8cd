// physical_memory.h: the device's memory: one sparse memfd and a bitmap of its granules.
// Owns: the memfd.  Thread-safety: none; State's mutex guards it.
#pragma once

#include <cstddef>
#include <vector>

namespace fakecuda {

/// A run of neighbouring granules of the memfd.
struct Extent {
  std::size_t offset = 0;
  std::size_t bytes = 0;
};

class PhysicalMemory {
 public:
  PhysicalMemory(std::size_t capacity_bytes, std::size_t granule_bytes, int poison);
  ~PhysicalMemory();
  PhysicalMemory(const PhysicalMemory&) = delete;
  PhysicalMemory& operator=(const PhysicalMemory&) = delete;

  /// Takes `bytes` (a multiple of the granule), poisoned; empty if that much is not free.
  std::vector<Extent> take(std::size_t bytes);
  void give_back(const std::vector<Extent>& extents);

  int fd() const { return fd_; }
  std::size_t granule_bytes() const { return granule_bytes_; }
  std::size_t capacity_bytes() const { return is_used_.size() * granule_bytes_; }
  std::size_t used_bytes() const { return num_used_ * granule_bytes_; }

 private:
  bool try_fill(const Extent& extent) const;

  std::size_t granule_bytes_;
  int poison_;
  int fd_;
  std::vector<bool> is_used_;
  std::size_t num_used_ = 0;
  std::size_t lowest_free_ = 0;  // no granule below it is free
};

}  // namespace fakecuda
