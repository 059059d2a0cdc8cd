// cpu_isa.cpp: asks the processor and the environment for an instruction set.
// Owns: the choice, made once.  Thread-safety: see cpu_isa.h.
#include "cpu_isa.h"

#include <cstdlib>
#include <string>

#include "error.h"

namespace vmalloc {
namespace {

CpuIsa named(const std::string& name) {
  for (const CpuIsa isa : {CpuIsa::kPortable, CpuIsa::kAvx2, CpuIsa::kAvx512}) {
    if (name == cpu_isa_name(isa)) return isa;
  }
  throw ConfigError("VMALLOC_CPU_ISA is \"" + name + "\", must be portable, avx2 or avx512");
}

CpuIsa best_of_processor() noexcept {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return CpuIsa::kAvx512;
  if (avx2) return CpuIsa::kAvx2;
#endif
  return CpuIsa::kPortable;
}

CpuIsa choose() {
  const char* forced = std::getenv("VMALLOC_CPU_ISA");
  const CpuIsa limit = forced != nullptr && *forced != '\0' ? named(forced) : CpuIsa::kAvx512;
  const CpuIsa best = best_of_processor();
  return limit < best ? limit : best;
}

}  // namespace

CpuIsa cpu_isa() {
  static const CpuIsa chosen = choose();
  return chosen;
}

const char* cpu_isa_name(CpuIsa isa) noexcept {
  switch (isa) {
    case CpuIsa::kAvx512:
      return "avx512";
    case CpuIsa::kAvx2:
      return "avx2";
    case CpuIsa::kPortable:
      break;
  }
  return "portable";
}

}  // namespace vmalloc
