#include "modes.h"

#include <utility>

namespace fakecuda {

bool Modes::try_set(const std::string& name, int value) {
  const std::pair<const char*, int*> table[] = {{"initialized", &initialized},
                                                {"deinitialized", &deinitialized},
                                                {"devices", &devices},
                                                {"vmm", &vmm},
                                                {"vmm_context", &vmm_context},
                                                {"unmap_runs", &unmap_runs},
                                                {"access_runs", &access_runs},
                                                {"read_only", &read_only},
                                                {"rdma", &rdma},
                                                {"posix_fd", &posix_fd},
                                                {"query_runs", &query_runs},
                                                {"lazy", &lazy},
                                                {"missing_symbol", &missing_symbol},
                                                {"driver_version", &driver_version}};
  for (const auto& [key, field] : table) {
    if (name == key) {
      *field = value;
      return true;
    }
  }
  return false;
}

}  // namespace fakecuda
