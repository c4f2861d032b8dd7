// values[e], columns[e] = the element e of the matrix that is a tap, row by row, by ascending
// column
//
// A thread owns whole rows. Where a row starts is known in closed form (stored_taps.h), so that
// rows need nothing of each other: one pass, everything is written once. Within a row, each run of
// kernel elements (row_taps.h) is written for all input channels, in which it lies at the same
// place.
//
//   shape  of a row: which taps it has, and where, from its first on
//
// Most rows have the shape of one not far before: all but those at the rim. Its columns are those
// of that row, moved, and its values those of that row, if the output channel is the same. A copy
// of what still lies in the cache is as fast as writing.
#include <algorithm>
#include <cstring>
#include <vector>

#include "conv_to_csr.h"
#include "memory.h"
#include "row_taps.h"
#include "simd_kernels.h"

namespace linfuse {
namespace {

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

struct Shapes {
  AxisShapes axis[kAxes];

  explicit Shapes(const RowTaps& taps) {
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

template <typename T, typename Index>
class RowWriter {
 public:
  RowWriter(const ConvToCsrParams& params, const Shapes& shapes)
      : g_(params.geometry),
        taps_(params.taps),
        shapes_(shapes),
        moves_(simd_kernels(simd_level())),
        seen_(static_cast<size_t>(shapes.count())),
        weight_(static_cast<const T*>(params.weight)),
        in_positions_(g_.in_positions()),
        in_channels_(g_.in_channels_per_group()),
        weight_step_(g_.weight_index(0, 1) - g_.weight_index(0, 0)) {}

  // Rows [begin, end) of the matrix, the first of which starts with element `at` of the output.
  void write(int64_t begin, int64_t end, int64_t at, T* values, Index* columns,
             Index* row_pointers) {
    visit_rows(g_, begin, end, [&](int64_t weight, int64_t col, const Position& o) {
      const int64_t per_channel = taps_.stored.per_channel(o);
      const int64_t count = per_channel * in_channels_;
      *row_pointers++ = static_cast<Index>(at);
      if (count == 0) return;
      const int64_t first_col = col + first_position(o);
      const int64_t shape = shapes_.of(o);
      const Row before = shape < 0 ? Row{} : seen_[static_cast<size_t>(shape)];
      if (shape >= 0) seen_[static_cast<size_t>(shape)] = {at, first_col, weight};
      if (before.at >= 0) {
        moves_.move(columns + before.at, static_cast<Index>(first_col - before.first_col), count,
                    columns + at);
      }
      if (before.weight == weight) {
        std::memcpy(static_cast<void*>(values + at), values + before.at,
                    static_cast<size_t>(count) * sizeof(T));
      } else {
        list_runs(taps_, o.at[2], runs_);
        Index* own_columns = before.at < 0 ? columns + at : nullptr;
        write_row(weight_ + weight, col, o, per_channel, values + at, own_columns);
        if (before.at < 0) repeat_columns(per_channel, columns + at);
      }
      at += count;
    });
  }

 private:
  // One that was written.
  struct Row {
    int64_t at = -1;
    int64_t first_col = 0;
    int64_t weight = -1;  // where its output channel begins
  };

  // The input position of a row's first tap.
  int64_t first_position(const Position& o) const {
    return (taps_.begin(0, o.at[0])->position * g_.axis[1].in + taps_.begin(1, o.at[1])->position) *
               g_.axis[2].in +
           taps_.begin(2, o.at[2])->position;
  }

  // All values of a row, and the columns of its first input channel unless they are null.
  void write_row(const T* kernel, int64_t first_col, const Position& o, int64_t per_channel,
                 T* values, Index* columns) const {
    visit_runs(
        g_, taps_, runs_, o,
        [&](int64_t position, int64_t k, int64_t length) {
          copy_stepped(values, per_channel, kernel + k, weight_step_, in_channels_, length);
          values += length;
          for (int64_t n = 0; n < length && columns != nullptr; ++n) {
            *columns++ = static_cast<Index>(first_col + position + n);
          }
        },
        [&](int64_t position, const TapGroup& group0, const TapGroup& group1,
            const TapGroup& group2) {
          for (int64_t c_in = 0; c_in < in_channels_; ++c_in) {
            values[c_in * per_channel] =
                sum_of_taps(g_, taps_, kernel + c_in * weight_step_, group0, group1, group2);
          }
          ++values;
          if (columns != nullptr) *columns++ = static_cast<Index>(first_col + position);
        });
  }

  // The columns of the other input channels: those of the first, shifted by whole planes. Twice as
  // many channels each time, so that the loops grow long.
  void repeat_columns(int64_t per_channel, Index* columns) const {
    for (int64_t done = 1; done < in_channels_; done *= 2) {
      const auto shift = static_cast<Index>(done * in_positions_);
      const int64_t count = std::min(done, in_channels_ - done) * per_channel;
      moves_.move(columns, shift, count, columns + done * per_channel);
    }
  }

  const Geometry& g_;
  const RowTaps& taps_;
  const Shapes& shapes_;
  const MoveSet<Index>& moves_;
  std::vector<Row> seen_;  // the last of each shape
  const T* weight_;
  const int64_t in_positions_;
  const int64_t in_channels_;
  const int64_t weight_step_;  // from one input channel to the next
  std::vector<TapRun> runs_;   // of the row at hand
};

template <typename T, typename Index>
void run(const ConvToCsrParams& params, const ParallelFor& parallel_for) {
  const Geometry& g = params.geometry;
  const int64_t rows = params.row_stop - params.row_start;
  T* values = static_cast<T*>(params.values);
  Index* columns = static_cast<Index*>(params.columns);
  Index* row_pointers = static_cast<Index*>(params.row_pointers);

  advise_huge_pages(values, params.stored * static_cast<int64_t>(sizeof(T)));
  advise_huge_pages(columns, params.stored * static_cast<int64_t>(sizeof(Index)));
  const Shapes shapes(params.taps);
  parallel_for(rows, grain_for(params.stored / (rows + 1) + 1), [&](int64_t begin, int64_t end) {
    const int64_t row = params.row_start + begin;
    const int64_t at = params.taps.stored.between(g, params.row_start, row);
    RowWriter<T, Index>(params, shapes)
        .write(row, params.row_start + end, at, values, columns, row_pointers + begin);
  });
  row_pointers[rows] = static_cast<Index>(params.stored);
}

}  // namespace

void launch_conv_to_csr_cpu(const ConvToCsrParams& params, const ParallelFor& parallel_for) {
  dispatch(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    params.index32 ? run<T, int32_t>(params, parallel_for) : run<T, int64_t>(params, parallel_for);
  });
}

}  // namespace linfuse
