// driver_streams.cpp: streams, events, copies and memsets: what enqueues work and what waits.
// Owns: nothing.  Thread-safety: every function.
#include "exports.h"
#include "state.h"

using namespace fakecuda;

namespace {

constexpr unsigned kStreamNonBlocking = 1;
constexpr unsigned kAllEventFlags = 0x7;  // blocking sync, disable timing, interprocess
constexpr unsigned kEventDisableTiming = 2;
constexpr unsigned kEventInterprocess = 4;

CUresult find_stream(Device& device, CUstream handle, Stream** stream) {
  *stream =
      device.streams.find_stream(reinterpret_cast<std::uint64_t>(handle), device.context.handle());
  if (*stream != nullptr) return CUDA_SUCCESS;
  return refuse(CUDA_ERROR_INVALID_HANDLE, "%p is no stream of this context", handle);
}

CUresult find_event(Device& device, CUevent handle, Event** event) {
  *event =
      device.streams.find_event(reinterpret_cast<std::uint64_t>(handle), device.context.handle());
  if (*event != nullptr) return CUDA_SUCCESS;
  return refuse(CUDA_ERROR_INVALID_HANDLE, "%p is no event of this context", handle);
}

/// Is this the query, of the pending ones, that lets the work run (mode query_runs)?
bool lets_run(const State& state, int* num_pending_queries) {
  const int every = state.modes.query_runs;
  return every > 0 && ++*num_pending_queries % every == 0;
}

Span host_span(const Device& device, const void* memory, std::size_t bytes) {
  const auto address = reinterpret_cast<std::uint64_t>(memory);
  return {address, true, device.is_host_allocation(address, bytes)};
}

/// The checks a copy makes at the call: the address ranges are known, of the kind that is named.
CUresult check_span(const Device& device, const Span& span, std::size_t bytes) {
  CUdeviceptr base = 0;
  const bool is_reserved = device.addresses.find_reservation(span.address, &base) != nullptr;
  if (span.is_host) {
    if (span.address != 0 && !is_reserved) return CUDA_SUCCESS;
    return refuse(CUDA_ERROR_INVALID_VALUE, "0x%llx is no host memory",
                  static_cast<unsigned long long>(span.address));
  }
  if (device.is_usable(span, bytes, kAccessNone)) return CUDA_SUCCESS;
  return refuse(CUDA_ERROR_INVALID_VALUE, "0x%llx + %zu is not mapped",
                static_cast<unsigned long long>(span.address), bytes);
}

CUresult enqueue(State& state, Device& device, CUstream handle, const Operation& operation) {
  Stream* stream = nullptr;
  if (const CUresult code = find_stream(device, handle, &stream)) return code;
  if (operation.bytes == 0) return CUDA_SUCCESS;
  if (operation.kind == OperationKind::kCopy) {
    if (const CUresult code = check_span(device, operation.source, operation.bytes)) return code;
  }
  if (operation.kind != OperationKind::kTouch) {
    if (const CUresult code = check_span(device, operation.destination, operation.bytes)) {
      return code;
    }
  }
  device.streams.enqueue(*stream, operation);
  return state.modes.lazy != 0 ? CUDA_SUCCESS : device.streams.run(*stream);
}

Operation copy_operation(const Span& destination, const Span& source, std::size_t bytes) {
  Operation operation;
  operation.kind = OperationKind::kCopy;
  operation.destination = destination;
  operation.source = source;
  operation.bytes = bytes;
  return operation;
}

/// A synchronous copy is work of the legacy stream that is waited for.
CUresult copy_now(State& state, Device& device, const Operation& operation) {
  if (const CUresult code = enqueue(state, device, nullptr, operation)) return code;
  Stream* legacy = nullptr;
  if (const CUresult code = find_stream(device, nullptr, &legacy)) return code;
  return device.streams.run(*legacy);
}

}  // namespace

CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
  return driver_call("cuStreamCreate", Needs::kContext, [&](State&, Device& device) {
    if (stream == nullptr || (flags & ~kStreamNonBlocking) != 0) {
      return refuse(CUDA_ERROR_INVALID_VALUE, "stream flags %u", flags);
    }
    const bool is_blocking = (flags & kStreamNonBlocking) == 0;
    *stream = reinterpret_cast<CUstream>(
        device.streams.create_stream(device.context.handle(), is_blocking));
    return CUDA_SUCCESS;
  });
}

CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int) {
  return cuStreamCreate(stream, flags);
}

CUresult cuStreamDestroy_v2(CUstream handle) {
  return driver_call("cuStreamDestroy", Needs::kContext, [&](State&, Device& device) -> CUresult {
    Stream* stream = nullptr;
    if (const CUresult code = find_stream(device, handle, &stream)) return code;
    if (stream->context == 0) {
      return refuse(CUDA_ERROR_INVALID_HANDLE, "the default stream cannot be destroyed");
    }
    device.streams.destroy_stream(*stream);
    return CUDA_SUCCESS;
  });
}

CUresult cuStreamSynchronize(CUstream handle) {
  return driver_call("cuStreamSynchronize", Needs::kContext,
                     [&](State&, Device& device) -> CUresult {
                       Stream* stream = nullptr;
                       if (const CUresult code = find_stream(device, handle, &stream)) return code;
                       return device.streams.run(*stream);
                     });
}

CUresult cuStreamQuery(CUstream handle) {
  return driver_call("cuStreamQuery", Needs::kContext,
                     [&](State& state, Device& device) -> CUresult {
                       Stream* stream = nullptr;
                       if (const CUresult code = find_stream(device, handle, &stream)) return code;
                       if (stream->queue.empty()) return CUDA_SUCCESS;
                       if (!lets_run(state, &stream->num_pending_queries)) {
                         return CUDA_ERROR_NOT_READY;
                       }
                       return device.streams.run(*stream);
                     });
}

CUresult cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned flags) {
  return driver_call("cuStreamWaitEvent", Needs::kContext, [&](State&, Device& device) -> CUresult {
    Stream* stream = nullptr;
    Event* event = nullptr;
    if (const CUresult code = find_stream(device, handle, &stream)) return code;
    if (const CUresult code = find_event(device, event_handle, &event)) return code;
    if (flags != 0) return refuse(CUDA_ERROR_INVALID_VALUE, "wait flags %u", flags);
    device.streams.wait(*stream, *event);
    return CUDA_SUCCESS;
  });
}

CUresult cuEventCreate(CUevent* event, unsigned flags) {
  return driver_call("cuEventCreate", Needs::kContext, [&](State&, Device& device) {
    const bool is_wrong = (flags & kEventInterprocess) != 0 && (flags & kEventDisableTiming) == 0;
    if (event == nullptr || (flags & ~kAllEventFlags) != 0 || is_wrong) {
      return refuse(CUDA_ERROR_INVALID_VALUE, "event flags %u", flags);
    }
    *event = reinterpret_cast<CUevent>(device.streams.create_event(device.context.handle()));
    return CUDA_SUCCESS;
  });
}

CUresult cuEventDestroy_v2(CUevent handle) {
  return driver_call("cuEventDestroy", Needs::kContext, [&](State&, Device& device) -> CUresult {
    Event* event = nullptr;
    if (const CUresult code = find_event(device, handle, &event)) return code;
    device.streams.destroy_event(reinterpret_cast<std::uint64_t>(handle));
    return CUDA_SUCCESS;
  });
}

CUresult cuEventRecord(CUevent event_handle, CUstream handle) {
  return driver_call("cuEventRecord", Needs::kContext,
                     [&](State& state, Device& device) -> CUresult {
                       Stream* stream = nullptr;
                       Event* event = nullptr;
                       if (const CUresult code = find_stream(device, handle, &stream)) return code;
                       if (const CUresult code = find_event(device, event_handle, &event)) {
                         return code;
                       }
                       device.streams.record(*event, *stream);
                       return state.modes.lazy != 0 ? CUDA_SUCCESS : device.streams.run(*stream);
                     });
}

