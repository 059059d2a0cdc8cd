// driver_contexts.cpp: the primary context and the thread's current one.
// Owns: nothing.  Thread-safety: every function.
#include "exports.h"
#include "state.h"

using namespace fakecuda;

namespace {

CUresult check_live(const Device& device, CUcontext context) {
  const auto handle = reinterpret_cast<std::uint64_t>(context);
  if (handle != 0 && handle == device.context.handle()) return CUDA_SUCCESS;
  return refuse(CUDA_ERROR_INVALID_CONTEXT, "%p is no live context", context);
}

}  // namespace

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice ordinal) {
  return driver_call("cuDevicePrimaryCtxRetain", Needs::kHealthy,
                     [&](State& state, Device& device) -> CUresult {
                       if (const CUresult code = check_device(state, ordinal)) return code;
                       if (context == nullptr) return refuse(CUDA_ERROR_INVALID_VALUE, "null");
                       *context = reinterpret_cast<CUcontext>(device.context.retain());
                       return CUDA_SUCCESS;
                     });
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice ordinal) {
  return driver_call("cuDevicePrimaryCtxRelease", Needs::kHealthy,
                     [&](State& state, Device& device) -> CUresult {
                       if (const CUresult code = check_device(state, ordinal)) return code;
                       if (const CUresult code = device.context.release()) return code;
                       if (!device.context.is_active()) device.streams.drop_all();
                       return CUDA_SUCCESS;
                     });
}

CUresult cuDevicePrimaryCtxGetState(CUdevice ordinal, unsigned* flags, int* active) {
  return driver_call("cuDevicePrimaryCtxGetState", Needs::kInit,
                     [&](State& state, Device& device) -> CUresult {
                       if (const CUresult code = check_device(state, ordinal)) return code;
                       if (flags == nullptr || active == nullptr) {
                         return refuse(CUDA_ERROR_INVALID_VALUE, "null");
                       }
                       *flags = 0;
                       *active = device.context.is_active() ? 1 : 0;
                       return CUDA_SUCCESS;
                     });
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  return driver_call("cuCtxGetCurrent", Needs::kInit, [&](State&, Device&) {
    if (context == nullptr) return refuse(CUDA_ERROR_INVALID_VALUE, "null");
    *context = reinterpret_cast<CUcontext>(current_context());
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxSetCurrent(CUcontext context) {
  return driver_call("cuCtxSetCurrent", Needs::kInit, [&](State&, Device& device) -> CUresult {
    auto& stack = thread_contexts();
    if (context == nullptr) {
      if (!stack.empty()) stack.pop_back();
      return CUDA_SUCCESS;
    }
    if (const CUresult code = check_live(device, context)) return code;
    if (stack.empty()) stack.push_back(0);
    stack.back() = reinterpret_cast<std::uint64_t>(context);
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
  return driver_call("cuCtxPushCurrent", Needs::kInit, [&](State&, Device& device) -> CUresult {
    if (const CUresult code = check_live(device, context)) return code;
    thread_contexts().push_back(reinterpret_cast<std::uint64_t>(context));
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  return driver_call("cuCtxPopCurrent", Needs::kInit, [&](State&, Device&) -> CUresult {
    auto& stack = thread_contexts();
    if (stack.empty()) return refuse(CUDA_ERROR_INVALID_CONTEXT, "no context to pop");
    if (context != nullptr) *context = reinterpret_cast<CUcontext>(stack.back());
    stack.pop_back();
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxGetDevice(CUdevice* device) {
  return driver_call("cuCtxGetDevice", Needs::kContext, [&](State&, Device&) {
    if (device == nullptr) return refuse(CUDA_ERROR_INVALID_VALUE, "null");
    *device = 0;
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxSynchronize(void) {
  return driver_call("cuCtxSynchronize", Needs::kContext,
                     [](State&, Device& device) { return device.streams.run_all(); });
}
