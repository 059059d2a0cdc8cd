// address_space.h: reservations of virtual addresses and the mappings inside them.
// Owns: the reserved ranges (mmap).  Thread-safety: none; State's mutex guards it.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "abi.h"
#include "allocations.h"

namespace fakecuda {

struct Reservation {
  std::size_t bytes = 0;
  bool is_plain = false;  // made by cuMemAlloc: only cuMemFree may take it apart
};

struct Mapping {
  std::size_t bytes = 0;
  Handle handle = 0;
  int access = kAccessNone;
};

class AddressSpace {
 public:
  explicit AddressSpace(std::size_t granule_bytes) : granule_bytes_(granule_bytes) {}
  ~AddressSpace();
  AddressSpace(const AddressSpace&) = delete;
  AddressSpace& operator=(const AddressSpace&) = delete;

  CUresult reserve(std::size_t bytes, std::size_t alignment, CUdeviceptr hint, bool is_plain,
                   CUdeviceptr* address);
  CUresult free(CUdeviceptr address, std::size_t bytes);
  CUresult map(CUdeviceptr address, std::size_t bytes, Handle handle,
               const std::vector<Extent>& extents, int fd);
  /// `handles` gets the handle of each mapping that went.
  CUresult unmap(CUdeviceptr address, std::size_t bytes, bool may_span,
                 std::vector<Handle>* handles);
  CUresult set_access(CUdeviceptr address, std::size_t bytes, int access, bool may_span);

  /// Is every byte mapped, in one reservation, with at least this access (kAccessNone: any)?
  bool is_accessible(CUdeviceptr address, std::size_t bytes, int access) const;
  /// The mapping or reservation an address lies in; end() / null if there is none.
  const Mapping* find_mapping(CUdeviceptr address, CUdeviceptr* base) const;
  const Reservation* find_reservation(CUdeviceptr address, CUdeviceptr* base) const;

  std::size_t num_mappings() const { return mappings_.size(); }
  std::size_t num_reservations() const { return reservations_.size(); }
  std::size_t num_plain() const;

 private:
  using Mappings = std::map<CUdeviceptr, Mapping>;

  CUresult check_multiple(const char* what, CUdeviceptr address, std::size_t bytes) const;
  /// The mappings that make up exactly [address, address + bytes).
  CUresult find_run(const char* what, CUdeviceptr address, std::size_t bytes, bool may_span,
                    Mappings::iterator* first, Mappings::iterator* last);
  bool is_in_one_reservation(CUdeviceptr address, std::size_t bytes) const;

  std::size_t granule_bytes_;
  std::map<CUdeviceptr, Reservation> reservations_;
  Mappings mappings_;
};

}  // namespace fakecuda
