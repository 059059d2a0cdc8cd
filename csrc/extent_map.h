// extent_map.h: a set of page numbers that finds members, and whole runs of eight, quickly.
// Owns: one bit a number.  Thread-safety: none; the owner locks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace vmalloc {

class ExtentMap {
 public:
  static constexpr std::size_t kExtent = 8;  ///< numbers in one extent: the bits of one byte
  static constexpr std::size_t kNone = SIZE_MAX;

  void insert(std::size_t number) {
    if (number / kExtent >= bits_.size()) bits_.resize(number / kExtent + 1, 0);
    std::uint8_t& extent = bits_[number / kExtent];
    extent = static_cast<std::uint8_t>(extent | mask(number));
    ++num_members_;
    if (extent == kWhole) ++num_whole_;
  }

  void erase(std::size_t number) {
    std::uint8_t& extent = bits_[number / kExtent];
    if (extent == kWhole) --num_whole_;
    extent = static_cast<std::uint8_t>(extent & ~mask(number));
    --num_members_;
  }

  [[nodiscard]] bool contains(std::size_t number) const {
    return number / kExtent < bits_.size() && (bits_[number / kExtent] & mask(number)) != 0;
  }

  [[nodiscard]] std::size_t size() const { return num_members_; }

  /// First number of an extent that is here as a whole, or kNone.
  [[nodiscard]] std::size_t find_whole_extent() { return num_whole_ > 0 ? find(kWhole) : kNone; }

  /// Some member, or kNone.
  [[nodiscard]] std::size_t find_any() { return num_members_ > 0 ? find(0) : kNone; }

 private:
  static constexpr std::uint8_t kWhole = 0xFF;

  static std::uint8_t mask(std::size_t number) {
    return static_cast<std::uint8_t>(1U << (number % kExtent));
  }

  /// First member of the next extent, from the cursor on, that has members and all of `wanted`.
  /// The cursor stays there, so a run of searches reads the bytes once. Requires: there is one.
  std::size_t find(std::uint8_t wanted) {
    for (std::size_t step = 0; step <= bits_.size(); ++step, ++cursor_) {
      if (cursor_ >= bits_.size()) cursor_ = 0;
      const std::uint8_t extent = bits_[cursor_];
      if (extent != 0 && (extent & wanted) == wanted) {
        std::size_t bit = 0;
        while ((extent >> bit & 1U) == 0) ++bit;
        return cursor_ * kExtent + bit;
      }
    }
    return kNone;
  }

  std::vector<std::uint8_t> bits_;
  std::size_t cursor_ = 0;
  std::size_t num_members_ = 0;
  std::size_t num_whole_ = 0;
};

}  // namespace vmalloc
