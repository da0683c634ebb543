// What a kernel sees of the machine: CUDA under nvcc, an emulator of it under g++.
#pragma once
#if defined(DK_EMULATED)
#include "emulator.h"
#define __grid_constant__

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
#else
#include <cuda_runtime.h>
#define DK_SHARED(type, name, count) __shared__ type name[count]
#define DK_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define DK_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#endif

#if defined(__CUDACC__) || defined(DK_EMULATED)

namespace dicekernels {
namespace cuda {

// 16 bytes from global to shared memory by way of no register; visible to this thread after
// copy_async_wait, to others after a barrier.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
#if defined(DK_EMULATED)
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#else
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#endif
}
__device__ __forceinline__ void copy_async_wait() {
#if !defined(DK_EMULATED)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace cuda
}  // namespace dicekernels

#endif
