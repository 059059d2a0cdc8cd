// stress.cpp: the stand-in driver under threads, for runs with sanitizers.
// Owns: nothing.  Thread-safety: this is the test of it.
//
// Each thread works in its own reservation over the shared memory, streams and tables, while one
// more thread lends pages between them, reads counters and changes faults.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "exports.h"

namespace {

constexpr int kNumThreads = 3;
constexpr std::size_t kMaxGranules = 6;

void check(CUresult code, const char* what) {
  if (code == CUDA_SUCCESS) return;
  std::fprintf(stderr, "%s: %d (%s)\n", what, static_cast<int>(code), fakecuda_reason());
  std::abort();
}

CUmemAllocationProp properties() {
  CUmemAllocationProp properties{};
  properties.type = 1;
  properties.location = {1, 0};
  return properties;
}

/// One commit, some work behind an event, and one release.
void round_of_work(CUdeviceptr base, std::size_t granule, std::mt19937& random, CUstream stream,
                   CUevent event) {
  const std::size_t granules = 1 + random() % kMaxGranules;
  const CUmemAllocationProp wanted = properties();
  for (std::size_t index = 0; index < granules; ++index) {
    CUmemGenericAllocationHandle handle = 0;
    check(cuMemCreate(&handle, granule, &wanted, 0), "create");
    check(cuMemMap(base + index * granule, granule, 0, handle, 0), "map");
    check(cuMemRelease(handle), "release");
  }
  const CUmemAccessDesc access{{1, 0}, 3};
  check(cuMemSetAccess(base, granules * granule, &access, 1), "set access");
  const auto value = static_cast<unsigned char>(random());
  check(cuMemsetD8Async(base, value, granules * granule, stream), "memset");
  check(fakecuda_touch(stream, base, granules * granule, 0), "touch");
  check(cuEventRecord(event, stream), "record");
  while (cuEventQuery(event) == CUDA_ERROR_NOT_READY) std::this_thread::yield();
  const auto* bytes = reinterpret_cast<const unsigned char*>(base);
  if (bytes[random() % (granules * granule)] != value) std::abort();
  check(cuMemUnmap(base, granules * granule), "unmap");
}

void work(CUcontext context, unsigned seed, int rounds) {
  std::mt19937 random(seed);
  CUstream stream = nullptr;
  CUevent event = nullptr;
  CUdeviceptr base = 0;
  std::size_t granule = 0;
  const CUmemAllocationProp wanted = properties();
  check(cuCtxSetCurrent(context), "set current");
  check(cuMemGetAllocationGranularity(&granule, &wanted, 0), "granularity");
  check(cuStreamCreate(&stream, seed % 2), "stream");
  check(cuEventCreate(&event, 2), "event");
  check(cuMemAddressReserve(&base, kMaxGranules * granule, 0, 0, 0), "reserve");
  for (int round = 0; round < rounds; ++round) {
    round_of_work(base, granule, random, stream, event);
  }
  check(cuMemAddressFree(base, kMaxGranules * granule), "free");
  check(cuEventDestroy_v2(event), "destroy event");
  check(cuStreamDestroy_v2(stream), "destroy stream");
}

void disturb(CUcontext context, const std::atomic<bool>& is_over) {
  check(cuCtxSetCurrent(context), "set current");
  while (!is_over) {
    if (fakecuda_ctl("query_runs=2;cuMemMap:lat=1000") != 0) std::abort();
    std::uint64_t sum = fakecuda_leaks() + fakecuda_used_bytes() + fakecuda_total_calls();
    void* memory = nullptr;
    check(cuMemHostAlloc(&memory, 4096, 0), "host alloc");
    std::memcpy(memory, &sum, sizeof(sum));
    check(cuMemFreeHost(memory), "free host");
    check(cuCtxSynchronize(), "synchronize");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 300;
  CUcontext context = nullptr;
  check(cuInit(0), "init");
  check(cuDevicePrimaryCtxRetain(&context, 0), "retain");
  if (fakecuda_ctl("query_runs=2") != 0) std::abort();
  std::atomic<bool> is_over{false};
  std::thread disturber(disturb, context, std::cref(is_over));
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < kNumThreads; ++seed) {
    threads.emplace_back(work, context, seed, rounds);
  }
  for (std::thread& thread : threads) thread.join();
  is_over = true;
  disturber.join();
  if (fakecuda_leaks() != 0 || fakecuda_used_bytes() != 0) {
    std::fprintf(stderr, "%llu things leaked\n", static_cast<unsigned long long>(fakecuda_leaks()));
    return 1;
  }
  std::printf("fakecuda: %llu calls by %d threads, nothing leaked\n",
              static_cast<unsigned long long>(fakecuda_total_calls()), kNumThreads + 1);
  fakecuda_reset();
  return 0;
}
