// Of cuBLAS, cuDNN, cuFFT and NCCL the functions that hand something back. All others are generated: they
// say that all went well, and those that compute count as one launch.
#include <cudnn_graph.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "ledger.h"
#include "passed_on.h"

namespace {

int handle(void** to) {
    *to = calloc(1, 256);
    return 0;
}

}  // namespace

extern "C" {

// ---- cuBLAS: the handles of its settings, and a way to multiply whenever one is asked for

int cublasCreate_v2(void** to) { return handle(to); }
int cublasGetMathMode(void*, int* to) { return *to = 0, 0; }
int cublasGetPointerMode_v2(void*, int* to) { return *to = 0; }
int cublasLtMatmulDescCreate(void** to, int, int) { return handle(to); }
int cublasLtMatrixLayoutCreate(void** to, int, uint64_t, uint64_t, int64_t) { return handle(to); }
int cublasLtMatmulPreferenceCreate(void** to) { return handle(to); }
int cublasLtMatmulAlgoGetHeuristic(
    void*, void*, void*, void*, void*, void*, void*, int asked, void* results, int* found) {
    constexpr size_t bytes_of_result = 96;  // cublasLtMatmulHeuristicResult_t
    if (asked) memset(results, 0, bytes_of_result);
    return *found = 1, 0;
}

// ---- cuDNN: descriptors know their type, and each graph of operations has one way to run it

struct Descriptor {
    cudnnBackendDescriptorType_t type;
    char rest[1020];
};

cudnnStatus_t cudnnCreate(cudnnHandle_t* to) {
    handle(reinterpret_cast<void**>(to));
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnGetStream(cudnnHandle_t, cudaStream_t* to) {
    *to = nullptr;
    return CUDNN_STATUS_SUCCESS;
}
size_t cudnnGetVersion() { return CUDNN_VERSION; }
size_t cudnnGetCudartVersion() { return CUDART_VERSION; }
cudnnStatus_t cudnnGetProperty(libraryPropertyType part, int* to) {
    *to = part == MAJOR_VERSION   ? CUDNN_MAJOR
          : part == MINOR_VERSION ? CUDNN_MINOR
                                  : CUDNN_PATCHLEVEL;
    return CUDNN_STATUS_SUCCESS;
}
const char* cudnnGetErrorString(cudnnStatus_t) { return "an error of the pretended cuDNN"; }
void cudnnGetLastErrorString(char* to, size_t size) {
    if (size) *to = 0;
}
cudnnStatus_t cudnnBackendCreateDescriptor(
    cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t* to) {
    auto* made = static_cast<Descriptor*>(calloc(1, sizeof(Descriptor)));
    made->type = type;
    *to = made;
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor) {
    free(descriptor);
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendExecute(
    cudnnHandle_t, cudnnBackendDescriptor_t, cudnnBackendDescriptor_t) {
    note("launch cudnnBackendExecute");
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendGetAttribute(
    cudnnBackendDescriptor_t, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
    int64_t asked, int64_t* found, void* to) {
    bool is_list = name == CUDNN_ATTR_ENGINE_NUMERICAL_NOTE ||
                   name == CUDNN_ATTR_ENGINE_BEHAVIOR_NOTE ||
                   name == CUDNN_ATTR_ENGINE_LAYOUT_INFO || name == CUDNN_ATTR_ENGINE_KNOB_INFO;
    if (found) *found = !is_list;  // notes and knobs: none; of all else there is one
    if (is_list || name == CUDNN_ATTR_ENGINEHEUR_RESULTS || !to || asked < 1)
        return CUDNN_STATUS_SUCCESS;
    bool is_short = type == CUDNN_TYPE_INT32 || type == CUDNN_TYPE_FLOAT;
    if (type != CUDNN_TYPE_BACKEND_DESCRIPTOR) memset(to, 0, is_short ? 4 : 8);
    if (name == CUDNN_ATTR_OPERATIONGRAPH_ENGINE_GLOBAL_COUNT) *static_cast<int64_t*>(to) = 1;
    return CUDNN_STATUS_SUCCESS;
}

// ---- cuFFT: plans that need no room

int cufftCreate(int* to) { return *to = 1, 0; }
int cufftXtMakePlanMany(
    int, int, long long*, long long*, long long, long long, int, long long*, long long, long long,
    int, long long, size_t* bytes, int) {
    return *bytes = 0, 0;
}

// ---- NCCL: communicators. All processes have the same to say, so that each passes on its own:
// whole numbers, by which they compare their models, and not the weights

int processes() {
    const char* said = getenv("WORLD_SIZE");
    return said ? atoi(said) : 1;
}
size_t bytes_of_number(int type) {  // of ncclDataType_t; 0 for all that is no whole number
    return type == 2 ? sizeof(int32_t) : type == 4 ? sizeof(int64_t) : 0;
}
int ncclAllGather(const void* from, void* to, size_t count, int type, void*, void*) {
    note("launch ncclAllGather");
    size_t bytes = count * bytes_of_number(type);
    for (int i = 0; bytes && i < processes(); i++)
        pass_on(from, static_cast<char*>(to) + i * bytes, bytes);
    return 0;
}
int ncclBroadcast(const void* from, void* to, size_t count, int type, int, void*, void*) {
    note("launch ncclBroadcast");
    pass_on(from, to, count * bytes_of_number(type));
    return 0;
}

int ncclBcast(void* at, size_t count, int type, int, void*, void*) {
    note("launch ncclBcast");
    pass_on(at, at, count * bytes_of_number(type));
    return 0;
}
int ncclGetVersion(int* to) { return *to = 23007, 0; }
int ncclGetUniqueId(void* to) { return memset(to, 1, 128), 0; }
int ncclCommInitRank(void** to, int, ...) { return handle(to); }
int ncclCommInitRankConfig(void** to, int, ...) { return handle(to); }
int ncclCommInitRankScalable(void** to, int, ...) { return handle(to); }
int ncclCommSplit(void*, int, int, void** to, void*) { return handle(to); }
int ncclCommGetAsyncError(void*, int* to) { return *to = 0; }
int ncclCommCount(void*, int* to) { return *to = processes(), 0; }
int ncclCommUserRank(void*, int* to) {
    const char* said = getenv("RANK");
    return *to = said ? atoi(said) : 0, 0;
}
const char* ncclGetErrorString(int) { return "an error of the pretended NCCL"; }
const char* ncclGetLastError(void*) { return "an error of the pretended NCCL"; }
}
