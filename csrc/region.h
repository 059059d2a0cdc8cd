// region.h: one reserved address range cut into equal slots, and the arithmetic of its rows.
// Owns: the address range.  Thread-safety: immutable once made.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <utility>

#include "driver.h"
#include "error.h"
#include "fork_guard.h"

namespace vmalloc {

/// Tensors made over a region share it, so the addresses outlive the arena; its pages do not.
class Region {
 public:
  /// Throws ConfigError if the address space cannot hold `num_slots` slots of `max_rows` rows.
  Region(std::shared_ptr<Driver> driver, std::size_t row_bytes, std::size_t num_slots,
         std::size_t max_rows)
      : driver_(std::move(driver)), row_bytes_(row_bytes), page_bytes_(driver_->page_bytes()) {
    // A slot must start on a page (pages are not shared between slots by accident) and on a row
    // (or one strided tensor could not span all slots): its stride is a multiple of both.
    const std::size_t rows_per_unit = page_bytes_ / std::gcd(row_bytes, page_bytes_);
    const std::size_t units = (max_rows + rows_per_unit - 1) / rows_per_unit;
    const std::size_t limit = std::numeric_limits<std::size_t>::max() / 2;
    const std::size_t unit_bytes = rows_per_unit * row_bytes;
    if (units > limit / unit_bytes || num_slots > limit / (units * unit_bytes)) {
      throw_too_large(num_slots, max_rows);
    }
    slot_bytes_ = units * unit_bytes;
    bytes_ = slot_bytes_ * num_slots;
    const std::optional<Address> address = driver_->try_reserve(bytes_);
    if (!address) throw_too_large(num_slots, max_rows);
    address_ = *address;
  }

  ~Region() {
    if (guard_.is_forked_child()) return;
    give_back_quietly([this] { driver_->release(address_, bytes_); });
  }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  [[nodiscard]] std::size_t bytes() const { return bytes_; }
  [[nodiscard]] std::size_t row_bytes() const { return row_bytes_; }
  [[nodiscard]] std::size_t slot_bytes() const { return slot_bytes_; }
  [[nodiscard]] Address address() const { return address_; }
  [[nodiscard]] TensorDevice tensor_device() const { return driver_->tensor_device(); }

  [[nodiscard]] Address page_address(std::size_t slot, std::size_t page_idx) const {
    return address_ + slot * slot_bytes_ + page_idx * page_bytes_;
  }
  /// Pages that rows [0, num_rows) touch.
  [[nodiscard]] std::size_t pages_for(std::size_t num_rows) const {
    return (num_rows * row_bytes_ + page_bytes_ - 1) / page_bytes_;
  }
  /// Whole rows that the first `num_pages` pages hold.
  [[nodiscard]] std::size_t rows_in(std::size_t num_pages) const {
    return num_pages * page_bytes_ / row_bytes_;
  }

 private:
  [[noreturn]] void throw_too_large(std::size_t num_slots, std::size_t max_rows) const {
    throw ConfigError("address space cannot hold " + std::to_string(num_slots) + " slots of " +
                      std::to_string(max_rows) + " rows of " + std::to_string(row_bytes_) +
                      " bytes; lower the number of slots or the sequence length");
  }

  std::shared_ptr<Driver> driver_;
  std::size_t row_bytes_;
  std::size_t page_bytes_;
  std::size_t slot_bytes_ = 0;
  std::size_t bytes_ = 0;
  Address address_ = 0;
  ForkGuard guard_;
};

}  // namespace vmalloc
