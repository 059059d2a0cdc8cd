#include "error.h"

#include <utility>

namespace vmalloc {

DriverError::DriverError(std::string call_name, long error_code, std::string error_name,
                         std::string error_detail)
    : std::runtime_error(call_name + " failed with " + error_name + " (" +
                         std::to_string(error_code) + ")" +
                         (error_detail.empty() ? "" : ": " + error_detail)),
      call(std::move(call_name)),
      code(error_code),
      name(std::move(error_name)),
      detail(std::move(error_detail)) {}

}  // namespace vmalloc
