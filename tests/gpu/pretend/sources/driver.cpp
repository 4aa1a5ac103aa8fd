// The CUDA driver, as Triton and PyTorch's compiled code load it: libcuda.so.1.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "card.h"
#include "ledger.h"

namespace {

int something(void** to) {
    *to = calloc(1, 64);
    return 0;
}

int launched(void* function) {  // a function is its name
    note(std::string("launch triton:") + static_cast<char*>(function));
    return 0;
}

void* const context = reinterpret_cast<void*>(8);
constexpr int most_threads_a_block = 0;  // CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK
constexpr int registers_a_thread = 4;  // CU_FUNC_ATTRIBUTE_NUM_REGS
constexpr int memory_type = 2, device_pointer = 3;  // of CUpointer_attribute

}  // namespace

extern "C" {

// ---- the card and its context

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* to) { return *to = 13000, 0; }
int cuDeviceGetCount(int* to) { return *to = number_of_cards(), 0; }
int cuDeviceGet(int* to, int card) { return *to = card, 0; }
int cuDeviceGetName(char* to, int size, int) { return strncpy(to, card_name, size), 0; }
int cuDeviceGetAttribute(int* to, int number, int) {
    return *to = attribute_of_card(number), 0;
}
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
    *flags = 0;
    *active = 1;
    return 0;
}
int cuDevicePrimaryCtxRetain(void** to, int) { return *to = context, 0; }
int cuCtxGetCurrent(void** to) { return *to = context, 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuCtxGetDevice(int* to) { return *to = 0; }
int cuCtxPushCurrent_v2(void*) { return 0; }
int cuCtxPopCurrent_v2(void**) { return 0; }
int cuCtxGetLimit(size_t* to, int) { return *to = 1 << 20, 0; }
int cuCtxSetLimit(int, size_t) { return 0; }
int cuGetErrorString(int, const char** to) { return *to = "an error of the pretended card", 0; }
int cuPointerGetAttribute(void* to, int attribute, unsigned long long address) {
    if (attribute == memory_type) return *static_cast<unsigned*>(to) = 2, 0;  // of a device
    return *static_cast<unsigned long long*>(to) = attribute == device_pointer ? address : 0, 0;
}

// ---- modules: what a compiler made is taken, and never looked at

int cuModuleLoad(void** to, const char*) { return something(to); }
int cuModuleLoadData(void** to, const void*) { return something(to); }
int cuModuleLoadDataEx(void** to, const void*, unsigned, int*, void**) { return something(to); }
int cuModuleUnload(void*) { return 0; }
int cuModuleGetFunction(void** to, void*, const char* name) { return *to = strdup(name), 0; }
int cuLinkCreate_v2(unsigned, int*, void**, void** to) { return something(to); }
int cuLinkAddData_v2(...) { return 0; }
int cuLinkComplete(void*, void** to, size_t* bytes) { return *bytes = 8, something(to); }
int cuLinkDestroy(void*) { return 0; }
int cuTensorMapEncodeTiled(...) { return 0; }
int cuTensorMapEncodeIm2col(...) { return 0; }

// ---- kernels

int cuFuncGetAttribute(int* to, int attribute, void*) {
    *to = attribute == most_threads_a_block ? 1024 : attribute == registers_a_thread ? 40 : 0;
    return 0;
}
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuFuncSetCacheConfig(void*, int) { return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* to, void*, int, size_t) {
    return *to = 2, 0;
}
int cuOccupancyMaxActiveClusters(int* to, ...) { return *to = 8, 0; }
int cuLaunchKernel(
    void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
    void**, void**) {
    return launched(function);
}
int cuLaunchKernelEx(const void*, void* function, void**, void**) { return launched(function); }
int cuLaunchCooperativeKernel(
    void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
    void**) {
    return launched(function);
}
}
