#include "reason.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace fakecuda {
namespace {

thread_local char reason[256] = "";

}  // namespace

CUresult refuse(CUresult code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(reason, sizeof(reason), format, arguments);
  va_end(arguments);
  static const bool is_verbose = std::getenv("FAKECUDA_VERBOSE") != nullptr;
  if (is_verbose) std::fprintf(stderr, "fakecuda: %d: %s\n", static_cast<int>(code), reason);
  return code;
}

const char* last_reason() { return reason; }

}  // namespace fakecuda
