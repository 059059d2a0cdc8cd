// cpu_isa.h: which instruction set this process's kernels use.
// Owns: the choice, made once.  Thread-safety: every function, from any thread.
#pragma once

#include <cstdint>

namespace vmalloc {

enum class CpuIsa : std::int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

/// The best one that the processor has. The environment variable VMALLOC_CPU_ISA (portable, avx2 or
/// avx512), read once, forces a lower one.  Throws ConfigError if it names none of them.
[[nodiscard]] CpuIsa cpu_isa();

/// Its name, as VMALLOC_CPU_ISA spells it.
[[nodiscard]] const char* cpu_isa_name(CpuIsa isa) noexcept;

}  // namespace vmalloc
