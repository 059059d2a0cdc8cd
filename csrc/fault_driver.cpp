#include "fault_driver.h"

#include <chrono>
#include <thread>

#include "error.h"

namespace vmalloc {

void FaultDriver::fail_call(std::uint64_t call, Fault fault) {
  const std::lock_guard<std::mutex> lock(mutex_);
  fault_ = fault;
  fail_at_ = call;
  num_calls_ = 0;
}

std::uint64_t FaultDriver::num_calls() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return num_calls_;
}

void FaultDriver::fail_release_call(std::uint64_t call) {
  const std::lock_guard<std::mutex> lock(mutex_);
  release_fail_at_ = call;
  num_release_calls_ = 0;
}

void FaultDriver::delay_maps(unsigned microseconds) { map_delay_us_ = microseconds; }

void FaultDriver::hold_fences(bool hold) {
  const std::lock_guard<std::mutex> lock(mutex_);
  hold_ = hold;
}

std::optional<Address> FaultDriver::try_reserve(std::size_t bytes) {
  if (is_due("reserve")) return std::nullopt;
  return inner_->try_reserve(bytes);
}

std::optional<PageHandle> FaultDriver::try_create_page(std::uint32_t index) {
  if (is_due("create")) return std::nullopt;
  return inner_->try_create_page(index);
}

bool FaultDriver::try_map(Address address, const PageHandle* pages, std::size_t num_pages,
                          Access access) {
  if (is_due("map")) return false;
  if (map_delay_us_ > 0) std::this_thread::sleep_for(std::chrono::microseconds(map_delay_us_));
  return inner_->try_map(address, pages, num_pages, access);
}

void FaultDriver::destroy_page(PageHandle page) {
  throw_if_release_due("destroy");
  inner_->destroy_page(page);
}

void FaultDriver::unmap(Address address, std::size_t num_pages) {
  throw_if_release_due("unmap");
  inner_->unmap(address, num_pages);
}

bool FaultDriver::try_zero(Address address, std::size_t bytes) {
  if (is_due("zero")) return false;
  throw_if_release_due("zero");
  return inner_->try_zero(address, bytes);
}

void FaultDriver::protect(Address address, std::size_t num_pages, Access access) {
  throw_if_release_due("protect");
  inner_->protect(address, num_pages, access);
}

bool FaultDriver::try_copy_page(Address to, PageHandle from, std::size_t bytes) {
  if (is_due("copy")) return false;
  throw_if_release_due("copy");
  return inner_->try_copy_page(to, from, bytes);
}

std::shared_ptr<char[]> FaultDriver::try_allocate_host(std::size_t bytes) {
  return is_due("allocate_host") ? nullptr : inner_->try_allocate_host(bytes);
}

bool FaultDriver::try_read_pages(const PageHandle* from, char* const* to, std::size_t num_pages) {
  if (is_due("read")) return false;
  throw_if_release_due("read");
  return inner_->try_read_pages(from, to, num_pages);
}

bool FaultDriver::try_write_pages(const PageHandle* to, const char* const* from,
                                  std::size_t num_pages) {
  if (is_due("write")) return false;
  throw_if_release_due("write");
  return inner_->try_write_pages(to, from, num_pages);
}

std::optional<Fence> FaultDriver::try_record_fence() {
  if (is_due("record_fence")) return std::nullopt;
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::optional<Fence> inner = inner_->try_record_fence();
  if (!inner) return std::nullopt;
  recorded_.emplace_back(next_fence_, *inner);
  return next_fence_++;
}

bool FaultDriver::fence_passed(Fence fence) {
  if (ignore_) return true;
  const std::lock_guard<std::mutex> lock(mutex_);
  while (!hold_ && !recorded_.empty() && inner_->fence_passed(recorded_.front().second)) {
    passed_ = recorded_.front().first;
    recorded_.pop_front();
  }
  return fence <= passed_;
}

void FaultDriver::throw_if_release_due(const char* call) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (num_release_calls_++ == release_fail_at_) {
    throw DriverError(call, -1, "INJECTED", "fault injection");
  }
}

bool FaultDriver::is_due(const char* call) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (num_calls_++ != fail_at_ || fault_ == Fault::kNone) return false;
  if (fault_ == Fault::kError) throw DriverError(call, -1, "INJECTED", "fault injection");
  return true;
}

}  // namespace vmalloc
