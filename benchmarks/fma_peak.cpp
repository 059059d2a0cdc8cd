// fma_peak.cpp: how many multiply-adds a core does when nothing else is in their way.
// Owns: nothing.  Thread-safety: any thread. Compiled by benchmarks/linear.py for the instruction
// set in use.
#if defined(__AVX512F__)
#include "../csrc/vector_avx512.inl"
#elif defined(__AVX2__)
#include "../csrc/vector_avx2.inl"
#else
#include "../csrc/vector_portable.inl"
#endif

/// Run `steps` steps of independent chains in registers; returns the floating-point operations.
extern "C" double multiply_adds(long steps, float* sink) {
  using namespace vmalloc;
  constexpr int kChains = 12;  // enough to hide the latency, few enough for 16 registers
  Vec chains[kChains];
  for (Vec& chain : chains) chain = vset(sink[0]);
  const Vec factor = vset(0.999F);
  const Vec term = vset(0.001F);
  for (long i = 0; i < steps; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) chains[j] = vfma(chains[j], factor, term);
  }
  for (const Vec& chain : chains) vstore(sink, vadd(vload(sink), chain));
  return 2.0 * kChains * kLanes * static_cast<double>(steps);
}
