// Where the elements of the matrix lie when only the taps are stored, row by row and by ascending
// column.
//
// The taps of a row are the Cartesian product of the taps of its axes, once per input channel of
// its group. So all counts are products, and the elements before a row need no pass over the rows:
//
//   before(c_out, o) = C (c_out T0 T1 T2 + P0(o0) T1 T2 + n0(o0) (P1(o1) T2 + n1(o1) P2(o2)))
//
//   C        input channels per group
//   n_a(o)   groups of taps of output position o on axis a: the input positions that it reads
//   P_a(o)   those of all positions before o, which is AxisTaps::start
//   T_a      those of all positions
//
// Tables of a block of rows hold the positions of these rows only. Then P_a and T_a count what they
// hold, and the formula counts from another row than the first; differences are right, as inside an
// axis of which the block has several positions all are held.
//
//   slot     which of the groups of its output position a tap is in, on each axis
//
// The views are plain pointers, so that a kernel on a card can take them. The tables own what they
// point at; pack() writes it as one block of words, which go to the card together.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "axis_taps.h"
#include "geometry.h"

namespace linfuse {

struct StoredRows {
  const int64_t* start[kAxes];  // [held + 1], AxisTaps::start by row
  int64_t first[kAxes];         // the positions [first, first + held) of each axis are held
  int64_t held[kAxes];

  // P_a, T_a and n_a.
  LINFUSE_HD int64_t before(int a, int64_t o) const { return start[a][o - first[a]]; }
  LINFUSE_HD int64_t total(int a) const { return start[a][held[a]]; }
  LINFUSE_HD int64_t count(int a, int64_t o) const { return before(a, o + 1) - before(a, o); }

  // Elements of one input channel in the row of o.
  LINFUSE_HD int64_t per_channel(const Position& o) const {
    return count(0, o.at[0]) * count(1, o.at[1]) * count(2, o.at[2]);
  }

  // Elements in all rows before (c_out, o), which is held.
  LINFUSE_HD int64_t before(const Geometry& g, int64_t c_out, const Position& o) const {
    const int64_t planes = c_out * total(0) + before(0, o.at[0]);
    const int64_t lines = before(1, o.at[1]) * total(2) + count(1, o.at[1]) * before(2, o.at[2]);
    return g.in_channels_per_group() * (planes * total(1) * total(2) + count(0, o.at[0]) * lines);
  }

  // The same for a row by its number.
  LINFUSE_HD int64_t before(const Geometry& g, int64_t row) const {
    return before(g, row / g.out_positions(), out_position(g, row % g.out_positions()));
  }

  // Elements in rows [row_start, row_stop).
  LINFUSE_HD int64_t between(const Geometry& g, int64_t row_start, int64_t row_stop) const {
    if (row_start == row_stop) return 0;
    const Position last = out_position(g, (row_stop - 1) % g.out_positions());
    return before(g, row_stop - 1) - before(g, row_start) +
           g.in_channels_per_group() * per_channel(last);
  }

  // Where one element lies; c_in counts within the group of c_out.
  LINFUSE_HD int64_t index(const Geometry& g, int64_t c_out, int64_t c_in, const Position& o,
                           const Position& slot) const {
    const int64_t within =
        (slot.at[0] * count(1, o.at[1]) + slot.at[1]) * count(2, o.at[2]) + slot.at[2];
    return before(g, c_out, o) + c_in * per_channel(o) + within;
  }
};

// The taps of a row: AxisTaps by row, as pointers.
struct RowTaps {
  StoredRows stored;
  const TapGroup* groups[kAxes];
  const int64_t* kernel[kAxes];

  LINFUSE_HD const TapGroup* begin(int a, int64_t o) const {
    return groups[a] + stored.before(a, o);
  }
  LINFUSE_HD const TapGroup* end(int a, int64_t o) const {
    return groups[a] + stored.before(a, o + 1);
  }
};

// The output positions on each axis that rows [row_start, row_stop) have; of no rows, the first.
inline void positions_of_rows(const Geometry& g, int64_t row_start, int64_t row_stop,
                              Range (&ranges)[kAxes]) {
  const int64_t positions = g.out_positions();
  if (row_stop <= row_start) {
    for (Range& range : ranges) range = {0, 1};
    return;
  }
  for (int a = 0; a < kAxes; ++a) ranges[a] = {0, g.axis[a].out};
  if (row_start / positions != (row_stop - 1) / positions) return;
  const Position from = out_position(g, row_start % positions);
  const Position to = out_position(g, (row_stop - 1) % positions);
  // As long as the outer coordinates agree, the rows differ in the inner ones only.
  for (int a = 0; a < kAxes; ++a) {
    ranges[a] = {from.at[a], to.at[a] + 1};
    if (from.at[a] != to.at[a]) break;
  }
}

struct TapUse {
  int64_t o;
  int64_t slot;
};

// The taps of a kernel element: on each axis, the output positions that use it, ascending.
struct KernelTaps {
  StoredRows stored;
  const int64_t* start[kAxes];  // [kernel + 1]: uses[start[k] .. start[k + 1]) belong to k
  const TapUse* uses[kAxes];

