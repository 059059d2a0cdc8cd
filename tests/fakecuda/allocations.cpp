#include "allocations.h"

#include "reason.h"

namespace fakecuda {

CUresult AllocationTable::create(std::size_t bytes, const CUmemAllocationProp& properties,
                                 Handle* handle) {
  Allocation allocation;
  allocation.bytes = bytes;
  allocation.properties = properties;
  allocation.extents = memory_->take(bytes);
  if (allocation.extents.empty()) {
    return refuse(CUDA_ERROR_OUT_OF_MEMORY, "%zu bytes asked for, %zu of %zu in use", bytes,
                  memory_->used_bytes(), memory_->capacity_bytes());
  }
  *handle = next_handle_++;
  allocations_.emplace(*handle, std::move(allocation));
  return CUDA_SUCCESS;
}

CUresult AllocationTable::release(Handle handle) {
  if (find(handle) == nullptr) {
    return refuse(CUDA_ERROR_INVALID_VALUE, "release of dead handle 0x%llx",
                  static_cast<unsigned long long>(handle));
  }
  --allocations_.at(handle).num_references;
  free_if_unused(handle);
  return CUDA_SUCCESS;
}

const Allocation* AllocationTable::find(Handle handle) const {
  const auto found = allocations_.find(handle);
  if (found == allocations_.end() || found->second.num_references == 0) return nullptr;
  return &found->second;
}

void AllocationTable::drop_mapping(Handle handle) {
  --allocations_.at(handle).num_mappings;
  free_if_unused(handle);
}

std::size_t AllocationTable::num_live() const {
  std::size_t count = 0;
  for (const auto& [handle, allocation] : allocations_) count += allocation.num_references > 0;
  return count;
}

void AllocationTable::free_if_unused(Handle handle) {
  const Allocation& allocation = allocations_.at(handle);
  if (allocation.num_references > 0 || allocation.num_mappings > 0) return;
  memory_->give_back(allocation.extents);
  allocations_.erase(handle);
}

}  // namespace fakecuda
