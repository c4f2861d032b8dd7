// The part of the CUDA runtime that launchers and their callers see, for a machine without CUDA.
#pragma once

#include <cstddef>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

using cudaStream_t = struct CUstream_st*;  // launches run at once, in the order they are made

// Returns the first error since the last call, and forgets it.
cudaError_t cudaGetLastError();

// For cudaErrorLaunchFailure it says what happened: a race, a barrier that not all threads reach.
const char* cudaGetErrorString(cudaError_t error);
