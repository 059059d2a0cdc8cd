#include "address_space.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>

#include "reason.h"

namespace fakecuda {
namespace {

constexpr int kReserveFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

void* pointer(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

int protection(int access) {
  if (access == kAccessReadWrite) return PROT_READ | PROT_WRITE;
  return access == kAccessRead ? PROT_READ : PROT_NONE;
}

/// Back to a plain reservation: no memory, no access.
bool try_clear(CUdeviceptr address, std::size_t bytes) {
  return mmap(pointer(address), bytes, PROT_NONE, kReserveFlags | MAP_FIXED, -1, 0) != MAP_FAILED;
}

template <typename Map>
auto find_covering(Map& map, CUdeviceptr address) {
  auto found = map.upper_bound(address);
  if (found == map.begin()) return map.end();
  --found;
  return address - found->first < found->second.bytes ? found : map.end();
}

}  // namespace

AddressSpace::~AddressSpace() {
  for (const auto& [address, reservation] : reservations_) {
    munmap(pointer(address), reservation.bytes);
  }
}

CUresult AddressSpace::reserve(std::size_t bytes, std::size_t alignment, CUdeviceptr hint,
                               bool is_plain, CUdeviceptr* address) {
  if (const CUresult code = check_multiple("reserve", hint, bytes)) return code;
  if ((alignment & (alignment - 1)) != 0) {
    return refuse(CUDA_ERROR_INVALID_VALUE, "reserve: alignment %zu is no power of two", alignment);
  }
  alignment = std::max(alignment, granule_bytes_);
  if (bytes > SIZE_MAX / 2 || alignment > SIZE_MAX / 4) {
    return refuse(CUDA_ERROR_OUT_OF_MEMORY, "reserve: %zu bytes are no address range", bytes);
  }
  void* raw = mmap(pointer(hint), bytes + alignment, PROT_NONE, kReserveFlags, -1, 0);
  if (raw == MAP_FAILED) {
    return refuse(CUDA_ERROR_OUT_OF_MEMORY, "reserve: no room for %zu bytes", bytes);
  }
  const auto start = reinterpret_cast<CUdeviceptr>(raw);
  const CUdeviceptr aligned = (start + alignment - 1) / alignment * alignment;
  if (aligned > start) munmap(raw, aligned - start);
  const CUdeviceptr end = start + bytes + alignment;
  if (end > aligned + bytes) munmap(pointer(aligned + bytes), end - aligned - bytes);
  reservations_[aligned] = {bytes, is_plain};
  *address = aligned;
  return CUDA_SUCCESS;
}

CUresult AddressSpace::free(CUdeviceptr address, std::size_t bytes) {
  const auto found = reservations_.find(address);
  if (found == reservations_.end() || found->second.bytes != bytes) {
    return refuse(CUDA_ERROR_INVALID_VALUE, "address free: 0x%llx + %zu is no reservation",
                  static_cast<unsigned long long>(address), bytes);
  }
  const auto mapping = mappings_.lower_bound(address);
  if (mapping != mappings_.end() && mapping->first < address + bytes) {
    return refuse(CUDA_ERROR_INVALID_VALUE, "address free: something is still mapped at 0x%llx",
                  static_cast<unsigned long long>(mapping->first));
  }
  munmap(pointer(address), bytes);
  reservations_.erase(found);
  return CUDA_SUCCESS;
}

CUresult AddressSpace::map(CUdeviceptr address, std::size_t bytes, Handle handle,
                           const std::vector<Extent>& extents, int fd) {
  if (const CUresult code = check_multiple("map", address, bytes)) return code;
  if (!is_in_one_reservation(address, bytes)) {
    return refuse(CUDA_ERROR_INVALID_VALUE, "map: 0x%llx + %zu is not inside one reservation",
                  static_cast<unsigned long long>(address), bytes);
  }
  const auto next = mappings_.lower_bound(address);
  const bool overlaps_next = next != mappings_.end() && next->first < address + bytes;
  if (overlaps_next || find_covering(mappings_, address) != mappings_.end()) {
    return refuse(CUDA_ERROR_INVALID_VALUE, "map: 0x%llx + %zu is mapped already",
                  static_cast<unsigned long long>(address), bytes);
  }
  std::size_t done = 0;
  for (const Extent& extent : extents) {
    const std::size_t part = std::min(extent.bytes, bytes - done);
    if (part == 0) break;
    if (mmap(pointer(address + done), part, PROT_NONE, MAP_SHARED | MAP_FIXED, fd,
             static_cast<off_t>(extent.offset)) == MAP_FAILED) {
      try_clear(address, bytes);
      return refuse(CUDA_ERROR_OUT_OF_MEMORY, "map: the machine has no mappings left");
    }
    done += part;
  }
  mappings_[address] = {bytes, handle, kAccessNone};
  return CUDA_SUCCESS;
}

CUresult AddressSpace::unmap(CUdeviceptr address, std::size_t bytes, bool may_span,
                             std::vector<Handle>* handles) {
  Mappings::iterator first;
  Mappings::iterator last;
  if (const CUresult code = find_run("unmap", address, bytes, may_span, &first, &last)) return code;
  if (!try_clear(address, bytes)) {
    return refuse(CUDA_ERROR_OPERATING_SYSTEM, "unmap: the machine has no mappings left");
  }
  for (auto mapping = first; mapping != last; ++mapping) {
    handles->push_back(mapping->second.handle);
  }
  mappings_.erase(first, last);
  return CUDA_SUCCESS;
}

CUresult AddressSpace::set_access(CUdeviceptr address, std::size_t bytes, int access,
                                  bool may_span) {
  Mappings::iterator first;
  Mappings::iterator last;
  if (const CUresult code = find_run("set access", address, bytes, may_span, &first, &last)) {
    return code;
  }
  if (mprotect(pointer(address), bytes, protection(access)) != 0) {
    return refuse(CUDA_ERROR_OUT_OF_MEMORY, "set access: the machine has no mappings left");
  }
  for (auto mapping = first; mapping != last; ++mapping) mapping->second.access = access;
  return CUDA_SUCCESS;
}

bool AddressSpace::is_accessible(CUdeviceptr address, std::size_t bytes, int access) const {
  if (!is_in_one_reservation(address, bytes)) return false;
  const CUdeviceptr end = address + bytes;
  while (address < end) {
    const auto mapping = find_covering(mappings_, address);
    if (mapping == mappings_.end() || (mapping->second.access & access) != access) return false;
    address = mapping->first + mapping->second.bytes;
  }
  return true;
}

const Mapping* AddressSpace::find_mapping(CUdeviceptr address, CUdeviceptr* base) const {
  const auto found = find_covering(mappings_, address);
  if (found == mappings_.end()) return nullptr;
  *base = found->first;
  return &found->second;
}

const Reservation* AddressSpace::find_reservation(CUdeviceptr address, CUdeviceptr* base) const {
  const auto found = find_covering(reservations_, address);
  if (found == reservations_.end()) return nullptr;
  *base = found->first;
  return &found->second;
}

std::size_t AddressSpace::num_plain() const {
  std::size_t count = 0;
  for (const auto& [address, reservation] : reservations_) count += reservation.is_plain;
  return count;
}

CUresult AddressSpace::check_multiple(const char* what, CUdeviceptr address,
                                      std::size_t bytes) const {
  if (bytes > 0 && bytes % granule_bytes_ == 0 && address % granule_bytes_ == 0) {
    return CUDA_SUCCESS;
  }
  return refuse(CUDA_ERROR_INVALID_VALUE, "%s: 0x%llx + %zu is no multiple of %zu", what,
                static_cast<unsigned long long>(address), bytes, granule_bytes_);
}

CUresult AddressSpace::find_run(const char* what, CUdeviceptr address, std::size_t bytes,
                                bool may_span, Mappings::iterator* first,
                                Mappings::iterator* last) {
  if (const CUresult code = check_multiple(what, address, bytes)) return code;
  const auto refuse_run = [&](const char* why) {
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: 0x%llx + %zu %s", what,
                  static_cast<unsigned long long>(address), bytes, why);
  };
  if (!is_in_one_reservation(address, bytes)) return refuse_run("is not inside one reservation");
  const CUdeviceptr end = address + bytes;
  *first = mappings_.find(address);
  CUdeviceptr covered = address;
  for (*last = *first; covered < end; ++*last) {
    if (*last == mappings_.end() || (*last)->first != covered) {
      return refuse_run("is no gap-free run of mappings");
    }
    covered += (*last)->second.bytes;
    if (covered < end && !may_span) return refuse_run("spans several mappings, mode says no");
  }
  return covered == end ? CUDA_SUCCESS : refuse_run("ends inside a mapping");
}

bool AddressSpace::is_in_one_reservation(CUdeviceptr address, std::size_t bytes) const {
  const auto found = find_covering(reservations_, address);
  if (found == reservations_.end()) return false;
  return bytes <= found->second.bytes - (address - found->first);
}

}  // namespace fakecuda
