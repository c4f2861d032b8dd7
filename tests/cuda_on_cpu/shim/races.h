// Judges every access of a kernel to the memory that is watched: races, reads of what nobody wrote,
// and accesses next to the memory.
//
// Two accesses to a byte race if one of them writes and nothing orders them: they come from two
// blocks of a launch, or from two threads of a block with no barrier in between. Order is judged
// and not observed, so that one run finds a race under any schedule.
// Kernels that are compiled with -fsanitize=thread report their accesses to us: ThreadSanitizer's
// own runtime is not linked.
#pragma once

#include <cstddef>
#include <string>

namespace cuda_on_cpu {

class Fiber;

// Fails the launch that runs; the first report counts.
void report(const std::string& what);

// Up to kOutskirts bytes on both sides must be there, and count as out of bounds.
void watch(const std::string& name, const void* data, size_t bytes, bool initialised);
void unwatch(const void* data);

// Where the run is. A phase is the time between two barriers of a block.
void start_launch();
void start_block();
void start_phase();
void start_thread(unsigned thread, const Fiber* fiber);
void stop_thread();

}  // namespace cuda_on_cpu
