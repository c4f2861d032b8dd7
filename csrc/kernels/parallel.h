// How a kernel asks for threads without knowing who runs them: the caller passes torch's pool, so
// that torch.set_num_threads is obeyed, and a test may pass a plain loop.
#pragma once

#include <cstdint>
#include <functional>

namespace linfuse {

// Calls body(begin, end) on disjoint ranges that cover [0, count); at least `grain` items a call.
using ParallelFor = std::function<void(int64_t count, int64_t grain,
                                       const std::function<void(int64_t, int64_t)>& body)>;

// Items per call that make a call worth a thread: about 32K multiply-adds or copied elements.
inline int64_t grain_for(int64_t work_per_item) {
  constexpr int64_t kWorth = int64_t{1} << 15;
  return work_per_item >= kWorth ? 1 : kWorth / (work_per_item > 0 ? work_per_item : 1);
}

// Calls visit(n) for every n of [0, count), on as many threads as that much work deserves.
template <typename Visitor>
void for_each(const ParallelFor& parallel_for, int64_t count, int64_t work_per_item,
              const Visitor& visit) {
  parallel_for(count, grain_for(work_per_item), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) visit(n);
  });
}

}  // namespace linfuse
