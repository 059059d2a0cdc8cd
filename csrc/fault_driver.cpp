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
  if (!hold) passed_ = next_fence_ - 1;
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

void FaultDriver::zero(Address address, std::size_t bytes) {
  throw_if_release_due("zero");
  inner_->zero(address, bytes);
}

void FaultDriver::protect(Address address, std::size_t num_pages, Access access) {
  throw_if_release_due("protect");
  inner_->protect(address, num_pages, access);
}

void FaultDriver::copy_page(Address to, PageHandle from, std::size_t bytes) {
  throw_if_release_due("copy");
  inner_->copy_page(to, from, bytes);
}

void FaultDriver::read_page(PageHandle from, void* to) {
  throw_if_release_due("read");
  inner_->read_page(from, to);
}

void FaultDriver::write_page(PageHandle to, const void* from) {
  throw_if_release_due("write");
  inner_->write_page(to, from);
}

Fence FaultDriver::record_fence(Stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!hold_) return 0;
  return next_fence_++;
}

bool FaultDriver::fence_passed(Fence fence) {
  const std::lock_guard<std::mutex> lock(mutex_);
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
