// allocations.h: handles of physical memory, with their references and mappings.
// Owns: the allocations.  Thread-safety: none; State's mutex guards it.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "abi.h"
#include "physical_memory.h"

namespace fakecuda {

using Handle = CUmemGenericAllocationHandle;

struct Allocation {
  std::size_t bytes = 0;
  CUmemAllocationProp properties{};
  std::vector<Extent> extents;
  std::size_t num_references = 1;
  std::size_t num_mappings = 0;
};

class AllocationTable {
 public:
  explicit AllocationTable(PhysicalMemory* memory) : memory_(memory) {}

  /// OUT_OF_MEMORY if the device has not that much left.
  CUresult create(std::size_t bytes, const CUmemAllocationProp& properties, Handle* handle);
  CUresult release(Handle handle);
  /// The allocation behind a handle that still has references; null otherwise.
  const Allocation* find(Handle handle) const;

  void add_reference(Handle handle) { ++allocations_.at(handle).num_references; }
  void add_mapping(Handle handle) { ++allocations_.at(handle).num_mappings; }
  void drop_mapping(Handle handle);

  /// Handles that still have references.
  std::size_t num_live() const;

 private:
  void free_if_unused(Handle handle);

  PhysicalMemory* memory_;
  std::map<Handle, Allocation> allocations_;
  Handle next_handle_ = 0x7000'0001;  // never used twice, so a dead handle is always known
};

}  // namespace fakecuda
