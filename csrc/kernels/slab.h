// Cutting the input positions of fuse_conv_linear so that what belongs to a part stays in a cache.
//
//   slab     a range of input positions on one axis, and the output positions that they read
//   line     all output positions that share their coordinate on that axis
//   run      neighbouring output positions of a channel, taken in one piece
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../geometry/axis_taps.h"
#include "../geometry/geometry.h"

namespace linfuse {

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

struct Slabs {
  int axis;        // the first one with more than one input position
  int64_t outer;   // output positions on the axes outside it
  int64_t inner;   // output positions on the axes inside it
  int64_t length;  // input positions of a slab on the axis
  int64_t count;
  int64_t most_reads;  // lines of a slab
  int64_t all_reads;   // lines of all slabs

  int64_t positions_per_read() const { return outer * inner; }
};

// Output positions [source, source + count) of a channel, at [slot, slot + count) of a panel that
// holds what the slab reads.
struct Run {
  int64_t source;
  int64_t count;
  int64_t slot;  // -1 for those that no input position reads: nothing but the bias needs them
  bool counts;   // for the bias: another slab may read the same
};

struct Slab {
  int64_t number = -1;
  Range range;                 // of input positions on the axis
  std::vector<int64_t> reads;  // the output positions on the axis that they read, ascending
  std::vector<Run> runs;

  // Where an output position that is read stands in `reads`.
  int64_t slot(int64_t o) const {
    return std::lower_bound(reads.begin(), reads.end(), o) - reads.begin();
  }
};

namespace detail {

// False where the range would read more than `most` output positions.
inline bool list_reads(const Geometry& g, int axis, Range range, int64_t most,
                       std::vector<int64_t>& reads) {
  reads.clear();
  PositionTaps taps;
  for (int64_t i = range.first; i < range.last; ++i) {
    taps.list_by_column(g, axis, i);
    for (const TapGroup& group : taps.groups) {
      // Nearly always the next one, or one that is there.
      if (reads.empty() || group.position > reads.back()) {
        reads.push_back(group.position);
        continue;
      }
      const auto place = std::lower_bound(reads.begin(), reads.end(), group.position);
      if (*place != group.position) reads.insert(place, group.position);
    }
    if (static_cast<int64_t>(reads.size()) > most) return false;
  }
  return true;
}

inline Range range_of_slab(const Geometry& g, const Slabs& slabs, int64_t number) {
  const int64_t start = number * slabs.length;
  return {start, std::min(g.axis[slabs.axis].in, start + slabs.length)};
}

// False where a slab would read more than `most` lines.
inline bool measure_slabs(const Geometry& g, int64_t most, Slabs& slabs) {
  slabs.count = divide_up(g.axis[slabs.axis].in, slabs.length);
  slabs.most_reads = 0;
  slabs.all_reads = 0;
  std::vector<int64_t> reads;
  for (int64_t number = 0; number < slabs.count; ++number) {
    if (!list_reads(g, slabs.axis, range_of_slab(g, slabs, number), most, reads)) return false;
    const auto lines = static_cast<int64_t>(reads.size());
    slabs.most_reads = std::max(slabs.most_reads, lines);
    slabs.all_reads += lines;
  }
  return true;
}

inline void add_run(int64_t line, int64_t slot, bool counts, int64_t inner,
                    std::vector<Run>& runs) {
  const Run run = {line * inner, inner, slot < 0 ? -1 : slot * inner, counts};
  if (!runs.empty()) {
    Run& last = runs.back();
    if (last.source + last.count == run.source && last.counts == counts &&
        run.slot == (last.slot < 0 ? -1 : last.slot + last.count)) {
      last.count += run.count;
      return;
    }
  }
  runs.push_back(run);
}

}  // namespace detail

// The axis of the slabs, and one slab that holds all of it.
inline Slabs one_slab(const Geometry& g) {
  Slabs slabs = {};
  while (slabs.axis < kAxes - 1 && g.axis[slabs.axis].in == 1) ++slabs.axis;
  slabs.outer = slabs.inner = 1;
  for (int a = 0; a < kAxes; ++a) {
    if (a < slabs.axis) slabs.outer *= g.axis[a].out;
    if (a > slabs.axis) slabs.inner *= g.axis[a].out;
  }
  slabs.length = g.axis[slabs.axis].in;
  slabs.count = 1;
  return slabs;
}

// Cuts into equal slabs, as few as read at most `most` lines each and are `least_count` or more; a
// slab of one position may read any number.
inline void cut_slabs(const Geometry& g, int64_t least_count, int64_t most, Slabs& slabs) {
  const int64_t size = g.axis[slabs.axis].in;
  for (int64_t count = least_count;; count *= 2) {
    slabs.length = divide_up(size, std::min(count, size));
    const bool single = slabs.length == 1;
    if (detail::measure_slabs(g, single ? INT64_MAX : most, slabs) || single) return;
  }
}

// Each slab answers for the bias of its share of the lines, whether its input positions read them
// or not.
inline void make_slab(const Geometry& g, const Slabs& slabs, int64_t number, Slab& slab) {
  slab.number = number;
  slab.range = detail::range_of_slab(g, slabs, number);
  detail::list_reads(g, slabs.axis, slab.range, INT64_MAX, slab.reads);
  slab.runs.clear();
  const int64_t lines = g.axis[slabs.axis].out;
  const Range share = {number * lines / slabs.count, (number + 1) * lines / slabs.count};
  const auto reads = static_cast<int64_t>(slab.reads.size());
  for (int64_t n = 0; n < slabs.outer; ++n) {
    int64_t unread = share.first;
    const auto add_unread = [&](int64_t last) {
      for (; unread < std::min(last, share.last); ++unread) {
        detail::add_run(n * lines + unread, -1, true, slabs.inner, slab.runs);
      }
    };
    for (int64_t slot = 0; slot < reads; ++slot) {
      const int64_t line = slab.reads[static_cast<size_t>(slot)];
      const bool counts = line >= share.first && line < share.last;
      if (counts) {
        add_unread(line);
        unread = line + 1;
      }
      detail::add_run(n * lines + line, n * reads + slot, counts, slabs.inner, slab.runs);
    }
    add_unread(share.last);
  }
}

// Input positions of a slab. They follow each other: all axes outside it have one.
inline Range positions_of(const Geometry& g, const Slabs& slabs, const Slab& slab) {
  int64_t inside = 1;
  for (int a = slabs.axis + 1; a < kAxes; ++a) inside *= g.axis[a].in;
  return {slab.range.first * inside, slab.range.last * inside};
}

}  // namespace linfuse
