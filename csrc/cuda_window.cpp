#include "cuda_window.h"

namespace vmalloc::cuda {

std::optional<Address> PageWindow::try_map(std::uint32_t page_idx, Handle handle) {
  const auto [range, is_new] = ranges_.try_emplace(page_idx / kPagesPerRange, 0);
  if (is_new) {
    DevicePointer begin = 0;
    const Result result =
        library_.cuMemAddressReserve(&begin, kPagesPerRange * page_bytes_, 0, 0, 0);
    if (result != kSuccess) ranges_.erase(range);
    if (!library_.try_check("cuMemAddressReserve", result)) return std::nullopt;
    range->second = begin;
  }
  const Address address = range->second + page_idx % kPagesPerRange * page_bytes_;
  if (!library_.try_check("cuMemMap", library_.cuMemMap(address, page_bytes_, 0, handle, 0))) {
    return std::nullopt;
  }
  const Result result = library_.cuMemSetAccess(address, page_bytes_, &access_, 1);
  if (result == kSuccess) return address;
  unmap(address);
  library_.check("cuMemSetAccess", result == kOutOfMemory ? kSuccess : result);
  return std::nullopt;
}

void PageWindow::unmap(Address address) {
  library_.check("cuMemUnmap", library_.cuMemUnmap(address, page_bytes_));
}

void PageWindow::close() noexcept {
  for (const auto& [number, address] : ranges_) {
    const DevicePointer range = address;
    Library::give_back(
        [&] { return library_.cuMemAddressFree(range, kPagesPerRange * page_bytes_); });
  }
  ranges_.clear();
}

}  // namespace vmalloc::cuda
