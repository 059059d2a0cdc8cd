// faults.h: counts driver calls by name and makes chosen ones fail or take time.
// Owns: counters and fault rules.  Thread-safety: all methods; one mutex, not held while sleeping.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "abi.h"

namespace fakecuda {

struct Fault {
  std::uint64_t calls_before = 0;  // calls that still pass before the first one fails
  std::uint64_t count = 0;         // calls that fail then
  int error = CUDA_ERROR_OUT_OF_MEMORY;
  std::uint64_t latency_ns = 0;
};

/// What one control text asks for; parsed in full before any of it is applied.
struct Control {
  bool clears_faults = false;
  std::vector<std::pair<std::string, Fault>> faults;
  std::vector<std::pair<std::string, int>> modes;

  /// False if the text is not understood.
  static bool try_parse(const std::string& text, Control* control);
};

class Faults {
 public:
  /// Counts the call, sleeps as told, and returns the error it is to fail with. `is_total`: the
  /// call takes part in the total and in the rule named "*".
  CUresult enter(const char* name, bool is_total);

  void apply(const Control& control);
  void reset();
  std::uint64_t calls(const std::string& name) const;
  std::uint64_t total_calls() const;
  std::string names() const;

 private:
  CUresult take(Fault& fault, std::uint64_t* latency_ns);

  mutable std::mutex mutex_;
  std::map<std::string, std::uint64_t> calls_;
  std::map<std::string, Fault> faults_;
  std::uint64_t total_calls_ = 0;
};

}  // namespace fakecuda
