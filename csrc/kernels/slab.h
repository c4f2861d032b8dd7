// Cutting the input positions of fuse_conv_linear so that what belongs to a part stays in a cache.
//
//   slab     a range of input positions on one axis, and the output positions that they read
//   line     all output positions that share their coordinate on that axis
//   stretch  neighbouring slabs, taken in turn: lines that the next slab reads too stay where they
//            are in the panel
//   run      neighbouring output positions of a channel, taken in one piece
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <numeric>
#include <utility>
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
  int64_t room;  // lines that a panel has room for: those of any slab, or more

  int64_t positions_per_read() const { return outer * inner; }
};

// Output positions [source, source + count) of a channel, at [slot, slot + count) of a panel.
struct Run {
  int64_t source;
  int64_t count;
  int64_t slot;  // -1 for those that no input position reads: nothing but the bias needs them
  bool counts;   // for the bias: another stretch, or this one again, may pack the same
};

struct HeldLine {
  int64_t line;
  int64_t slot;
};

// The slab at hand of a stretch.
struct Slab {
  int64_t number = -1;
  Range range;            // of input positions on the axis
  std::vector<Run> runs;  // still to be packed

  std::vector<HeldLine> held;       // what the panel holds then, by ascending line
  std::vector<int64_t> free_slots;  // the others
  int64_t last = 0;                 // slab of the stretch
  Range share = {0, 0};             // the lines whose bias the stretch answers for
  std::vector<char> counted;        // which of them have met it

  // Where a line that is read stands in the panel.
  int64_t slot(int64_t line) const {
    return std::lower_bound(held.begin(), held.end(), line,
                            [](const HeldLine& one, int64_t wanted) { return one.line < wanted; })
        ->slot;
  }

  // Whether the bias of a line is still to be counted; from then on it is.
  bool count(int64_t line) {
    if (line < share.first || line >= share.last) return false;
    const auto place = static_cast<size_t>(line - share.first);
    return std::exchange(counted[place], char{1}) == 0;
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
  slabs.room = 0;
  std::vector<int64_t> reads;
  for (int64_t number = 0; number < slabs.count; ++number) {
    if (!list_reads(g, slabs.axis, range_of_slab(g, slabs, number), most, reads)) return false;
    slabs.room = std::max(slabs.room, static_cast<int64_t>(reads.size()));
  }
  return true;
}

inline bool before(const HeldLine& one, const HeldLine& other) { return one.line < other.line; }

// Makes room for what is read and not held, at the cost of the lowest lines that are not read.
// Returns the new lines.
inline std::vector<HeldLine> hold(const std::vector<int64_t>& reads, Slab& slab) {
  std::vector<HeldLine> wanted;
  for (int64_t line : reads) wanted.push_back({line, -1});
  std::vector<HeldLine> fresh;
  std::set_difference(wanted.begin(), wanted.end(), slab.held.begin(), slab.held.end(),
                      std::back_inserter(fresh), before);
  std::vector<HeldLine> unread;
  std::set_difference(slab.held.begin(), slab.held.end(), wanted.begin(), wanted.end(),
                      std::back_inserter(unread), before);
  const size_t missing =
      fresh.size() > slab.free_slots.size() ? fresh.size() - slab.free_slots.size() : 0;
  unread.resize(std::min(unread.size(), missing));
  // The last in is the first out: neighbouring lines then get neighbouring slots.
  for (auto one = unread.rbegin(); one != unread.rend(); ++one) {
    slab.free_slots.push_back(one->slot);
  }
  for (HeldLine& one : fresh) {
    one.slot = slab.free_slots.back();
    slab.free_slots.pop_back();
  }
  std::vector<HeldLine> kept;
  std::set_difference(slab.held.begin(), slab.held.end(), unread.begin(), unread.end(),
                      std::back_inserter(kept), before);
  slab.held.clear();
  std::merge(kept.begin(), kept.end(), fresh.begin(), fresh.end(), std::back_inserter(slab.held),
             before);
  return fresh;
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

// Input positions on the axes inside that of the slabs.
inline int64_t inner_in(const Geometry& g, const Slabs& slabs) {
  return g.in_positions() / g.axis[slabs.axis].in;
}

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
// slab of one position may read any number. Where it can be, lengths are multiples of `step`.
inline void cut_slabs(const Geometry& g, int64_t least_count, int64_t most, int64_t step,
                      Slabs& slabs) {
  const int64_t size = g.axis[slabs.axis].in;
  for (int64_t count = least_count;; count += divide_up(count, 4)) {
    slabs.length = divide_up(size, std::min(count, size));
    if (slabs.length > step && slabs.length < size) slabs.length -= slabs.length % step;
    const bool single = slabs.length == 1;
    if (detail::measure_slabs(g, single ? INT64_MAX : most, slabs) || single) return;
  }
}

// Input positions on the axis that fill whole lines of memory, however a channel begins.
inline int64_t whole_lines(const Geometry& g, const Slabs& slabs, int64_t element_size) {
  constexpr int64_t kLine = 64;
  return kLine / std::gcd(kLine, inner_in(g, slabs) * element_size);
}

// Empties the panel, for slabs [some.first, some.last). All stretches together answer for the bias
// of every line, whether an input position reads it or not.
inline void start_stretch(const Geometry& g, const Slabs& slabs, Range some, Slab& slab) {
  const int64_t lines = g.axis[slabs.axis].out;
  slab.last = some.last - 1;
  slab.share = {some.first * lines / slabs.count, some.last * lines / slabs.count};
  slab.counted.assign(static_cast<size_t>(slab.share.last - slab.share.first), char{0});
  slab.held.clear();
  slab.free_slots.clear();
  for (int64_t slot = slabs.room - 1; slot >= 0; --slot) slab.free_slots.push_back(slot);
}

// Goes on to the slab `number`.
inline void next_slab(const Geometry& g, const Slabs& slabs, int64_t number, Slab& slab) {
  slab.number = number;
  slab.range = detail::range_of_slab(g, slabs, number);
  std::vector<int64_t> reads;
  detail::list_reads(g, slabs.axis, slab.range, INT64_MAX, reads);
  std::vector<HeldLine> fresh = detail::hold(reads, slab);
  std::vector<bool> counts;
  for (const HeldLine& one : fresh) counts.push_back(slab.count(one.line));
  if (number == slab.last) {
    for (int64_t line = slab.share.first; line < slab.share.last; ++line) {
      if (!slab.count(line)) continue;
      fresh.push_back({line, -1});
      counts.push_back(true);
    }
  }
  slab.runs.clear();
  for (int64_t n = 0; n < slabs.outer; ++n) {
    for (size_t f = 0; f < fresh.size(); ++f) {
      detail::add_run(n * g.axis[slabs.axis].out + fresh[f].line,
                      fresh[f].slot < 0 ? -1 : n * slabs.room + fresh[f].slot, counts[f],
                      slabs.inner, slab.runs);
    }
  }
}

// A slab that is a stretch of its own.
inline void make_slab(const Geometry& g, const Slabs& slabs, int64_t number, Slab& slab) {
  start_stretch(g, slabs, {number, number + 1}, slab);
  next_slab(g, slabs, number, slab);
}

// Input positions of a slab. They follow each other: all axes outside it have one.
inline Range positions_of(const Geometry& g, const Slabs& slabs, const Slab& slab) {
  const int64_t inner = inner_in(g, slabs);
  return {slab.range.first * inner, slab.range.last * inner};
}

}  // namespace linfuse
