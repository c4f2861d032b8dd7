#include "races.h"

#include <cstdint>
#include <vector>

#include "fiber.h"
#include "memory.h"

namespace cuda_on_cpu {
namespace {

// Phases are counted through all blocks and launches, so that a phase also tells its block.
using Phase = uint32_t;
constexpr Phase kNever = 0;
constexpr Phase kBeforeAll = 1;
constexpr unsigned kSeveral = 0xffff;  // threads

struct Cell {  // of one byte
  Phase written = kNever;
  Phase read = kNever;
  Phase read_by_other_block = kNever;
  uint16_t writer = 0;
  uint16_t reader = 0;
};

struct Watched {
  std::string name;
  uintptr_t begin;
  std::vector<Cell> cells;
};

std::vector<Watched> watched;
Phase launch_start = kBeforeAll + 1;
Phase block_start = kBeforeAll + 1;
Phase now = kBeforeAll + 1;
unsigned thread = 0;
const Fiber* fiber = nullptr;  // null: host code runs

bool from_other_block(Phase phase) { return phase >= launch_start && phase < block_start; }

bool unordered(Phase phase, unsigned other) {
  return from_other_block(phase) || (phase == now && other != thread);
}

std::string thread_text(Phase phase, unsigned other) {
  if (from_other_block(phase)) return "another block";
  return other == kSeveral ? "several threads" : "thread " + std::to_string(other);
}

void report_race(const Watched& memory, size_t byte, const char* access, const std::string& other) {
  report("race on `" + memory.name + "` at byte " + std::to_string(byte) + ": thread " +
         std::to_string(thread) + " " + access + other);
}

void check_read(const Watched& memory, Cell& cell, size_t byte) {
  if (cell.written == kNever) {
    report("uninitialised `" + memory.name + "`: thread " + std::to_string(thread) +
           " reads byte " + std::to_string(byte));
  } else if (unordered(cell.written, cell.writer)) {
    report_race(memory, byte, "reads what was written by ", thread_text(cell.written, cell.writer));
  }
  if (from_other_block(cell.read)) cell.read_by_other_block = cell.read;
  const bool shared = cell.read == now && cell.reader != thread;
  cell.reader = static_cast<uint16_t>(shared ? kSeveral : thread);
  cell.read = now;
}

void check_write(const Watched& memory, Cell& cell, size_t byte) {
  if (unordered(cell.written, cell.writer)) {
    report_race(memory, byte, "writes what was written by ",
                thread_text(cell.written, cell.writer));
  } else if (unordered(cell.read, cell.reader)) {
    report_race(memory, byte, "writes what was read by ", thread_text(cell.read, cell.reader));
  } else if (from_other_block(cell.read_by_other_block)) {
    report_race(memory, byte, "writes what was read by ", "another block");
  }
  cell.written = now;
  cell.writer = static_cast<uint16_t>(thread);
}

template <typename Check>
void access(const void* data, size_t bytes, Check&& check) {
  if (fiber == nullptr || fiber->on_stack(data)) return;
  const auto address = reinterpret_cast<uintptr_t>(data);
  for (Watched& memory : watched) {
    // Unsigned: addresses below count as huge distances.
    if (address - (memory.begin - kOutskirts) >= memory.cells.size() + 2 * kOutskirts) continue;
    for (size_t n = address - memory.begin; n != address - memory.begin + bytes; ++n) {
      if (n < memory.cells.size()) {
        check(memory, memory.cells[n], n);
      } else {
        report("out of bounds of `" + memory.name + "`: thread " + std::to_string(thread) +
               " at byte " + std::to_string(static_cast<int64_t>(n)));
      }
    }
    return;
  }
}

void read(const void* data, size_t bytes) { access(data, bytes, check_read); }
void write(const void* data, size_t bytes) { access(data, bytes, check_write); }

}  // namespace

void watch(const std::string& name, const void* data, size_t bytes, bool initialised) {
  Cell cell;
  if (initialised) cell.written = kBeforeAll;
  watched.push_back({name, reinterpret_cast<uintptr_t>(data), std::vector<Cell>(bytes, cell)});
}

void unwatch(const void* data) {
  for (size_t n = 0; n < watched.size(); ++n) {
    if (watched[n].begin != reinterpret_cast<uintptr_t>(data)) continue;
    watched.erase(watched.begin() + static_cast<std::ptrdiff_t>(n));
    return;
  }
}

void start_launch() { launch_start = now + 1; }
void start_block() { block_start = now + 1; }
void start_phase() { ++now; }

void start_thread(unsigned number, const Fiber* stack) {
  thread = number;
  fiber = stack;
}

void stop_thread() { fiber = nullptr; }

}  // namespace cuda_on_cpu

// What the compiler calls under -fsanitize=thread, by name and meaning as in LLVM's
// tsan_interface.h.
extern "C" {
#define CUDA_ON_CPU_HOOKS(size)                                                   \
  void __tsan_read##size(void* data) { cuda_on_cpu::read(data, size); }           \
  void __tsan_write##size(void* data) { cuda_on_cpu::write(data, size); }         \
  void __tsan_unaligned_read##size(void* data) { cuda_on_cpu::read(data, size); } \
  void __tsan_unaligned_write##size(void* data) { cuda_on_cpu::write(data, size); }
CUDA_ON_CPU_HOOKS(1)
CUDA_ON_CPU_HOOKS(2)
CUDA_ON_CPU_HOOKS(4)
CUDA_ON_CPU_HOOKS(8)
CUDA_ON_CPU_HOOKS(16)
#undef CUDA_ON_CPU_HOOKS
void __tsan_read_range(void* data, unsigned long bytes) { cuda_on_cpu::read(data, bytes); }
void __tsan_write_range(void* data, unsigned long bytes) { cuda_on_cpu::write(data, bytes); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
