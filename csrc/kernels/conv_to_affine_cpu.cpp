// matrix[row, col] = sum over the taps k that tie (o, i) of weight[c_out, c_in, k]
//
// A thread owns a run of whole rows, and goes through its memory once, in order: it clears as much
// as stays in its first-level cache, unless the system has just done so (memory.h), writes the taps
// of the planes [prod(in)] in there, and goes on. All index arithmetic comes from three small
// tables (stored_taps.h), one per axis, of the positions that the rows have. In every input channel
// of a row the taps lie at the same positions, so that the innermost loop (row_taps.h) copies one
// run of kernel elements from plane to plane.
//
// Where rows are short and runs many, a row is rather the last one of its shape (row_shapes.h),
// moved: one copy of what is still in the cache.
#include <algorithm>
#include <optional>
#include <vector>

#include "conv_to_affine.h"
#include "memory.h"
#include "row_shapes.h"
#include "row_taps.h"

namespace linfuse {
namespace {

template <typename T>
class RowWriter {
  static constexpr int64_t kPiece = ClearedAhead::kPieceBytes / static_cast<int64_t>(sizeof(T));

 public:
  RowWriter(const ConvToAffineParams& params, const RowTaps& taps)
      : g_(params.geometry),
        taps_(taps),
        weight_(static_cast<const T*>(params.weight)),
        cols_(g_.cols()),
        in_positions_(g_.in_positions()),
        in_channels_(g_.in_channels_per_group()),
        planes_at_once_(std::max<int64_t>(1, kPiece / in_positions_)),
        weight_step_(g_.weight_index(0, 1) - g_.weight_index(0, 0)) {}

  // Rows [begin, end) of the matrix, the first of which lies at `to`.
  void write(int64_t begin, int64_t end, T* to) const {
    std::vector<TapRun> runs;
    ClearedAhead cleared(to, to + (end - begin) * cols_);
    visit_rows(g_, begin, end, [&](int64_t weight, int64_t col, const Position& o) {
      write_row(weight, col, o, to, runs, cleared);
      to += cols_;
    });
  }

  // The same, by moving rows.
  void write_moved(const RowShapes& shapes, int64_t begin, int64_t end, T* matrix) const {
    std::vector<TapRun> runs;
    LastRows last(shapes);
    int64_t at = 0;
    visit_rows(g_, begin, end, [&](int64_t weight, int64_t col, const Position& o) {
      T* const to = matrix + at;
      LastRows::Row row = {at, weight, 0};
      LastRows::Row before;
      if (taps_.stored.per_channel(o) > 0) {
        row.col = col + first_position(g_, taps_, o);
        before = last.exchange(o, row);
      }
      const int64_t by = row.col - before.col;
      if (before.weight == weight && by >= 0) {
        std::fill(to, to + by, T(0.0f));
        std::copy(matrix + before.at, matrix + before.at + cols_ - by, to + by);
      } else {
        ClearedAhead cleared(to, to + cols_);
        write_row(weight, col, o, to, runs, cleared);
      }
      at += cols_;
    });
  }

 private:
  void write_row(int64_t weight, int64_t col, const Position& o, T* to, std::vector<TapRun>& runs,
                 ClearedAhead& cleared) const {
    list_runs(taps_, o.at[2], runs);
    write_planes(weight_ + weight, o, runs, to + col, cleared);
    cleared.until(to + cols_);
  }

  void write_planes(const T* kernel, const Position& o, const std::vector<TapRun>& runs, T* plane,
                    ClearedAhead& cleared) const {
    for (int64_t left = in_channels_; left > 0; left -= planes_at_once_) {
      const int64_t planes = std::min(planes_at_once_, left);
      cleared.until(plane + planes * in_positions_);
      visit_runs(
          g_, taps_, runs, o,
          [&](int64_t position, int64_t k, int64_t length) {
            copy_stepped(plane + position, in_positions_, kernel + k, weight_step_, planes, length);
          },
          [&](int64_t position, const TapGroup& group0, const TapGroup& group1,
              const TapGroup& group2) {
            for (int64_t n = 0; n < planes; ++n) {
              plane[n * in_positions_ + position] =
                  sum_of_taps(g_, taps_, kernel + n * weight_step_, group0, group1, group2);
            }
          });
      plane += planes * in_positions_;
      kernel += planes * weight_step_;
    }
  }

  const Geometry& g_;
  const RowTaps& taps_;
  const T* weight_;
  const int64_t cols_;
  const int64_t in_positions_;
  const int64_t in_channels_;
  const int64_t planes_at_once_;
  const int64_t weight_step_;  // from one input channel to the next
};

// Whether moving rows is faster than clearing memory and writing runs, each of which takes as long
// as some bytes of a copy: in memory that the allocator has kept, and in the first-level cache.
bool moves_rows(const Geometry& g, int64_t rows, int64_t row_bytes) {
  constexpr int64_t kMostRowBytes = int64_t{1} << 14;
  constexpr int64_t kRunBytes = 256;
  constexpr int64_t kFewRows = 64;
  const int64_t runs = g.axis[0].kernel * g.axis[1].kernel * g.in_channels_per_group();
  return rows >= kFewRows && rows * row_bytes < kLargeBlock && row_bytes <= kMostRowBytes &&
         row_bytes <= runs * kRunBytes;
}

template <typename T>
void run(const ConvToAffineParams& params, const ParallelFor& parallel_for) {
  const Geometry& g = params.geometry;
  const int64_t rows = params.row_stop - params.row_start;
  if (rows <= 0) return;
  const RowTables tables(g, params.row_start, params.row_stop);
  const RowTaps taps = tables.view();
  const T* bias = static_cast<const T*>(params.bias);
  T* matrix = static_cast<T*>(params.matrix);
  T* offset = static_cast<T*>(params.offset);
  const int64_t cols = g.cols();
  const int64_t out_positions = g.out_positions();

  const int64_t row_bytes = cols * static_cast<int64_t>(sizeof(T));
  std::optional<RowShapes> shapes;
  if (moves_rows(g, rows, row_bytes)) shapes.emplace(taps);

  advise_huge_pages(matrix, rows * row_bytes);
  const RowWriter<T> writer(params, taps);
  parallel_for(rows, grain_for(cols), [&](int64_t begin, int64_t end) {
    const int64_t first = params.row_start + begin;
    const int64_t last = params.row_start + end;
    shapes ? writer.write_moved(*shapes, first, last, matrix + begin * cols)
           : writer.write(first, last, matrix + begin * cols);
    for (int64_t n = begin; n < end; ++n) {
      offset[n] = bias != nullptr ? bias[(params.row_start + n) / out_positions] : T(0.0f);
    }
  });
}

}  // namespace

void launch_conv_to_affine_cpu(const ConvToAffineParams& params, const ParallelFor& parallel_for) {
  dispatch(params.dtype, [&](auto zero) { run<decltype(zero)>(params, parallel_for); });
}

}  // namespace linfuse
