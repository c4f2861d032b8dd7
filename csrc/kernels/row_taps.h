// The elements of one row of the matrix, as every layout writes them: value and position.
#pragma once

#include <cstdint>

#include "../geometry/stored_taps.h"
#include "dtype.h"

namespace linfuse {

// The value that ties one output to one input position: all taps of a group on each axis, summed in
// Accumulate<T> and rounded once. `kernel` is the kernel of one pair of channels.
template <typename T>
LINFUSE_HD T sum_of_taps(const Geometry& g, const RowTaps& taps, const T* kernel,
                         const TapGroup& group0, const TapGroup& group1, const TapGroup& group2) {
  Accumulate<T> total = 0;
  for (int64_t n0 = group0.first; n0 < group0.last; ++n0) {
    for (int64_t n1 = group1.first; n1 < group1.last; ++n1) {
      const T* line =
          kernel + (taps.kernel[0][n0] * g.axis[1].kernel + taps.kernel[1][n1]) * g.axis[2].kernel;
      for (int64_t n2 = group2.first; n2 < group2.last; ++n2) {
        total += static_cast<Accumulate<T>>(line[taps.kernel[2][n2]]);
      }
    }
  }
  return static_cast<T>(total);
}

// Calls visit(position, value) for every element of the row of o in one input channel, by ascending
// input position.
template <typename T, typename Visitor>
void visit_plane(const Geometry& g, const RowTaps& taps, const T* kernel, const Position& o,
                 Visitor&& visit) {
  const TapGroup* const end0 = taps.end(0, o.at[0]);
  const TapGroup* const end1 = taps.end(1, o.at[1]);
  const TapGroup* const end2 = taps.end(2, o.at[2]);
  for (const TapGroup* group0 = taps.begin(0, o.at[0]); group0 != end0; ++group0) {
    for (const TapGroup* group1 = taps.begin(1, o.at[1]); group1 != end1; ++group1) {
      const int64_t line = (group0->position * g.axis[1].in + group1->position) * g.axis[2].in;
      const T* kernel_line = kernel + (taps.kernel[0][group0->first] * g.axis[1].kernel +
                                       taps.kernel[1][group1->first]) *
                                          g.axis[2].kernel;
      const bool outer_single =
          group0->last - group0->first == 1 && group1->last - group1->first == 1;
      for (const TapGroup* group2 = taps.begin(2, o.at[2]); group2 != end2; ++group2) {
        const bool single = outer_single && group2->last - group2->first == 1;
        visit(line + group2->position,
              single ? kernel_line[taps.kernel[2][group2->first]]
                     : sum_of_taps(g, taps, kernel, *group0, *group1, *group2));
      }
    }
  }
}

}  // namespace linfuse
