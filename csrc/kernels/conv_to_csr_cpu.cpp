// values[e], columns[e] = the element e of the matrix that is a tap, row by row, by ascending
// column
//
// A thread owns whole rows. Where a row starts is known in closed form (stored_taps.h), so that
// rows need nothing of each other: one pass, everything is written once. Within a row, each run of
// kernel elements (row_taps.h) is written for all input channels, in which it lies at the same
// place. Row number `rows` stands for the end: it has a pointer and no elements.
#include <vector>

#include "conv_to_csr.h"
#include "memory.h"
#include "row_taps.h"

namespace linfuse {
namespace {

template <typename T, typename Index>
void write_row(const Geometry& g, const RowTaps& taps, const T* weight, int64_t c_out,
               const Position& o, std::vector<TapRun>& runs, T* values, Index* columns) {
  const int64_t in_positions = g.in_positions();
  const int64_t in_channels = g.in_channels_per_group();
  const int64_t first_col = g.group_of_out_channel(c_out) * in_channels * in_positions;
  const int64_t per_channel = taps.stored.per_channel(o);
  const int64_t weight_step = g.weight_index(0, 1) - g.weight_index(0, 0);
  const T* kernel = weight + g.weight_index(c_out, 0);

  // The elements of the first input channel, each together with its likes in all others.
  const auto write_columns = [&](int64_t position, int64_t length) {
    for (int64_t c_in = 0; c_in < in_channels; ++c_in) {
      const int64_t col = first_col + c_in * in_positions + position;
      Index* to = columns + c_in * per_channel;
      for (int64_t n = 0; n < length; ++n) to[n] = static_cast<Index>(col + n);
    }
    columns += length;
  };
  list_runs(taps, o.at[2], runs);
  visit_runs(
      g, taps, runs, o,
      [&](int64_t position, int64_t k, int64_t length) {
        copy_stepped(values, per_channel, kernel + k, weight_step, in_channels, length);
        values += length;
        write_columns(position, length);
      },
      [&](int64_t position, const TapGroup& group0, const TapGroup& group1,
          const TapGroup& group2) {
        for (int64_t c_in = 0; c_in < in_channels; ++c_in) {
          values[c_in * per_channel] =
              sum_of_taps(g, taps, kernel + c_in * weight_step, group0, group1, group2);
        }
        ++values;
        write_columns(position, 1);
      });
}

template <typename T, typename Index>
void run(const ConvToCsrParams& params, const ParallelFor& parallel_for) {
  const Geometry& g = params.geometry;
  const int64_t rows = params.row_stop - params.row_start;
  const int64_t first = params.taps.stored.before(g, params.row_start);
  const T* weight = static_cast<const T*>(params.weight);
  T* values = static_cast<T*>(params.values);
  Index* columns = static_cast<Index*>(params.columns);
  Index* row_pointers = static_cast<Index*>(params.row_pointers);

  advise_huge_pages(values, params.stored * static_cast<int64_t>(sizeof(T)));
  advise_huge_pages(columns, params.stored * static_cast<int64_t>(sizeof(Index)));
  parallel_for(rows + 1, grain_for(params.stored / (rows + 1) + 1),
               [&](int64_t begin, int64_t end) {
                 std::vector<TapRun> runs;
                 for (int64_t n = begin; n < end; ++n) {
                   const int64_t c_out = (params.row_start + n) / g.out_positions();
                   const Position o = out_position(g, (params.row_start + n) % g.out_positions());
                   const int64_t at = params.taps.stored.before(g, c_out, o) - first;
                   row_pointers[n] = static_cast<Index>(at);
                   if (n == rows) continue;
                   write_row(g, params.taps, weight, c_out, o, runs, values + at, columns + at);
                 }
               });
}

}  // namespace

void launch_conv_to_csr_cpu(const ConvToCsrParams& params, const ParallelFor& parallel_for) {
  dispatch(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    params.index32 ? run<T, int32_t>(params, parallel_for) : run<T, int64_t>(params, parallel_for);
  });
}

}  // namespace linfuse
