// values[e], columns[e] = the element e of the matrix that is a tap, row by row, by ascending
// column
//
// A thread owns whole rows. Where a row starts is known in closed form (stored_taps.h), so that
// rows need nothing of each other: one pass, everything is written once. Within a row, each run of
// kernel elements (row_taps.h) is written for all input channels, in which it lies at the same
// place.
//
// Most rows have the shape (row_shapes.h) of one not far before. Its columns are those of that row,
// moved, and its values those of that row, if the output channel is the same. A copy of what still
// lies in the cache is as fast as writing.
#include <algorithm>
#include <cstring>
#include <vector>

#include "conv_to_csr.h"
#include "memory.h"
#include "row_shapes.h"
#include "row_taps.h"
#include "simd_kernels.h"

namespace linfuse {
namespace {

template <typename T, typename Index>
class RowWriter {
 public:
  RowWriter(const ConvToCsrParams& params, const RowShapes& shapes)
      : g_(params.geometry),
        taps_(params.taps),
        moves_(simd_kernels(simd_level())),
        last_(shapes),
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
      const LastRows::Row row = {at, weight, col + first_position(g_, taps_, o)};
      const LastRows::Row before = last_.exchange(o, row);
      if (before.at >= 0) {
        moves_.move(columns + before.at, static_cast<Index>(row.col - before.col), count,
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
  const MoveSet<Index>& moves_;
  LastRows last_;
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
  const RowShapes shapes(params.taps);
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
