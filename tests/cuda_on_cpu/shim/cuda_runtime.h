// The CUDA C++ dialect as plain C++. What no header can express, prepare.py rewrites:
//
//   kernel<<<grid, block>>>(n)   ->  cuda_on_cpu::launch("kernel", kernel, LaunchConfig(...), n)
//   __shared__ float sums[128];  ->  auto& sums = cuda_on_cpu::shared<float[128], 0>("sums");
//   extern __shared__ float a[]; ->  auto* a = cuda_on_cpu::dynamic_shared<float>("a");
//
// __CUDACC__ stays undefined: that macro promises a CUDA compiler, and this is none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

// The call's own line tells barriers apart: threads that wait at different ones have diverged.
void __syncthreads(int line = __builtin_LINE());

// A barrier that returns whether any thread of the block came with a predicate other than 0.
int __syncthreads_or(int predicate, int line = __builtin_LINE());

// The place of the lowest bit that is set, counted from 1; 0 where there is none.
inline int __ffs(int bits) { return __builtin_ffs(bits); }

namespace cuda_on_cpu {

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;

  LaunchConfig(dim3 grid, dim3 block, size_t shared_bytes = 0, cudaStream_t stream = nullptr);
};

// Runs `thread` once per thread of the grid. `key` stands for the kernel.
void run_grid(const char* kernel, const void* key, const LaunchConfig& config,
              const std::function<void()>& thread);

// Lets a kernel have so much dynamic shared memory; without this it is 48 KB.
cudaError_t allow_shared(const void* key, int bytes);

// What kernels were compiled for.
int ptx_version();

template <typename T>
struct Same {
  using type = T;
};

// Parameters are deduced from the kernel alone, so that arguments convert to them as in CUDA.
template <typename... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchConfig& config,
            typename Same<Parameters>::type... arguments) {
  run_grid(name, reinterpret_cast<const void*>(kernel), config, [&] { kernel(arguments...); });
}

// The running block's memory for one variable, made and poisoned when its first thread asks.
void* shared_memory(const void* key, const char* name, size_t bytes, size_t alignment);

template <typename T, int kDeclaration>
T& shared(const char* name, size_t alignment = alignof(T)) {
  static char key;  // its address stands for the declaration
  return *static_cast<T*>(shared_memory(&key, name, sizeof(T), alignment));
}

// The running block's dynamic shared memory.
void* dynamic_shared_memory(const char* name, size_t alignment);

template <typename T>
T* dynamic_shared(const char* name, size_t alignment = alignof(T)) {
  return static_cast<T*>(dynamic_shared_memory(name, alignment));
}

}  // namespace cuda_on_cpu

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  return cuda_on_cpu::allow_shared(reinterpret_cast<const void*>(kernel), value);
}

struct cudaFuncAttributes {
  int ptxVersion;
};

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = cuda_on_cpu::ptx_version();
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
