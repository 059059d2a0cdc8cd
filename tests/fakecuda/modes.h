// modes.h: switches for what only a GPU can confirm, and for the states a driver can be in.
// Owns: the values.  Thread-safety: guarded by State's mutex.
#pragma once

#include <string>

namespace fakecuda {

struct Modes {
  int initialized = 0;       // 0: cuInit has not been called (fakecuda_reset keeps it)
  int deinitialized = 0;     // 1: every call returns 4, as at process exit
  int devices = 1;           // 0 or 1
  int vmm = 1;               // 0: the device has no virtual memory management
  int vmm_context = 0;       // 1: VMM calls need a current context
  int unmap_runs = 1;        // 0: one cuMemUnmap takes one mapping; 2: it takes the first granule
  int access_runs = 1;       // 0: one cuMemSetAccess takes one mapping
  int read_only = 1;         // 0: PROT_READ is refused
  int rdma = 1;              // 0: the gpuDirectRDMACapable flag is not supported
  int posix_fd = 1;          // 0: no exporting as a file descriptor
  int query_runs = 0;        // N: each N-th query of a pending event or stream runs it
  int lazy = 1;              // 0: work runs when it is enqueued
  int missing_symbol = 500;  // what cuGetProcAddress returns for an unknown name (doc also has 0)
  int driver_version = 13000;

  /// Sets a mode by name; false if there is no such mode.
  bool try_set(const std::string& name, int value);
};

}  // namespace fakecuda
