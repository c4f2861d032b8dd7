// What a test can choose about a launch.
#pragma once

#include <cstdint>

namespace cuda_on_cpu {

enum class Order : int { kForward, kReverse, kShuffle };

// CUDA promises no order of threads between barriers, and none of blocks: any of these must do.
struct Schedule {
  Order order = Order::kForward;
  uint64_t seed = 0;             // of kShuffle, which draws a new order after every barrier
  unsigned most_blocks = 0;      // caps the grid, so that its loops turn on small sizes; 0: no cap
  int without_barrier = 0;       // a line whose __syncthreads() does nothing; 0: none
  int capability = 8;            // of the card that there seems to be, the major one
  int shared_bytes = 99 * 1024;  // what a block of it may ask for: the least with tensor cores
};

void set_schedule(const Schedule& schedule);

}  // namespace cuda_on_cpu