CUresult cuEventQuery(CUevent handle) {
  return driver_call("cuEventQuery", Needs::kContext,
                     [&](State& state, Device& device) -> CUresult {
                       Event* event = nullptr;
                       if (const CUresult code = find_event(device, handle, &event)) return code;
                       if (device.streams.is_complete(*event)) return CUDA_SUCCESS;
                       if (!lets_run(state, &event->num_pending_queries)) {
                         return CUDA_ERROR_NOT_READY;
                       }
                       return device.streams.run(*event);
                     });
}

CUresult cuEventSynchronize(CUevent handle) {
  return driver_call("cuEventSynchronize", Needs::kContext,
                     [&](State&, Device& device) -> CUresult {
                       Event* event = nullptr;
                       if (const CUresult code = find_event(device, handle, &event)) return code;
                       return device.streams.run(*event);
                     });
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr destination, const void* source, std::size_t bytes) {
  return driver_call("cuMemcpyHtoD", Needs::kContext, [&](State& state, Device& device) {
    const Span from = host_span(device, source, bytes);
    return copy_now(state, device, copy_operation({destination}, from, bytes));
  });
}

CUresult cuMemcpyDtoH_v2(void* destination, CUdeviceptr source, std::size_t bytes) {
  return driver_call("cuMemcpyDtoH", Needs::kContext, [&](State& state, Device& device) {
    const Span to = host_span(device, destination, bytes);
    return copy_now(state, device, copy_operation(to, {source}, bytes));
  });
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr destination, const void* source, std::size_t bytes,
                              CUstream stream) {
  return driver_call("cuMemcpyHtoDAsync", Needs::kContext, [&](State& state, Device& device) {
    const Span from = host_span(device, source, bytes);
    return enqueue(state, device, stream, copy_operation({destination}, from, bytes));
  });
}

CUresult cuMemcpyDtoHAsync_v2(void* destination, CUdeviceptr source, std::size_t bytes,
                              CUstream stream) {
  return driver_call("cuMemcpyDtoHAsync", Needs::kContext, [&](State& state, Device& device) {
    const Span to = host_span(device, destination, bytes);
    return enqueue(state, device, stream, copy_operation(to, {source}, bytes));
  });
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr destination, CUdeviceptr source, std::size_t bytes,
                              CUstream stream) {
  return driver_call("cuMemcpyDtoDAsync", Needs::kContext, [&](State& state, Device& device) {
    return enqueue(state, device, stream, copy_operation({destination}, {source}, bytes));
  });
}

CUresult cuMemsetD8Async(CUdeviceptr destination, unsigned char value, std::size_t count,
                         CUstream stream) {
  return driver_call("cuMemsetD8Async", Needs::kContext, [&](State& state, Device& device) {
    Operation operation;
    operation.kind = OperationKind::kFill;
    operation.destination = {destination};
    operation.bytes = count;
    operation.value = value;
    return enqueue(state, device, stream, operation);
  });
}

/// Stands for a kernel launch. It needs a live context, but takes the primary one by itself, so
/// that tests may launch from any thread.
CUresult fakecuda_touch(CUstream stream, CUdeviceptr address, std::size_t bytes, int is_write) {
  return driver_call("fakecuda_touch", Needs::kLaunch,
                     [&](State& state, Device& device) -> CUresult {
                       if (!device.context.is_active()) {
                         return refuse(CUDA_ERROR_INVALID_CONTEXT, "launch without a context");
                       }
                       Operation operation;
                       operation.destination = {address};
                       operation.bytes = bytes;
                       operation.is_write = is_write != 0;
                       return enqueue(state, device, stream, operation);
                     });
}
