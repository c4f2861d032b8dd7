// Memory of a card or of a block: watched, poisoned, and aligned to no more than was asked for.
#pragma once

#include <cstddef>
#include <string>

namespace cuda_on_cpu {

// Room on both sides of a block of memory, where who goes astray does no harm and is reported.
// AddressSanitizer has such room of its own, and wants the end to be exact.
#if defined(CUDA_ON_CPU_ASAN)
constexpr size_t kOutskirts = 0;
#else
constexpr size_t kOutskirts = size_t{1} << 15;
#endif

class Memory {
 public:
  // A copy of `contents`; without them, bytes that make a NaN of every element type.
  Memory(const std::string& name, size_t bytes, size_t alignment, const void* contents = nullptr);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* data() { return data_; }
  size_t bytes() const { return bytes_; }
  void copy_to(void* host) const;

 private:
  size_t bytes_;
  size_t alignment_;
  char* storage_;
  char* data_;
};

}  // namespace cuda_on_cpu
