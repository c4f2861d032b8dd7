// What a test can choose about a launch, and learn from it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace cuda_on_cpu {

enum class Order : int { kForward, kReverse, kShuffle };

// CUDA promises no order of threads between barriers, and none of blocks: any of these must do.
struct Schedule {
  Order order = Order::kForward;
  uint64_t seed = 0;         // of kShuffle; every barrier draws a new order
  unsigned most_blocks = 0;  // caps the grid, so that few items make a grid-stride loop turn; 0: no cap
  int without_barrier = 0;   // a line whose __syncthreads() does nothing; 0: none
};

void set_schedule(const Schedule& schedule);

// Memory of a card: exactly to size, known to the race detector, and filled with a byte that makes
// a NaN of every element type unless there is something to copy.
class DeviceBuffer {
 public:
  DeviceBuffer(const char* name, size_t bytes, const void* contents = nullptr);
  ~DeviceBuffer();
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  void* data() { return data_.get(); }
  void copy_to(void* host) const;

 private:
  size_t bytes_;
  std::unique_ptr<unsigned char[]> data_;
};

}  // namespace cuda_on_cpu
