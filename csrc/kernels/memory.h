// Fresh pages are the cost of a large output: the kernel hands them out and clears them one by one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "parallel.h"

namespace linfuse {

// Large enough that an allocator asks the system for it, and that the system's ways pay.
constexpr int64_t kLargeBlock = int64_t{1} << 23;

namespace detail {

constexpr int64_t kHugePage = int64_t{1} << 21;

struct Bytes {
  char* first;
  char* last;

  int64_t size() const { return last - first; }
};

// The huge pages that lie wholly within a block.
inline Bytes huge_pages_within(Bytes block) {
  const auto past = [](const char* at) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(at) % uintptr_t{kHugePage});
  };
  const int64_t low = (kHugePage - past(block.first)) % kHugePage;
  const int64_t high = past(block.last);
  if (low + high >= block.size()) return {block.first, block.first};
  return {block.first + low, block.last - high};
}

// Makes pages read as zeros for nothing where that is to be had: in memory that nobody has touched
// since the system gave it. False leaves them to be cleared.
//
// MADV_DONTNEED is what makes them zeros, whatever they held. Linux promises so for private
// anonymous memory, and MADV_FREE fails for any other. Pages that are there already are kept:
// clearing them costs less than new ones.
inline bool read_as_zeros(Bytes pages) {
#if defined(__linux__) && defined(MADV_FREE) && defined(MADV_DONTNEED)
  constexpr int64_t kAtOnce = 1024;
  const int64_t page = sysconf(_SC_PAGESIZE);
  unsigned char there[kAtOnce];
  for (char* at = pages.first; at < pages.last;) {
    const int64_t bytes = std::min(kAtOnce * page, pages.last - at);
    if (mincore(at, static_cast<size_t>(bytes), there) != 0) return false;
    for (int64_t n = 0; n < bytes / page; ++n) {
      if ((there[n] & 1) != 0) return false;
    }
    at += bytes;
  }
  const auto bytes = static_cast<size_t>(pages.size());
  return madvise(pages.first, bytes, MADV_FREE) == 0 &&
         madvise(pages.first, bytes, MADV_DONTNEED) == 0;
#else
  (void)pages;
  return false;
#endif
}

// Gets the pages in one call and not at the first write to each. Without this, zeros that are never
// written would have no memory yet, and a caller who asked for it could run out of it later.
inline void populate(Bytes pages) {
#if defined(__linux__)
  // MADV_POPULATE_WRITE, which older headers lack; Linux before 5.14 leaves all to the writes.
  constexpr int kPopulateWrite = 23;
  (void)madvise(pages.first, static_cast<size_t>(pages.size()), kPopulateWrite);
#else
  (void)pages;
#endif
}

}  // namespace detail

// Asks for huge pages under a large block that is about to be written for the first time. Only
// advice: where the system declines, nothing but time is lost.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kLargeBlock) return;
  char* const first = static_cast<char*>(data);
  const detail::Bytes pages = detail::huge_pages_within({first, first + bytes});
  (void)madvise(pages.first, static_cast<size_t>(pages.size()), MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

// The same for a result. From some size on it is of small pages: a virtual machine gives the memory
// of free huge pages back to its host, and then one takes 3 to 9 ms in place of a quarter of one;
// as much in small pages, which it keeps, takes about one. The more pages, the likelier are dear
// ones.
inline void advise_result(void* data, int64_t bytes) {
  constexpr int64_t kManyPages = int64_t{1} << 27;
  if (bytes < kManyPages) advise_huge_pages(data, bytes);
}

// Gets the pages of a large block ahead of writers who will not go through it in order: what the
// system clears is then out of the caches when they come.
inline void populate(const ParallelFor& parallel_for, void* data, int64_t bytes) {
  char* const first = static_cast<char*>(data);
  const detail::Bytes pages = detail::huge_pages_within({first, first + bytes});
  parallel_for(pages.size() / detail::kHugePage, 1, [&](int64_t begin, int64_t end) {
    detail::populate(
        {pages.first + begin * detail::kHugePage, pages.first + end * detail::kHugePage});
  });
}

// Clears a block piece by piece, just ahead of a writer who goes through it in ascending order.
class ClearedAhead {
 public:
  // Little enough that what is written next goes to lines still on their way to memory.
  static constexpr int64_t kPieceBytes = int64_t{1} << 13;

  ClearedAhead(void* first, void* last)
      : left_{static_cast<char*>(first), static_cast<char*>(last)}, zeros_{left_.last, left_.last} {
    if (left_.size() < kLargeBlock) return;
    const detail::Bytes pages = detail::huge_pages_within(left_);
    if (pages.size() > 0 && detail::read_as_zeros(pages)) zeros_ = pages;
  }

  // Clears up to here at least.
  void until(const void* to) {
    while (left_.first < to) {
      if (left_.first == zeros_.first && zeros_.size() > 0) {
        const detail::Bytes page = {zeros_.first, zeros_.first + detail::kHugePage};
        detail::populate(page);
        left_.first = zeros_.first = page.last;
        continue;
      }
      const int64_t to_clear =
          (left_.first < zeros_.first ? zeros_.first : left_.last) - left_.first;
      const int64_t piece = std::min(kPieceBytes, to_clear);
      std::memset(left_.first, 0, static_cast<size_t>(piece));
      left_.first += piece;
    }
  }

 private:
  detail::Bytes left_;   // not cleared yet
  detail::Bytes zeros_;  // the part of it that needs no clearing, in huge pages
};

}  // namespace linfuse
