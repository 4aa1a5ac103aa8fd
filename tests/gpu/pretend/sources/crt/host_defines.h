/* What the headers of the CUDA runtime ask of the compiler. The wheels lack this one file of a
   toolkit, and a program for the host needs no more of it than this. A real one is found first. */
#ifndef PRETEND_HOST_DEFINES_H
#define PRETEND_HOST_DEFINES_H

#define __host__
#define __device__
#define __global__
#define __shared__
#define __constant__
#define __managed__
#define __forceinline__ inline
#define __cudart_builtin__
#define __device_builtin__
#define __device_builtin_surface_type__
#define __device_builtin_texture_type__
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define CUDARTAPI
#define CUDARTAPI_CDECL

#endif
