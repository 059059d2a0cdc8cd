// error.h: the exceptions the core throws; running out of memory is a value, never one of these.
// Owns: nothing.  Thread-safety: immutable values.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

namespace vmalloc {

/// A setting or argument that can never work; the text names the value and the limit.
class ConfigError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A driver call failed for a reason other than memory.
class DriverError : public std::runtime_error {
 public:
  DriverError(std::string call, long code, std::string name, std::string detail = "");

  std::string call;
  long code;
  std::string name;
  std::string detail;
};

/// Give something back where nobody could be told of an error: twice at most. At exit the driver
/// may be gone, and everything with it.
template <typename Call>
void give_back_quietly(Call call) {
  for (int i = 0; i < 2; ++i) {
    try {
      call();
      return;
    } catch (const DriverError&) {
    }
  }
}

/// The books do not balance: a bug in this library.
class InvariantError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

/// Used after close, or in a forked child.
class ClosedError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// "`name` is `value`; it must be `rule`", the form of every ConfigError.
inline std::string with_limit(const char* name, std::size_t value, const std::string& rule) {
  return std::string(name) + " is " + std::to_string(value) + "; it must be " + rule;
}

/// Throw InvariantError with `text` unless `holds`.
inline void check_invariant(bool holds, const char* text) {
  if (!holds) throw InvariantError(text);
}

}  // namespace vmalloc
