// span_set.h: a set of bytes of an address range, kept as spans that neither touch nor overlap.
// Owns: the spans.  Thread-safety: none; the owner locks.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <map>
#include <vector>

namespace vmalloc {

/// Bytes [first, end), counted from the start of a range.
struct ByteSpan {
  std::size_t first;
  std::size_t end;
};

class SpanSet {
 public:
  void insert(ByteSpan span) {
    if (span.first >= span.end) return;
    auto it = first_reaching(span.first);
    while (it != spans_.end() && it->first <= span.end) {
      span.first = std::min(span.first, it->first);
      span.end = std::max(span.end, it->second);
      it = spans_.erase(it);
    }
    spans_.emplace(span.first, span.end);
  }

  void erase(ByteSpan span) {
    if (span.first >= span.end) return;
    auto it = first_reaching(span.first);
    while (it != spans_.end() && it->first < span.end) {
      const ByteSpan old{it->first, it->second};
      it = spans_.erase(it);
      if (old.first < span.first) spans_.emplace(old.first, std::min(old.end, span.first));
      if (old.end > span.end) spans_.emplace(span.end, old.end);
    }
  }

  /// True if the set has a byte of `span`.
  [[nodiscard]] bool meets(ByteSpan span) const {
    const auto it = spans_.upper_bound(span.first);
    if (it != spans_.end() && it->first < span.end) return true;
    return it != spans_.begin() && std::prev(it)->second > span.first;
  }

  /// The parts of `span` that are not in the set, in order.
  [[nodiscard]] std::vector<ByteSpan> missing(ByteSpan span) const {
    std::vector<ByteSpan> gaps;
    auto it = spans_.upper_bound(span.first);
    if (it != spans_.begin()) --it;
    for (; it != spans_.end() && it->first < span.end && span.first < span.end; ++it) {
      if (it->second <= span.first) continue;
      if (it->first > span.first) gaps.push_back({span.first, it->first});
      span.first = it->second;
    }
    if (span.first < span.end) gaps.push_back(span);
    return gaps;
  }

  [[nodiscard]] std::vector<ByteSpan> spans() const {
    std::vector<ByteSpan> all;
    for (const auto& [first, end] : spans_) all.push_back({first, end});
    return all;
  }

  void clear() { spans_.clear(); }

 private:
  /// The first span that ends at `byte` or later.
  std::map<std::size_t, std::size_t>::iterator first_reaching(std::size_t byte) {
    auto it = spans_.lower_bound(byte);
    if (it != spans_.begin() && std::prev(it)->second >= byte) --it;
    return it;
  }

  std::map<std::size_t, std::size_t> spans_;  // first -> end
};

/// Call `visit(first, count)` for each run of consecutive numbers.
template <typename Visit>
void for_each_run(const std::vector<std::size_t>& numbers, Visit visit) {
  for (std::size_t i = 0; i < numbers.size();) {
    std::size_t count = 1;
    while (i + count < numbers.size() && numbers[i + count] == numbers[i] + count) ++count;
    visit(numbers[i], count);
    i += count;
  }
}

}  // namespace vmalloc
