// The elements of one row of the matrix, as every layout writes them: value and position.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

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

// The output position of the next row; after the last comes the first again.
inline void advance(const Geometry& g, Position& o) {
  for (int a = kAxes - 1; a >= 0; --a) {
    if (++o.at[a] < g.axis[a].out) return;
    o.at[a] = 0;
  }
}

// Goes through rows [begin, end) of the matrix. Calls visit(weight, col, o): where the weights of
// the row's output channel begin, the column of its group's first element, and its output position.
template <typename Visitor>
void visit_rows(const Geometry& g, int64_t begin, int64_t end, const Visitor& visit) {
  const int64_t out_positions = g.out_positions();
  Position o = out_position(g, begin % out_positions);
  int64_t row = begin;
  for (int64_t c_out = begin / out_positions; row < end; ++c_out) {
    const int64_t weight = g.weight_index(c_out, 0);
    const int64_t col = g.column(c_out, 0, Position{});
    const int64_t stop = end < (c_out + 1) * out_positions ? end : (c_out + 1) * out_positions;
    for (; row < stop; ++row, advance(g, o)) visit(weight, col, o);
  }
}

// Neighbours on the innermost axis that read neighbouring kernel elements, so that they can be
// copied together; or one element that several taps meet in.
struct TapRun {
  const TapGroup* first;
  int64_t kernel;
  int64_t length;
  bool summed;
};

// The runs of output position o of the innermost axis, by ascending input position.
inline void list_runs(const RowTaps& taps, int64_t o, std::vector<TapRun>& runs) {
  runs.clear();
  const TapGroup* const end = taps.end(2, o);
  for (const TapGroup* group = taps.begin(2, o); group != end; ++group) {
    const int64_t k = taps.kernel[2][group->first];
    const bool summed = group->last - group->first > 1;
    if (!runs.empty() && !summed && !runs.back().summed) {
      TapRun& run = runs.back();
      if (group->position == run.first->position + run.length && k == run.kernel + run.length) {
        ++run.length;
        continue;
      }
    }
    runs.push_back({group, k, 1, summed});
  }
}

// Goes through the elements that the row of o has in every input channel of its group, by ascending
// input position. Calls copy(position, k, length) where `length` neighbours from `position` on are
// the kernel elements from k on, and sum(position, group0, group1, group2) where one is a sum.
// `runs` are those of o.
template <typename Copy, typename Sum>
void visit_runs(const Geometry& g, const RowTaps& taps, const std::vector<TapRun>& runs,
                const Position& o, const Copy& copy, const Sum& sum) {
  const TapGroup* const end0 = taps.end(0, o.at[0]);
  const TapGroup* const end1 = taps.end(1, o.at[1]);
  for (const TapGroup* group0 = taps.begin(0, o.at[0]); group0 != end0; ++group0) {
    for (const TapGroup* group1 = taps.begin(1, o.at[1]); group1 != end1; ++group1) {
      const int64_t line = (group0->position * g.axis[1].in + group1->position) * g.axis[2].in;
      const int64_t kernel_line =
          (taps.kernel[0][group0->first] * g.axis[1].kernel + taps.kernel[1][group1->first]) *
          g.axis[2].kernel;
      const bool summed = group0->last - group0->first > 1 || group1->last - group1->first > 1;
      for (const TapRun& run : runs) {
        if (!summed && !run.summed) {
          copy(line + run.first->position, kernel_line + run.kernel, run.length);
          continue;
        }
        for (int64_t n = 0; n < run.length; ++n) {
          const TapGroup& group2 = run.first[n];
          sum(line + group2.position, *group0, *group1, group2);
        }
      }
    }
  }
}

namespace detail {

template <size_t kLength, typename T>
void copy_short(T* to, int64_t to_step, const T* from, int64_t from_step, int64_t times) {
  for (; times > 0; --times, to += to_step, from += from_step) {
    std::memcpy(static_cast<void*>(to), from, kLength * sizeof(T));
  }
}

}  // namespace detail

// Copies `length` elements `times` times, from one place to the next by the two steps. Most kernels
// are short, and a copy of known length is a few instructions.
template <typename T>
void copy_stepped(T* to, int64_t to_step, const T* from, int64_t from_step, int64_t times,
                  int64_t length) {
  switch (length) {
    case 1:
      return detail::copy_short<1>(to, to_step, from, from_step, times);
    case 2:
      return detail::copy_short<2>(to, to_step, from, from_step, times);
    case 3:
      return detail::copy_short<3>(to, to_step, from, from_step, times);
    case 4:
      return detail::copy_short<4>(to, to_step, from, from_step, times);
    case 5:
      return detail::copy_short<5>(to, to_step, from, from_step, times);
    case 6:
      return detail::copy_short<6>(to, to_step, from, from_step, times);
    case 7:
      return detail::copy_short<7>(to, to_step, from, from_step, times);
  }
  for (; times > 0; --times, to += to_step, from += from_step) {
    std::memcpy(static_cast<void*>(to), from, static_cast<size_t>(length) * sizeof(T));
  }
}

}  // namespace linfuse
