// values[e], columns[e] = the element e of the matrix that is a tap, row by row, by ascending
// column
//
// A thread owns whole rows. Where a row starts is known in closed form (stored_taps.h), so that
// rows need nothing of each other: one pass, everything is written once, in order. Row number
// `rows` stands for the end: it has a pointer and no elements.
#include "conv_to_csr.h"
#include "memory.h"
#include "row_taps.h"

namespace linfuse {
namespace {

template <typename T, typename Index>
void write_row(const Geometry& g, const RowTaps& taps, const T* weight, int64_t row, T* values,
               Index* columns) {
  const int64_t in_channels = g.in_channels_per_group();
  const int64_t c_out = row / g.out_positions();
  const Position o = out_position(g, row % g.out_positions());
  int64_t first_col = g.group_of_out_channel(c_out) * in_channels * g.in_positions();
  for (int64_t c_in = 0; c_in < in_channels; ++c_in, first_col += g.in_positions()) {
    visit_plane(g, taps, weight + g.weight_index(c_out, c_in), o, [&](int64_t position, T value) {
      *values++ = value;
      *columns++ = static_cast<Index>(first_col + position);
    });
  }
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
  for_each(parallel_for, rows + 1, params.stored / (rows + 1) + 1, [&](int64_t n) {
    const int64_t at = params.taps.stored.before(g, params.row_start + n) - first;
    row_pointers[n] = static_cast<Index>(at);
    if (n < rows)
      write_row(g, params.taps, weight, params.row_start + n, values + at, columns + at);
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
