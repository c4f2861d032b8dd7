// Fresh pages are the cost of a large output: the kernel hands them out and clears them one by one.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace linfuse {

// Asks for huge pages under a large block that is about to be written for the first time. Only
// advice: where the system declines, nothing but time is lost.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kHugePage = int64_t{1} << 21;
  constexpr int64_t kWorthAsking = int64_t{1} << 23;
  if (bytes < kWorthAsking) return;
  const auto start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + kHugePage - 1) & ~static_cast<uintptr_t>(kHugePage - 1);
  const uintptr_t last =
      (start + static_cast<uintptr_t>(bytes)) & ~static_cast<uintptr_t>(kHugePage - 1);
  if (last > first) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace linfuse
