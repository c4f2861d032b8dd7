// Operands in the type that a kernel computes in, and results in the one that is asked for; half
// types go by way of float32.
#pragma once

#include <algorithm>
#include <type_traits>

#include "dtype.h"
#include "fuse_conv_linear.h"
#include "simd_kernels.h"

namespace linfuse {
namespace detail {

// Elements that are converted at a time.
constexpr int64_t kAtATime = 1024;

// Calls convert(first, count) for pieces of [0, count).
template <typename Convert>
void for_each_piece(const ParallelFor& parallel_for, int64_t count, const Convert& convert) {
  for_each(parallel_for, divide_up(count, kAtATime), kAtATime, [&](int64_t piece) {
    const int64_t first = piece * kAtATime;
    convert(first, std::min(kAtATime, count - first));
  });
}

}  // namespace detail

// As they are where T is that type already, and else a copy.
template <typename Wide, typename T>
const Wide* widen(const T* values, int64_t count, const ParallelFor& parallel_for,
                  const Allocate& allocate) {
  if constexpr (std::is_same_v<T, Wide>) {
    return values;
  } else {
    using A = Accumulate<T>;
    const TurnSet<T>& turns = simd_kernels(simd_level());
    Wide* wide = static_cast<Wide*>(allocate(count * static_cast<int64_t>(sizeof(Wide))));
    detail::for_each_piece(parallel_for, count, [&](int64_t first, int64_t some) {
      if constexpr (std::is_same_v<A, Wide>) {
        turns.widen(values + first, some, wide + first);
      } else {
        A piece[detail::kAtATime];
        turns.widen(values + first, some, piece);
        std::copy(piece, piece + some, wide + first);
      }
    });
    return wide;
  }
}

template <typename Wide, typename T>
void narrow(const Wide* wide, int64_t count, const ParallelFor& parallel_for, T* values) {
  using A = Accumulate<T>;
  const TurnSet<T>& turns = simd_kernels(simd_level());
  detail::for_each_piece(parallel_for, count, [&](int64_t first, int64_t some) {
    A piece[detail::kAtATime];
    for (int64_t n = 0; n < some; ++n) piece[n] = static_cast<A>(wide[first + n]);
    turns.narrow(piece, some, values + first);
  });
}

}  // namespace linfuse
