// The CUDA runtime but for its memory: kernels, which are counted and do nothing, the cards,
// streams and events, which are always ready, and graphs, of which each replay is one launch.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <vector>

#include "card.h"
#include "ledger.h"

namespace {

thread_local int current_card = 0;
thread_local bool capturing = false;

cudaError_t launched(const void* kernel) {
    note_launch(kernel);
    return cudaSuccess;
}

// Something for a handle to point at.
template <class Handle>
cudaError_t made(Handle* to) {
    *to = static_cast<Handle>(calloc(1, 64));
    return cudaSuccess;
}

}  // namespace

extern "C" {

// ---- kernels: what nvcc's code calls to make them known and to launch them

void** __cudaRegisterFatBinary(void*) {
    static void* handle[4];
    return handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(
    void**, const char* kernel, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
    name_kernel(kernel, name);
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

struct Configuration {
    dim3 grid, block;
    size_t shared;
    void* stream;
};
static thread_local std::vector<Configuration> pushed;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
    pushed.push_back({grid, block, shared, stream});
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    Configuration last = pushed.back();
    pushed.pop_back();
    *grid = last.grid;
    *block = last.block;
    *shared = last.shared;
    *static_cast<void**>(stream) = last.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* to, const void* kernel) {
    *to = static_cast<cudaKernel_t>(const_cast<void*>(kernel));
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t) {
    return launched(kernel);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) {
    return launched(kernel);
}
cudaError_t __cudaLaunchKernel_ptsz(
    cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) {
    return launched(kernel);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* kernel, void**) {
    return launched(kernel);
}
cudaError_t cudaLaunchCooperativeKernel(
    const void* kernel, dim3, dim3, void**, size_t, cudaStream_t) {
    return launched(kernel);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* to, const void*) {
    memset(to, 0, sizeof *to);
    to->maxThreadsPerBlock = threads_a_block;
    to->numRegs = 64;
    to->binaryVersion = to->ptxVersion = 10 * compute_major + compute_minor;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* to, const void*, int, size_t) {
    *to = 2;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* to, const void*, int, size_t, unsigned) {
    *to = 2;
    return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** to, const void*) {
    static char held[1 << 16];
    *to = held;
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(
    const char*, void** to, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* found) {
    *to = nullptr;
    if (found) *found = cudaDriverEntryPointSymbolNotFound;
    return cudaErrorSymbolNotFound;
}

// ---- the cards

cudaError_t cudaGetDeviceCount(int* to) {
    *to = number_of_cards();
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* to) {
    *to = current_card;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int card) {
    if (card < 0 || card >= number_of_cards()) return cudaErrorInvalidDevice;
    current_card = card;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* to, int) {
    memset(to, 0, sizeof *to);
    strcpy(to->name, card_name);
    to->totalGlobalMem = bytes_of_card();
    to->major = compute_major;
    to->minor = compute_minor;
    to->multiProcessorCount = multiprocessors;
    to->warpSize = threads_a_warp;
    to->maxThreadsPerBlock = to->maxThreadsDim[0] = to->maxThreadsDim[1] = threads_a_block;
    to->maxThreadsDim[2] = 64;
    to->maxGridSize[0] = 2147483647;
    to->maxGridSize[1] = to->maxGridSize[2] = 65535;
    to->maxThreadsPerMultiProcessor = threads_a_multiprocessor;
    to->maxBlocksPerMultiProcessor = 32;
    to->regsPerBlock = to->regsPerMultiprocessor = registers;
    to->sharedMemPerBlock = shared_a_block;
    to->sharedMemPerBlockOptin = shared_a_block_asked_for;
    to->sharedMemPerMultiprocessor = shared_a_multiprocessor;
    to->l2CacheSize = 50 << 20;
    to->memoryBusWidth = memory_bus_bits;
    to->textureAlignment = 512;
    to->unifiedAddressing = to->concurrentKernels = to->cooperativeLaunch = 1;
#if CUDART_VERSION >= 11080
    to->clusterLaunch = 1;
#endif
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* to, cudaDeviceAttr attribute, int) {
    *to = attribute_of_card(attribute);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* to, int size, int card) {
    snprintf(to, size, "0000:0%d:00.0", card);
    return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* to, int, int) {
    *to = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() {
    note_wait("cudaDeviceSynchronize");
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* to) {
    *to = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* to) {
    *to = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorPretended"; }
const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory"
           : error == cudaErrorInvalidDevice  ? "invalid device ordinal"
                                              : "an error of the pretended card";
}

// ---- streams and events: all that was asked for is done

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* to) {
    *to = static_cast<cudaStream_t>(calloc(1, 64));
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* to, unsigned) { return cudaStreamCreate(to); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* to, unsigned, int) {
    return cudaStreamCreate(to);
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* to) {
    *to = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    note_wait("cudaStreamSynchronize");
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamAddCallback(
    cudaStream_t stream, cudaStreamCallback_t call, void* with, unsigned) {
    call(stream, cudaSuccess, with);
    return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t call, void* with) {
    call(with);
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* to) {
    *to = static_cast<cudaEvent_t>(calloc(1, 64));
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* to, unsigned) { return cudaEventCreate(to); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* to, cudaEvent_t, cudaEvent_t) {
    *to = 1;
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) {
    note_wait("cudaEventSynchronize");
    return cudaSuccess;
}

// ---- graphs

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    capturing = true;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* to) {
    *to = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t*,
    const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t* number) {
#else
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t*,
    const cudaGraphNode_t**, size_t* number) {
#endif
    if (id) *id = capturing;
    if (number) *number = 0;
    return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* to) {
    capturing = false;
    return made(reinterpret_cast<void**>(to));
}
cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* number) {
    *number = 1;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* to, cudaGraph_t, unsigned long long) {
    return made(reinterpret_cast<void**>(to));
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
    note("launch a graph");
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    free(graph);
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    free(graph);
    return cudaSuccess;
}
}
