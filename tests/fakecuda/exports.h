// exports.h: every symbol of the stand-in libcuda.so.1, in the driver's own ABI.
// Owns: nothing.  Thread-safety: every function may be called from any thread.
//
// README of the stand-in
// ======================
// A shared library that behaves on CPU memory as NVIDIA's driver API documents, and refuses what
// it does not promise. It carries no kernels: a launch is modelled by fakecuda_touch.
//
// Rules, and where each comes from ("doc": cuda.h 13.0's text on that function; "strict": not
// promised anywhere, so refused here; "mode": only a GPU can tell, so it can be switched).
//  1. cuInit first (3), nothing after shut-down (4: mode deinitialized=1). Doc.
//  2. Streams, events, copies, memsets, memory info and host allocations need a current context
//     (201; 709 if it was released since). VMM calls need none: mode vmm_context=1 asks for one.
//     The current context belongs to the thread; the primary one is retained and released by count.
//  3. Sizes, addresses and the offset are multiples of the minimum granularity; flags and the map
//     offset are 0 (1). Doc.
//  4. cuMemMap: inside one reservation, over no other mapping, a live handle that is large enough.
//     Doc; "one reservation" is strict.
//  5. A mapping has no access until cuMemSetAccess. Both that and cuMemUnmap take a gap-free run of
//     whole mappings of one reservation: a part of a mapping is refused (doc for unmap, strict for
//     set-access). Modes access_runs=0 and unmap_runs=0 refuse more than one mapping a call;
//     read_only=0 refuses PROT_READ.
//  6. cuMemAddressFree: exact base and size (doc), nothing mapped (strict).
//  7. Memory lives until its last handle reference and its last mapping are gone (doc); a handle
//     whose references are gone cannot be mapped or released again (1).
//  8. Capacity is counted: 2 when it is used up. New memory is filled with FAKECUDA_POISON.
//  9. Locations name a device that is there (101). Exporting needs the handle type at create (1).
// 10. Streams are lazy: nothing runs before somebody waits for it (synchronize calls, synchronous
//     copies, fakecuda_run_stream). Copies check at the call that device ranges are mapped (1).
//     When an operation runs, its ranges must be mapped and accessible at that moment; if not,
//     700, and that or any later call returns 700 until fakecuda_reset ("leaves the process in an
//     inconsistent state", doc), except device queries, names and a thread's current context.
//     Stream 0 and 1 are the legacy stream: it runs after and
//     before the work of every stream made without CU_STREAM_NON_BLOCKING, in call order. Stream 2
//     (per thread) is the same as 0 here.
// 11. The CPU sees what the device sees: reading a range with no access is a SIGSEGV.
//
// Controls: fakecuda_ctl takes items joined by ';'. `mode=value` sets a mode (modes.h lists them).
// `name:key=value,...` sets a fault for the calls of that name, `*` for all: fail=K (the K-th call
// from now fails, 1-based), count=N (and the N-1 after it; default 1), err=CODE (default 2),
// lat=NANOSECONDS (each call sleeps, no lock held). `clear` removes all faults. `*` and
// fakecuda_total_calls see every cu* call except cuGetProcAddress, cuGetErrorName, cuGetErrorString
// and cuDriverGetVersion, which never fail on their own.
// Environment, read at load and by fakecuda_reset: FAKECUDA_MEM_MB (256), FAKECUDA_GRAN_KB (64),
// FAKECUDA_POISON (255; 0: zeros), FAKECUDA_CTL; FAKECUDA_VERBOSE=1 prints each refusal.
#pragma once

#include "abi.h"

extern "C" {
#pragma GCC visibility push(default)

// Names, versions, symbols: no cuInit needed.
CUresult cuGetErrorName(CUresult error, const char** text);
CUresult cuGetErrorString(CUresult error, const char** text);
CUresult cuDriverGetVersion(int* version);
CUresult cuGetProcAddress(const char* symbol, void** function, int version, std::uint64_t flags);
CUresult cuGetProcAddress_v2(const char* symbol, void** function, int version, std::uint64_t flags,
                             int* status);
CUresult cuInit(unsigned flags);

// Devices.
CUresult cuDeviceGetCount(int* count);
CUresult cuDeviceGet(CUdevice* device, int ordinal);
CUresult cuDeviceGetName(char* name, int length, CUdevice device);
CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device);
CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device);
CUresult cuDeviceGetPCIBusId(char* text, int length, CUdevice device);
CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device);
CUresult cuDeviceTotalMem_v2(std::size_t* bytes, CUdevice device);
CUresult cuDeviceCanAccessPeer(int* can, CUdevice device, CUdevice peer);

