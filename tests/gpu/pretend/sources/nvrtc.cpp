// NVRTC, with which PyTorch compiles a few of its kernels when they are first used: it loads it by
// its own name, so that this is a library of its own. A program compiles to nothing.
#include <cstddef>
#include <cstdlib>

extern "C" {

int nvrtcVersion(int* major, int* minor) { return *major = 13, *minor = 0; }
int nvrtcCreateProgram(void** to, ...) { return *to = calloc(1, 64), 0; }
int nvrtcDestroyProgram(void**) { return 0; }
int nvrtcCompileProgram(...) { return 0; }
int nvrtcAddNameExpression(...) { return 0; }
int nvrtcGetLoweredName(void*, const char* name, const char** to) { return *to = name, 0; }
int nvrtcGetCUBINSize(void*, size_t* to) { return *to = 1, 0; }
int nvrtcGetCUBIN(void*, char* to) { return *to = 0; }
int nvrtcGetPTXSize(void*, size_t* to) { return *to = 1, 0; }
int nvrtcGetPTX(void*, char* to) { return *to = 0; }
int nvrtcGetProgramLogSize(void*, size_t* to) { return *to = 1, 0; }
int nvrtcGetProgramLog(void*, char* to) { return *to = 0; }
const char* nvrtcGetErrorString(int) { return "an error of the pretended NVRTC"; }
}
