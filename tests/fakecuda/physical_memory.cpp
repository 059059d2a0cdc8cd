#include "physical_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

namespace fakecuda {

PhysicalMemory::PhysicalMemory(std::size_t capacity_bytes, std::size_t granule_bytes, int poison)
    : granule_bytes_(granule_bytes),
      poison_(poison),
      fd_(memfd_create("fakecuda", MFD_CLOEXEC)),
      is_used_(capacity_bytes / granule_bytes) {
  if (fd_ >= 0 && ftruncate(fd_, static_cast<off_t>(this->capacity_bytes())) != 0) {
    close(fd_);
    fd_ = -1;
  }
  if (fd_ < 0) is_used_.clear();  // no memory at all: every create says so
}

PhysicalMemory::~PhysicalMemory() {
  if (fd_ >= 0) close(fd_);
}

std::vector<Extent> PhysicalMemory::take(std::size_t bytes) {
  std::size_t missing = bytes / granule_bytes_;
  std::vector<Extent> extents;
  if (missing > is_used_.size() - num_used_) return extents;
  for (std::size_t index = lowest_free_; missing > 0; ++index) {
    if (is_used_[index]) continue;
    is_used_[index] = true;
    ++num_used_;
    --missing;
    lowest_free_ = index + 1;
    const std::size_t offset = index * granule_bytes_;
    if (!extents.empty() && extents.back().offset + extents.back().bytes == offset) {
      extents.back().bytes += granule_bytes_;
    } else {
      extents.push_back({offset, granule_bytes_});
    }
  }
  for (const Extent& extent : extents) {
    if (try_fill(extent)) continue;
    give_back(extents);
    return {};
  }
  return extents;
}

void PhysicalMemory::give_back(const std::vector<Extent>& extents) {
  for (const Extent& extent : extents) {
    fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(extent.offset),
              static_cast<off_t>(extent.bytes));
    const std::size_t first = extent.offset / granule_bytes_;
    const std::size_t last = first + extent.bytes / granule_bytes_;
    for (std::size_t index = first; index < last; ++index) is_used_[index] = false;
    num_used_ -= last - first;
    lowest_free_ = std::min(lowest_free_, first);
  }
}

/// False if the machine has no memory left. A punched hole reads as zeros, so 0 needs no writing.
bool PhysicalMemory::try_fill(const Extent& extent) const {
  if (poison_ == 0) return true;
  const std::vector<unsigned char> pattern(granule_bytes_, static_cast<unsigned char>(poison_));
  for (std::size_t done = 0; done < extent.bytes;) {
    const std::size_t chunk = std::min(granule_bytes_, extent.bytes - done);
    const ssize_t written =
        pwrite(fd_, pattern.data(), chunk, static_cast<off_t>(extent.offset + done));
    if (written <= 0) return false;
    done += static_cast<std::size_t>(written);
  }
  return true;
}

}  // namespace fakecuda
