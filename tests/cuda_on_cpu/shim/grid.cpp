// Runs a grid block by block, the threads of a block as fibers that yield at barriers.
#include "grid.h"

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"
#include "memory.h"
#include "races.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace cuda_on_cpu {
namespace {

constexpr unsigned kMostThreads = 1024;
constexpr int kMultiprocessors = 3;
constexpr size_t kMostSharedBytes = 48 * 1024;  // of variables; more needs dynamic shared memory

Schedule schedule;
std::mt19937_64 shuffler;
cudaError_t last_error = cudaSuccess;
std::string failure;
std::string place;  // the kernel and block that run

struct Thread {
  Fiber fiber;
  int barrier = 0;  // the line it waits at
};

std::vector<std::unique_ptr<Thread>> threads;
Thread* running = nullptr;

// Of two phases: threads ask for the vote of the last while others vote in this one.
bool votes[2];
unsigned phase = 0;

std::map<const void*, Memory> shared_variables;  // of the running block, by their declaration
std::map<const void*, size_t> allowed_shared;    // by kernel
size_t shared_bytes = 0;                         // dynamic ones of the running launch
const char dynamic_key = 0;                      // its address stands for them

// A permutation of 0 .. count - 1 for the next round.
const std::vector<unsigned>& next_order(unsigned count, std::vector<unsigned>* order) {
  if (order->size() != count) {
    order->resize(count);
    std::iota(order->begin(), order->end(), 0u);
    if (schedule.order == Order::kReverse) std::reverse(order->begin(), order->end());
  }
  if (schedule.order == Order::kShuffle) std::shuffle(order->begin(), order->end(), shuffler);
  return *order;
}

uint3 unravel(unsigned index, const dim3& size) {
  return {index % size.x, index / size.x % size.y, index / size.x / size.y};
}

std::string whereabouts(unsigned thread) {
  const int line = threads[thread]->barrier;
  return "thread " + std::to_string(thread) +
         (line == 0 ? " has ended" : " waits at the barrier of line " + std::to_string(line));
}

// Returns whether all threads wait at one barrier; reports if some do and others do not.
bool all_wait(unsigned count) {
  const int line = threads[0]->barrier;
  for (unsigned n = 1; n < count; ++n) {
    if (threads[n]->barrier == line) continue;
    report("divergent barrier: " + whereabouts(0) + ", " + whereabouts(n));
    return false;
  }
  return line != 0;
}

void run_block(unsigned count, const std::function<void()>& body, std::vector<unsigned>* order) {
  start_block();
  for (unsigned n = 0; n < count; ++n) threads[n]->fiber.restart();
  do {
    start_phase();
    votes[++phase % 2] = false;
    for (unsigned n : next_order(count, order)) {
      running = threads[n].get();
      running->barrier = 0;
      threadIdx = unravel(n, blockDim);
      start_thread(n, &running->fiber);
      running->fiber.resume(body);
      stop_thread();
    }
  } while (all_wait(count));
  // Threads left behind at a barrier are in the midst of a kernel: they cannot take another one.
  for (unsigned n = 0; n < count; ++n) {
    if (!threads[n]->fiber.ended()) threads[n] = std::make_unique<Thread>();
  }
  shared_variables.clear();
}

}  // namespace

void set_schedule(const Schedule& chosen) {
  schedule = chosen;
  shuffler.seed(chosen.seed);
}

void report(const std::string& what) {
  if (last_error == cudaSuccess) failure = what + " (" + place + ")";
  last_error = cudaErrorLaunchFailure;
}

LaunchConfig::LaunchConfig(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t)
    : grid(grid), block(block), shared_bytes(shared_bytes) {}

cudaError_t allow_shared(const void* key, int bytes) {
  if (bytes < 0 || bytes > schedule.shared_bytes) return last_error = cudaErrorInvalidValue;
  allowed_shared[key] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

void run_grid(const char* kernel, const void* key, const LaunchConfig& config,
              const std::function<void()>& body) {
  const uint64_t blocks = uint64_t{config.grid.x} * config.grid.y * config.grid.z;
  const uint64_t count = uint64_t{config.block.x} * config.block.y * config.block.z;
  shared_bytes = config.shared_bytes;
  const auto allowed = allowed_shared.find(key);
  const size_t most_shared = allowed == allowed_shared.end() ? kMostSharedBytes : allowed->second;
  if (blocks == 0 || count == 0 || count > kMostThreads || shared_bytes > most_shared) {
    if (last_error == cudaSuccess) last_error = cudaErrorInvalidConfiguration;
    return;
  }
  gridDim = config.grid;
  blockDim = config.block;
  if (schedule.most_blocks != 0) gridDim.x = std::min(gridDim.x, schedule.most_blocks);
  while (threads.size() < count) threads.push_back(std::make_unique<Thread>());

  start_launch();
  std::vector<unsigned> block_order;
  std::vector<unsigned> thread_order;
  for (unsigned block : next_order(gridDim.x * gridDim.y * gridDim.z, &block_order)) {
    blockIdx = unravel(block, gridDim);
    place = std::string(kernel) + ", block " + std::to_string(block);
    run_block(static_cast<unsigned>(count), body, &thread_order);
    if (last_error != cudaSuccess) break;
  }
}

void* shared_memory(const void* key, const char* name, size_t bytes, size_t alignment) {
  const auto [entry, made] = shared_variables.try_emplace(key, name, bytes, alignment);
  if (made) {
    size_t total = 0;
    for (const auto& [other_key, variable] : shared_variables) {
      if (other_key != &dynamic_key) total += variable.bytes();
    }
    if (total > kMostSharedBytes) report("more than 48 KB of shared variables");
    if (total + shared_bytes > static_cast<size_t>(schedule.shared_bytes))
      report("more shared memory than a block may have");
  }
  return entry->second.data();
}

void* dynamic_shared_memory(const char* name, size_t alignment) {
  return shared_memory(&dynamic_key, name, shared_bytes, alignment);
}

}  // namespace cuda_on_cpu

void __syncthreads(int line) {
  using namespace cuda_on_cpu;
  if (line == schedule.without_barrier) return;
  running->barrier = line;
  running->fiber.yield();
}

int __syncthreads_or(int predicate, int line) {
  bool& vote = cuda_on_cpu::votes[cuda_on_cpu::phase % 2];
  vote = vote || predicate != 0;
  __syncthreads(line);
  return vote;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

int cuda_on_cpu::ptx_version() { return 10 * schedule.capability; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  using namespace cuda_on_cpu;
  *value = attribute == cudaDevAttrMultiProcessorCount ? kMultiprocessors : schedule.shared_bytes;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_on_cpu::last_error;
  cuda_on_cpu::last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorLaunchFailure:
      break;
  }
  return cuda_on_cpu::failure.c_str();
}