// Contexts.
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device);
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device);
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active);
CUresult cuCtxGetCurrent(CUcontext* context);
CUresult cuCtxSetCurrent(CUcontext context);
CUresult cuCtxPushCurrent_v2(CUcontext context);
CUresult cuCtxPopCurrent_v2(CUcontext* context);
CUresult cuCtxGetDevice(CUdevice* device);
CUresult cuCtxSynchronize(void);

// Virtual memory management.
CUresult cuMemGetAllocationGranularity(std::size_t* bytes, const CUmemAllocationProp* properties,
                                       int option);
CUresult cuMemAddressReserve(CUdeviceptr* address, std::size_t bytes, std::size_t alignment,
                             CUdeviceptr hint, unsigned long long flags);
CUresult cuMemAddressFree(CUdeviceptr address, std::size_t bytes);
CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, std::size_t bytes,
                     const CUmemAllocationProp* properties, unsigned long long flags);
CUresult cuMemRelease(CUmemGenericAllocationHandle handle);
CUresult cuMemMap(CUdeviceptr address, std::size_t bytes, std::size_t offset,
                  CUmemGenericAllocationHandle handle, unsigned long long flags);
CUresult cuMemUnmap(CUdeviceptr address, std::size_t bytes);
CUresult cuMemSetAccess(CUdeviceptr address, std::size_t bytes, const CUmemAccessDesc* access,
                        std::size_t count);
CUresult cuMemGetAccess(unsigned long long* flags, const CUmemLocation* location,
                        CUdeviceptr address);
CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* handle, void* address);
CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp* properties,
                                                CUmemGenericAllocationHandle handle);
CUresult cuMemExportToShareableHandle(void* shareable, CUmemGenericAllocationHandle handle,
                                      int type, unsigned long long flags);

// Plain and page-locked memory.
CUresult cuMemGetInfo_v2(std::size_t* free_bytes, std::size_t* total_bytes);
CUresult cuMemAlloc_v2(CUdeviceptr* address, std::size_t bytes);
CUresult cuMemFree_v2(CUdeviceptr address);
CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, std::size_t* bytes, CUdeviceptr address);
CUresult cuMemHostAlloc(void** memory, std::size_t bytes, unsigned flags);
CUresult cuMemFreeHost(void* memory);
CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* address, void* memory, unsigned flags);

// Copies.
CUresult cuMemcpyHtoD_v2(CUdeviceptr destination, const void* source, std::size_t bytes);
CUresult cuMemcpyDtoH_v2(void* destination, CUdeviceptr source, std::size_t bytes);
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr destination, const void* source, std::size_t bytes,
                              CUstream stream);
CUresult cuMemcpyDtoHAsync_v2(void* destination, CUdeviceptr source, std::size_t bytes,
                              CUstream stream);
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr destination, CUdeviceptr source, std::size_t bytes,
                              CUstream stream);
CUresult cuMemsetD8Async(CUdeviceptr destination, unsigned char value, std::size_t count,
                         CUstream stream);

// Streams and events.
CUresult cuStreamCreate(CUstream* stream, unsigned flags);
CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority);
CUresult cuStreamDestroy_v2(CUstream stream);
CUresult cuStreamSynchronize(CUstream stream);
CUresult cuStreamQuery(CUstream stream);
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags);
CUresult cuEventCreate(CUevent* event, unsigned flags);
CUresult cuEventDestroy_v2(CUevent event);
CUresult cuEventRecord(CUevent event, CUstream stream);
CUresult cuEventQuery(CUevent event);
CUresult cuEventSynchronize(CUevent event);

// Controls of the stand-in.
int fakecuda_version(void);
void fakecuda_reset(void);           // as at load, but cuInit stays done
int fakecuda_ctl(const char* text);  // 0, or -1 if the text is not understood (nothing done)
std::uint64_t fakecuda_calls(const char* name);  // by base name: "cuMemGetInfo"
std::uint64_t fakecuda_total_calls(void);
int fakecuda_call_names(char* buffer, std::size_t bytes);  // "a,b,c"; returns the length needed
std::uint64_t fakecuda_used_bytes(void);
// Handles, mappings, reservations, events, streams and host allocations that are still there.
std::uint64_t fakecuda_leaks(void);
std::uint64_t fakecuda_pending(CUstream stream);  // operations enqueued and not yet run
CUresult fakecuda_touch(CUstream stream, CUdeviceptr address, std::size_t bytes, int is_write);
CUresult fakecuda_run_stream(CUstream stream);
const char* fakecuda_reason(void);  // why this thread's last refused call was refused

#pragma GCC visibility pop
}
