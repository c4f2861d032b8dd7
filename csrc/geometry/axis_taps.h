// The taps of one axis, listed once per call so that no kernel loop divides or tests for padding.
//
// Seen from a row, taps_by_row(g, a) lists for every o the input positions i that it reads; seen
// from a column, taps_by_column(g, a) lists for every i the output positions o that read it. Taps
// that meet in one pair (o, i), as circular, reflect and replicate padding make them, form one
// group. The taps of a convolution are the Cartesian product of the taps of its axes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "geometry.h"

namespace linfuse {

struct TapGroup {
  int64_t position;  // on the other side of the map
  int64_t first;     // kernel elements AxisTaps::kernel[first .. last)
  int64_t last;
};

struct AxisTaps {
  std::vector<int64_t> start;    // groups[start[p] .. start[p + 1]) belong to position p
  std::vector<TapGroup> groups;  // ascending position within each p
  std::vector<int64_t> kernel;   // ascending within each group

  const TapGroup* begin(int64_t p) const { return groups.data() + start[static_cast<size_t>(p)]; }
  const TapGroup* end(int64_t p) const { return groups.data() + start[static_cast<size_t>(p) + 1]; }

  int64_t most_taps() const {
    int64_t most = 0;
    for (size_t p = 0; p + 1 < start.size(); ++p) {
      int64_t taps = 0;
      for (int64_t n = start[p]; n < start[p + 1]; ++n) {
        taps += groups[static_cast<size_t>(n)].last - groups[static_cast<size_t>(n)].first;
      }
      most = std::max(most, taps);
    }
    return most;
  }
};

namespace detail {

struct Tap {
  int64_t from;
  int64_t to;
  int64_t k;
};

inline AxisTaps list_taps(const Geometry& g, int a, bool from_coarse) {
  std::vector<Tap> taps;
  for (int64_t coarse = 0; coarse < g.coarse_size(a); ++coarse) {
    for (int64_t k = 0; k < g.axis[a].kernel; ++k) {
      const int64_t fine = g.fine_position(a, coarse, k);
      if (fine < 0) continue;
      taps.push_back(from_coarse ? Tap{coarse, fine, k} : Tap{fine, coarse, k});
    }
  }
  std::sort(taps.begin(), taps.end(), [](const Tap& left, const Tap& right) {
    if (left.from != right.from) return left.from < right.from;
    if (left.to != right.to) return left.to < right.to;
    return left.k < right.k;
  });

  AxisTaps table;
  const int64_t positions = from_coarse ? g.coarse_size(a) : g.fine_size(a);
  table.start.reserve(static_cast<size_t>(positions) + 1);
  table.kernel.reserve(taps.size());
  size_t n = 0;
  for (int64_t p = 0; p < positions; ++p) {
    table.start.push_back(static_cast<int64_t>(table.groups.size()));
    for (; n < taps.size() && taps[n].from == p; ++n) {
      const bool first_of_p = static_cast<int64_t>(table.groups.size()) == table.start.back();
      if (first_of_p || table.groups.back().position != taps[n].to) {
        const int64_t next = static_cast<int64_t>(table.kernel.size());
        table.groups.push_back({taps[n].to, next, next});
      }
      table.kernel.push_back(taps[n].k);
      ++table.groups.back().last;
    }
  }
  table.start.push_back(static_cast<int64_t>(table.groups.size()));
  return table;
}

}  // namespace detail

inline AxisTaps taps_by_row(const Geometry& g, int a) {
  return detail::list_taps(g, a, /*from_coarse=*/!g.transposed);
}

inline AxisTaps taps_by_column(const Geometry& g, int a) {
  return detail::list_taps(g, a, /*from_coarse=*/g.transposed);
}

}  // namespace linfuse
