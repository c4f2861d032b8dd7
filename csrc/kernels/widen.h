// Operands in the type that a kernel computes in.
#pragma once

#include <type_traits>

#include "dtype.h"
#include "fuse_conv_linear.h"

namespace linfuse {

// As they are where T is that type already, and else a copy; half types go by way of float32.
template <typename Wide, typename T>
const Wide* widen(const T* values, int64_t count, const ParallelFor& parallel_for,
                  const Allocate& allocate) {
  if constexpr (std::is_same_v<T, Wide>) {
    return values;
  } else {
    Wide* wide = static_cast<Wide*>(allocate(count * static_cast<int64_t>(sizeof(Wide))));
    for_each(parallel_for, count, 1, [&](int64_t n) {
      wide[n] = static_cast<Wide>(static_cast<Accumulate<T>>(values[n]));
    });
    return wide;
  }
}

}  // namespace linfuse
