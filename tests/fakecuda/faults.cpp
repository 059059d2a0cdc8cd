#include "faults.h"

#include <chrono>
#include <cstdlib>
#include <sstream>
#include <thread>

#include "reason.h"

namespace fakecuda {
namespace {

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) {
    const auto first = part.find_first_not_of(" \t\n");
    if (first == std::string::npos) continue;
    parts.push_back(part.substr(first, part.find_last_not_of(" \t\n") - first + 1));
  }
  return parts;
}

bool try_parse_pair(const std::string& text, std::string* key, std::uint64_t* value) {
  const auto equals = text.find('=');
  if (equals == std::string::npos || equals == 0 || equals + 1 == text.size()) return false;
  char* end = nullptr;
  *value = std::strtoull(text.c_str() + equals + 1, &end, 10);
  *key = text.substr(0, equals);
  return *end == '\0';
}

bool try_parse_fault(const std::string& text, Fault* fault) {
  bool has_fail = false;
  fault->count = 1;
  const auto parts = split(text, ',');
  for (const std::string& part : parts) {
    std::string key;
    std::uint64_t value = 0;
    if (!try_parse_pair(part, &key, &value)) return false;
    if (key == "fail" && value > 0) {
      has_fail = true;
      fault->calls_before = value - 1;
    } else if (key == "count") {
      fault->count = value;
    } else if (key == "err") {
      fault->error = static_cast<int>(value);
    } else if (key == "lat") {
      fault->latency_ns = value;
    } else {
      return false;
    }
  }
  if (!has_fail) fault->count = 0;
  return !parts.empty();
}

}  // namespace

bool Control::try_parse(const std::string& text, Control* control) {
  for (const std::string& item : split(text, ';')) {
    const auto colon = item.find(':');
    if (item == "clear") {
      control->clears_faults = true;
    } else if (colon != std::string::npos) {
      Fault fault;
      if (colon == 0 || !try_parse_fault(item.substr(colon + 1), &fault)) return false;
      control->faults.emplace_back(item.substr(0, colon), fault);
    } else {
      std::string key;
      std::uint64_t value = 0;
      if (!try_parse_pair(item, &key, &value)) return false;
      control->modes.emplace_back(key, static_cast<int>(value));
    }
  }
  return true;
}

CUresult Faults::take(Fault& fault, std::uint64_t* latency_ns) {
  *latency_ns += fault.latency_ns;
  if (fault.count == 0) return CUDA_SUCCESS;
  if (fault.calls_before > 0) {
    --fault.calls_before;
    return CUDA_SUCCESS;
  }
  --fault.count;
  return static_cast<CUresult>(fault.error);
}

CUresult Faults::enter(const char* name, bool is_total) {
  std::uint64_t latency_ns = 0;
  CUresult code = CUDA_SUCCESS;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++calls_[name];
    if (is_total) ++total_calls_;
    if (!faults_.empty()) {
      const auto named = faults_.find(name);
      if (named != faults_.end()) code = take(named->second, &latency_ns);
      const auto every = is_total ? faults_.find("*") : faults_.end();
      if (every != faults_.end()) {
        const CUresult every_code = take(every->second, &latency_ns);
        if (code == CUDA_SUCCESS) code = every_code;
      }
    }
  }
  if (latency_ns > 0) std::this_thread::sleep_for(std::chrono::nanoseconds(latency_ns));
  return code == CUDA_SUCCESS ? code : refuse(code, "%s: told to fail", name);
}

void Faults::apply(const Control& control) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (control.clears_faults) faults_.clear();
  for (const auto& [name, fault] : control.faults) faults_[name] = fault;
}

void Faults::reset() {
  const std::lock_guard<std::mutex> lock(mutex_);
  calls_.clear();
  faults_.clear();
  total_calls_ = 0;
}

std::uint64_t Faults::calls(const std::string& name) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = calls_.find(name);
  return found == calls_.end() ? 0 : found->second;
}

std::uint64_t Faults::total_calls() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return total_calls_;
}

std::string Faults::names() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string text;
  for (const auto& [name, count] : calls_) text += (text.empty() ? "" : ",") + name;
  return text;
}

}  // namespace fakecuda
