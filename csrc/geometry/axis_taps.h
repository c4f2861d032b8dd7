// The taps of an axis, listed so that no kernel loop divides or tests for padding.
//
// Seen from a row, the taps of an output position are the input positions that it reads; seen from
// a column, those of an input position are the output positions that read it. Taps that meet in one
// pair (o, i), as circular, reflect and replicate padding make them, form one group. The taps of a
// convolution are the Cartesian product of the taps of its axes.
//
// PositionTaps lists one position, and costs as much time and memory as it has taps; AxisTaps lists
// a range of them at once.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "geometry.h"

namespace linfuse {

struct TapGroup {
  int64_t position;  // on the other side of the map
  int64_t first;     // kernel elements kernel[first .. last) of the list
  int64_t last;
};

class PositionTaps {
 public:
  std::vector<TapGroup> groups;  // ascending position
  std::vector<int64_t> kernel;   // ascending within each group

  PositionTaps() {
    constexpr size_t kFew = 8;
    groups.reserve(kFew);
    kernel.reserve(kFew);
    taps_.reserve(kFew);
  }

  void list_by_row(const Geometry& g, int a, int64_t o) {
    g.transposed ? list_from_fine(g, a, o) : list_from_coarse(g, a, o);
  }
  void list_by_column(const Geometry& g, int a, int64_t i) {
    g.transposed ? list_from_coarse(g, a, i) : list_from_fine(g, a, i);
  }

 private:
  struct Tap {
    int64_t to;
    int64_t k;
    bool operator<(const Tap& other) const { return to != other.to ? to < other.to : k < other.k; }
  };

  void list_from_coarse(const Geometry& g, int a, int64_t coarse) {
    taps_.clear();
    for (int64_t k = 0; k < g.axis[a].kernel; ++k) {
      const int64_t fine = g.fine_position(a, coarse, k);
      if (fine >= 0) taps_.push_back({fine, k});
    }
    group();
  }

  void list_from_fine(const Geometry& g, int a, int64_t fine) {
    const Axis& axis = g.axis[a];
    taps_.clear();
    for_each_unfolded(fine, g.fine_size(a), axis.pad_low, axis.pad_high, g.padding_mode,
                      [&](int64_t first, int64_t last) {
                        add_sums(axis, g.coarse_size(a) - 1, first + axis.pad_low,
                                 last - 1 + axis.pad_low);
                      });
    group();
  }

  // Solves least <= coarse * stride + k * dilation <= greatest, where sums are position + pad_low.
  // Of a range it goes through the coarse positions or the sums, whichever are fewer.
  void add_sums(const Axis& axis, int64_t most, int64_t least, int64_t greatest) {
    if (least < greatest) {
      const int64_t reach = (axis.kernel - 1) * axis.dilation;
      const int64_t first = least > reach ? divide_up(least - reach, axis.stride) : 0;
      const int64_t last = std::min(most, greatest / axis.stride);
      if (last - first <= greatest - least) {
        for (int64_t coarse = first; coarse <= last; ++coarse) {
          const int64_t from = coarse * axis.stride;
          const int64_t last_k = std::min(axis.kernel - 1, (greatest - from) / axis.dilation);
          int64_t k = from < least ? divide_up(least - from, axis.dilation) : 0;
          for (; k <= last_k; ++k) taps_.push_back({coarse, k});
        }
        return;
      }
    }
    for (int64_t sum = least; sum <= greatest; ++sum) add_sum(axis, most, sum);
  }

  // The same for one sum, by the unknown that needs no division where there is one.
  void add_sum(const Axis& axis, int64_t most, int64_t sum) {
    const int64_t last_k = std::min(axis.kernel - 1, sum / axis.dilation);
    if (axis.dilation == 1 && axis.stride > 1) {
      const int64_t last = std::min(most, sum / axis.stride);
      for (int64_t coarse = divide_up(sum - last_k, axis.stride); coarse <= last; ++coarse) {
        taps_.push_back({coarse, sum - coarse * axis.stride});
      }
      return;
    }
    // By ascending coarse position, so that there is nothing to sort.
    for (int64_t k = last_k; k >= 0; --k) {
      const int64_t rest = sum - k * axis.dilation;
      if (axis.stride > 1 && rest % axis.stride != 0) continue;
      if (rest / axis.stride <= most) taps_.push_back({rest / axis.stride, k});
    }
  }

  void group() {
    std::sort(taps_.begin(), taps_.end());
    groups.clear();
    kernel.clear();
    for (const Tap& tap : taps_) {
      const auto next = static_cast<int64_t>(kernel.size());
      if (groups.empty() || groups.back().position != tap.to) {
        groups.push_back({tap.to, next, next});
      }
      kernel.push_back(tap.k);
      ++groups.back().last;
    }
  }

  std::vector<Tap> taps_;
};

// The taps of positions [first, last) of an axis.
struct AxisTaps {
  int64_t first = 0;
  std::vector<int64_t> start;    // groups[start[p - first] .. start[p - first + 1]) belong to p
  std::vector<TapGroup> groups;  // ascending position within each p
  std::vector<int64_t> kernel;

  const TapGroup* begin(int64_t p) const {
    return groups.data() + start[static_cast<size_t>(p - first)];
  }
  const TapGroup* end(int64_t p) const {
    return groups.data() + start[static_cast<size_t>(p - first) + 1];
  }

  void append(const PositionTaps& taps) {
    const auto offset = static_cast<int64_t>(kernel.size());
    for (const TapGroup& group : taps.groups) {
      groups.push_back({group.position, group.first + offset, group.last + offset});
    }
    kernel.insert(kernel.end(), taps.kernel.begin(), taps.kernel.end());
    start.push_back(static_cast<int64_t>(groups.size()));
  }
};

struct Range {
  int64_t first;
  int64_t last;
};

// `taps` is scratch.
inline AxisTaps taps_by_row(const Geometry& g, int a, Range range, PositionTaps& taps) {
  AxisTaps table;
  table.first = range.first;
  // At once: where so much cannot be had, that is known before any of it is filled.
  table.start.reserve(static_cast<size_t>(range.last - range.first) + 1);
  table.start.push_back(0);
  // And what a small layer needs: growing step by step costs it more than the taps do.
  constexpr int64_t kFew = 128;
  const auto few = static_cast<size_t>(
      std::min(kFew, std::min(kFew, range.last - range.first) * std::min(kFew, g.axis[a].kernel)));
  table.groups.reserve(few);
  table.kernel.reserve(few);
  for (int64_t o = range.first; o < range.last; ++o) {
    taps.list_by_row(g, a, o);
    table.append(taps);
  }
  return table;
}

inline AxisTaps taps_by_row(const Geometry& g, int a) {
  PositionTaps taps;
  return taps_by_row(g, a, {0, g.axis[a].out}, taps);
}

}  // namespace linfuse