  LINFUSE_HD const TapUse* begin(int a, int64_t k) const { return uses[a] + start[a][k]; }
  LINFUSE_HD const TapUse* end(int a, int64_t k) const { return uses[a] + start[a][k + 1]; }
};

namespace detail {

template <typename Entry>
void append(std::vector<int64_t>& words, const std::vector<Entry>& table) {
  static_assert(sizeof(Entry) % sizeof(int64_t) == 0, "tables are made of 64-bit words");
  const auto* first = reinterpret_cast<const int64_t*>(table.data());
  words.insert(words.end(), first, first + table.size() * (sizeof(Entry) / sizeof(int64_t)));
}

// Where a table lies in a block of words, read in the order in which it was written.
template <typename Entry>
const Entry* next(const int64_t*& words, const std::vector<Entry>& table) {
  const auto* at = reinterpret_cast<const Entry*>(words);
  words += table.size() * (sizeof(Entry) / sizeof(int64_t));
  return at;
}

}  // namespace detail

class RowTables {
 public:
  explicit RowTables(const Geometry& g) : RowTables(g, 0, g.rows()) {}

  // Of these rows, and no others.
  RowTables(const Geometry& g, int64_t row_start, int64_t row_stop) {
    Range ranges[kAxes];
    positions_of_rows(g, row_start, row_stop, ranges);
    PositionTaps scratch;
    for (int a = 0; a < kAxes; ++a) axis_[a] = taps_by_row(g, a, ranges[a], scratch);
  }

  RowTaps view() const {
    RowTaps taps;
    for (int a = 0; a < kAxes; ++a) {
      taps.stored.start[a] = axis_[a].start.data();
      taps.stored.first[a] = axis_[a].first;
      taps.stored.held[a] = static_cast<int64_t>(axis_[a].start.size()) - 1;
      taps.groups[a] = axis_[a].groups.data();
      taps.kernel[a] = axis_[a].kernel.data();
    }
    return taps;
  }

  std::vector<int64_t> pack() const {
    std::vector<int64_t> words;
    for (const AxisTaps& axis : axis_) {
      detail::append(words, axis.start);
      detail::append(words, axis.groups);
      detail::append(words, axis.kernel);
    }
    return words;
  }

  // The tables as they lie in a copy of pack().
  RowTaps view(const int64_t* words) const {
    RowTaps taps = view();
    for (int a = 0; a < kAxes; ++a) {
      taps.stored.start[a] = detail::next(words, axis_[a].start);
      taps.groups[a] = detail::next(words, axis_[a].groups);
      taps.kernel[a] = detail::next(words, axis_[a].kernel);
    }
    return taps;
  }

 private:
  AxisTaps axis_[kAxes];
};

class KernelTables {
 public:
  explicit KernelTables(const Geometry& g) : KernelTables(g, 0, g.rows()) {}

  // Of the positions of these rows, and no others.
  KernelTables(const Geometry& g, int64_t row_start, int64_t row_stop) {
    Range ranges[kAxes];
    positions_of_rows(g, row_start, row_stop, ranges);
    PositionTaps scratch;
    for (int a = 0; a < kAxes; ++a) {
      AxisTaps taps = taps_by_row(g, a, ranges[a], scratch);
      Table& table = axis_[a];
      table.first = taps.first;
      table.start.assign(static_cast<size_t>(g.axis[a].kernel) + 1, 0);
      for (int64_t k : taps.kernel) ++table.start[static_cast<size_t>(k) + 1];
      for (size_t k = 1; k < table.start.size(); ++k) table.start[k] += table.start[k - 1];
      std::vector<int64_t> next = table.start;
      table.uses.resize(taps.kernel.size());
      for (int64_t o = ranges[a].first; o < ranges[a].last; ++o) {
        for (const TapGroup* group = taps.begin(o); group != taps.end(o); ++group) {
          for (int64_t n = group->first; n < group->last; ++n) {
            const auto k = static_cast<size_t>(taps.kernel[static_cast<size_t>(n)]);
            table.uses[static_cast<size_t>(next[k]++)] = {o, group - taps.begin(o)};
          }
        }
      }
      table.stored = std::move(taps.start);
    }
  }

  KernelTaps view() const {
    KernelTaps taps;
    for (int a = 0; a < kAxes; ++a) {
      taps.stored.start[a] = axis_[a].stored.data();
      taps.stored.first[a] = axis_[a].first;
      taps.stored.held[a] = static_cast<int64_t>(axis_[a].stored.size()) - 1;
      taps.start[a] = axis_[a].start.data();
      taps.uses[a] = axis_[a].uses.data();
    }
    return taps;
  }

  std::vector<int64_t> pack() const {
    std::vector<int64_t> words;
    for (const Table& axis : axis_) {
      detail::append(words, axis.stored);
      detail::append(words, axis.start);
      detail::append(words, axis.uses);
    }
    return words;
  }

  // The tables as they lie in a copy of pack().
  KernelTaps view(const int64_t* words) const {
    KernelTaps taps = view();
    for (int a = 0; a < kAxes; ++a) {
      taps.stored.start[a] = detail::next(words, axis_[a].stored);
      taps.start[a] = detail::next(words, axis_[a].start);
      taps.uses[a] = detail::next(words, axis_[a].uses);
    }
    return taps;
  }

 private:
  struct Table {
    int64_t first = 0;
    std::vector<int64_t> stored;
    std::vector<int64_t> start;
    std::vector<TapUse> uses;
  };

  Table axis_[kAxes];
};

}  // namespace linfuse
