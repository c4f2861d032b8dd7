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

  std::vector<int64_t> slots;  // of the lines from held[0] on

  // Where a line that is read stands in the panel.
  int64_t slot(int64_t line) const { return slots[static_cast<size_t>(line - held[0].line)]; }

  // Whether the bias of a line is still to be counted; from then on it is.
  bool count(int64_t line) {
    if (line < share.first || line >= share.last) return false;
    const auto place = static_cast<size_t>(line - share.first);
    return std::exchange(counted[place], char{1}) == 0;
  }
};

namespace detail {

// Of a transposed convolution, whether the lines that its stride leaves out count as read: where
// neighbours that are turned together hold some of either sort, copying all of them costs less. Not
// what a wide dilation leaves out: it may be many times what one input position reads.
inline bool reads_all_between(const Geometry& g, int a) {
  constexpr int64_t kTogether = 16;
  constexpr int64_t kMostDilation = 2;
  int64_t inner = 1;
  for (int b = a + 1; b < kAxes; ++b) inner *= g.axis[b].out;
  // Where padding repeats positions, what is read is no range.
  return g.transposed && g.padding_mode == PaddingMode::kZeros &&
         g.axis[a].dilation <= kMostDilation && g.axis[a].stride <= kTogether / inner;
}

// At least as many lines as any range of `length` input positions reads.
inline int64_t most_reads(const Geometry& g, int a, int64_t length) {
  const Axis& axis = g.axis[a];
  const int64_t reach = (axis.kernel - 1) * axis.dilation;
  const int64_t step = axis.stride / std::gcd(axis.stride, axis.dilation);
  const int64_t each = g.transposed ? axis.kernel : divide_up(axis.kernel, step);
  const int64_t window = g.transposed ? (length - 1) * axis.stride + reach + 1
                                      : (length - 1 + reach) / axis.stride + 1;
  int64_t most = reads_all_between(g, a) ? window : std::min(window, length * each);
  // What is repeated elsewhere, at the low end and at the high one.
  if (g.padding_mode != PaddingMode::kZeros) most += (axis.pad_low + axis.pad_high) * each;
  return std::min(axis.out, most);
}

// Where all output positions lie that a range of input positions reads, unless padding repeats
// some of them elsewhere.
inline Range window_of_reads(const Geometry& g, int a, Range range) {
  const Axis& axis = g.axis[a];
  const int64_t reach = (axis.kernel - 1) * axis.dilation;
  Range window;
  if (g.transposed) {
    window.first = range.first * axis.stride - axis.pad_low;
    window.last = (range.last - 1) * axis.stride + reach - axis.pad_low + 1;
  } else {
    const int64_t low = range.first + axis.pad_low - reach;
    window.first = low <= 0 ? 0 : divide_up(low, axis.stride);
    window.last = (range.last - 1 + axis.pad_low) / axis.stride + 1;
  }
  window.first = std::clamp<int64_t>(window.first, 0, axis.out);
  window.last = std::clamp(window.last, window.first, axis.out);
  return window;
}

// The output positions that a range of input positions reads, ascending.
inline void list_reads(const Geometry& g, int a, Range range, std::vector<int64_t>& reads) {
  const Axis& axis = g.axis[a];
  const bool repeats = g.padding_mode != PaddingMode::kZeros;
  const Range window = repeats ? Range{0, axis.out} : window_of_reads(g, a, range);
  if (reads_all_between(g, a)) {
    reads.resize(static_cast<size_t>(window.last - window.first));
    std::iota(reads.begin(), reads.end(), window.first);
    return;
  }
  std::vector<char> is_read(static_cast<size_t>(window.last - window.first));
  const auto at = [&](int64_t o) { return is_read.begin() + (o - window.first); };
  for (int64_t k = 0; k < axis.kernel; ++k) {
    if (g.transposed) {
      for (int64_t i = range.first; i < range.last; ++i) {
        const int64_t o = g.fine_position(a, i, k);
        if (o >= 0) *at(o) = 1;
      }
      continue;
    }
    // Neighbouring output positions read steps of the stride.
    const int64_t low = range.first + axis.pad_low - k * axis.dilation;
    const int64_t high = range.last - 1 + axis.pad_low - k * axis.dilation;
    if (high < 0) break;
    const int64_t first = low <= 0 ? 0 : divide_up(low, axis.stride);
    const int64_t last = std::min(axis.out - 1, high / axis.stride);
    if (first <= last) std::fill(at(first), at(last + 1), char{1});
  }
  if (repeats && !g.transposed) {
    const int64_t rim = std::max(axis.pad_low, axis.pad_high);
    PositionTaps taps;
    for (int64_t i = range.first; i < range.last; ++i) {
      if (i > rim && i < axis.in - 1 - rim) continue;
      taps.list_by_column(g, a, i);
      for (const TapGroup& group : taps.groups) *at(group.position) = 1;
    }
  }
  reads.clear();
  for (int64_t o = window.first; o < window.last; ++o) {
    if (*at(o) != 0) reads.push_back(o);
  }
}

inline Range range_of_slab(const Geometry& g, const Slabs& slabs, int64_t number) {
  const int64_t start = number * slabs.length;
  return {start, std::min(g.axis[slabs.axis].in, start + slabs.length)};
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
    slabs.count = divide_up(size, slabs.length);
    slabs.room = detail::most_reads(g, slabs.axis, slabs.length);
    if (slabs.room <= most || slabs.length == 1) return;
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
  detail::list_reads(g, slabs.axis, slab.range, reads);
  std::vector<HeldLine> fresh = detail::hold(reads, slab);
  if (!slab.held.empty()) {
    const int64_t first = slab.held[0].line;
    slab.slots.resize(static_cast<size_t>(slab.held.back().line - first + 1));
    for (const HeldLine& one : slab.held) {
      slab.slots[static_cast<size_t>(one.line - first)] = one.slot;
    }
  }
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
