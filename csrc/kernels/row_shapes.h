// Which rows of the matrix are alike.
//
//   shape  of a row: which taps it has, and where, from its first on
//
// All rows but those at the rim have one shape. Where their output channel is the same as well, one
// is the other, moved.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "row_taps.h"

namespace linfuse {

// What the output positions of an axis have in common.
class AxisShapes {
 public:
  AxisShapes() = default;
  AxisShapes(const RowTaps& taps, int a) : taps_(&taps), a_(a) {
    first_ = taps.stored.first[a];
    shape_.reserve(static_cast<size_t>(taps.stored.held[a]));
    std::vector<int64_t> example;  // a position of each shape
    for (int64_t o = first_; o < first_ + taps.stored.held[a]; ++o) {
      // The same as just before, nearly always.
      auto found = std::find_if(example.rbegin(), example.rend(),
                                [&](int64_t other) { return same(o, other); });
      auto shape = static_cast<int8_t>(example.rend() - found) - 1;
      if (found == example.rend() && count_ < kMost) {
        shape = count_++;
        example.push_back(o);
      }
      shape_.push_back(static_cast<int8_t>(shape));
    }
  }

  int64_t count() const { return count_; }
  // -1 for those that are too many to be told apart.
  int64_t operator[](int64_t o) const { return shape_[static_cast<size_t>(o - first_)]; }

 private:
  static constexpr int kMost = 16;

  bool same(int64_t one, int64_t other) const {
    const TapGroup* left = taps_->begin(a_, one);
    const TapGroup* right = taps_->begin(a_, other);
    const int64_t groups = taps_->end(a_, one) - left;
    if (groups != taps_->end(a_, other) - right) return false;
    for (int64_t n = 0; n < groups; ++n) {
      const int64_t taps = left[n].last - left[n].first;
      if (left[n].position - left[0].position != right[n].position - right[0].position ||
          taps != right[n].last - right[n].first ||
          !std::equal(taps_->kernel[a_] + left[n].first, taps_->kernel[a_] + left[n].last,
                      taps_->kernel[a_] + right[n].first)) {
        return false;
      }
    }
    return true;
  }

  const RowTaps* taps_ = nullptr;
  int a_ = 0;
  int count_ = 0;
  int64_t first_ = 0;
  std::vector<int8_t> shape_;
};

struct RowShapes {
  AxisShapes axis[kAxes];

  explicit RowShapes(const RowTaps& taps) {
    for (int a = 0; a < kAxes; ++a) axis[a] = AxisShapes(taps, a);
  }

  int64_t count() const { return axis[0].count() * axis[1].count() * axis[2].count(); }
  int64_t of(const Position& o) const {
    const int64_t shape0 = axis[0][o.at[0]];
    const int64_t shape1 = axis[1][o.at[1]];
    const int64_t shape2 = axis[2][o.at[2]];
    if (shape0 < 0 || shape1 < 0 || shape2 < 0) return -1;
    return (shape0 * axis[1].count() + shape1) * axis[2].count() + shape2;
  }
};

// The input position of the first tap of a row that has one.
inline int64_t first_position(const Geometry& g, const RowTaps& taps, const Position& o) {
  return (taps.begin(0, o.at[0])->position * g.axis[1].in + taps.begin(1, o.at[1])->position) *
             g.axis[2].in +
         taps.begin(2, o.at[2])->position;
}

// The last row of each shape, for a writer that goes through rows.
class LastRows {
 public:
  struct Row {
    int64_t at = -1;      // where it was written; -1 for none
    int64_t weight = -1;  // where its output channel begins
    int64_t col = 0;      // of its first tap
  };

  explicit LastRows(const RowShapes& shapes)
      : shapes_(shapes), rows_(static_cast<size_t>(shapes.count())) {}

  // The one of the shape that the row of o has, in whose place it is from now on.
  Row exchange(const Position& o, const Row& row) {
    const int64_t shape = shapes_.of(o);
    return shape < 0 ? Row{} : std::exchange(rows_[static_cast<size_t>(shape)], row);
  }

 private:
  const RowShapes& shapes_;
  std::vector<Row> rows_;
};

}  // namespace linfuse
