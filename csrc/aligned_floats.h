// aligned_floats.h: float scratch memory that starts at a cache line and only grows.
// Owns: its memory.  Thread-safety: none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace vmalloc {

class AlignedFloats {
 public:
  /// At least `count` floats; the contents are lost when it grows.
  float* reserve(std::int64_t count) {
    if (count > capacity_) {
      memory_.reset();
      capacity_ = 0;
      const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(float) + 63) / 64 * 64;
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
      if (memory_ == nullptr) throw std::bad_alloc();
      capacity_ = count;
    }
    return memory_.get();
  }

  [[nodiscard]] float* data() const { return memory_.get(); }
  [[nodiscard]] std::size_t bytes() const {
    return static_cast<std::size_t>(capacity_) * sizeof(float);
  }

 private:
  struct FreeDeleter {
    void operator()(float* memory) const { std::free(memory); }
  };

  std::unique_ptr<float, FreeDeleter> memory_;
  std::int64_t capacity_ = 0;
};

}  // namespace vmalloc
