// A race detector for the memory it is told to watch.
//
// Two accesses to a byte race if one of them writes and nothing orders them: they come from two
// blocks of a launch, or from two threads of a block with no barrier in between. Kernels compiled
// with -fsanitize=thread report their accesses to us instead of to ThreadSanitizer's runtime, which is
// not linked. Since order is judged and not observed, one run finds a race under any schedule.
#pragma once

#include <cstddef>
#include <string>

namespace cuda_on_cpu {

class Fiber;

// Fails the launch that runs; the first report counts.
void report(const std::string& what);

void watch(const char* name, const void* data, size_t bytes, bool initialised);
void unwatch(const void* data);

// Where the run is. A phase is the time between two barriers of a block.
void start_launch();
void start_block();
void start_phase();
void start_thread(unsigned thread, const Fiber* fiber);
void stop_thread();

}  // namespace cuda_on_cpu
