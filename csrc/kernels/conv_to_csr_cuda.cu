// values[e], columns[e] = the element e of the matrix that is a tap, row by row, by ascending
// column
//
// Who computes what: kLanes neighbouring threads write one row at a time, each every kLanes-th of
// its elements, so that stores lie side by side. Where a row starts is known in closed form
// (stored_taps.h), so that rows need nothing of each other: one pass, everything is written once.
// One thread writes the last pointer, behind all rows.
//
// Within a row, element number e has the digits (c_in, slot0, slot1, slot2), the last one fastest.
// A thread adds kLanes digit by digit and never divides in its loop.
//
// Memory: the tables of the axes are small and stay in cache; there is no shared memory. A row of
// fewer than kLanes elements leaves threads idle.
// Not handled here: sizes beyond the index type, which the op sees to.
#include "conv_to_csr.h"
#include "grid_size.h"
#include "row_taps.h"

namespace linfuse {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32;
constexpr int kBlocks = 2;  // on a multiprocessor at least: 128 registers a thread, so none spill
constexpr int kRowsPerBlock = kThreads / kLanes;

struct Digits {
  int64_t c_in;
  Position slot;
};

// The digits of a number up to kLanes in a row of output position o that has elements.
__device__ inline Digits digits_of(int number, const RowTaps& taps, const Position& o) {
  Digits digits;
  for (int a = kAxes - 1; a >= 0; --a) {
    const int64_t count = taps.stored.count(a, o.at[a]);
    const int base = static_cast<int>(count <= kLanes ? count : kLanes + 1);
    digits.slot.at[a] = number % base;
    number /= base;
  }
  digits.c_in = number;
  return digits;
}

__device__ inline void add(Digits& digits, const Digits& step, const RowTaps& taps,
                           const Position& o) {
  int64_t carry = 0;
  for (int a = kAxes - 1; a >= 0; --a) {
    const int64_t count = taps.stored.count(a, o.at[a]);
    const int64_t slot = digits.slot.at[a] + step.slot.at[a] + carry;
    carry = slot >= count ? 1 : 0;
    digits.slot.at[a] = carry != 0 ? slot - count : slot;
  }
  digits.c_in += step.c_in + carry;
}

template <typename T, typename Index>
__global__ void __launch_bounds__(kThreads, kBlocks)
    conv_to_csr_kernel(Geometry g, RowTaps taps, const T* weight, T* values, Index* columns,
                       Index* row_pointers, int64_t row_start, int64_t rows, int64_t stored) {
  if (blockIdx.x == 0 && threadIdx.x == 0) row_pointers[rows] = static_cast<Index>(stored);
  if (rows == 0) return;
  const int64_t first = taps.stored.before(g, row_start);
  const int64_t in_channels = g.in_channels_per_group();
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kLanes;
       n < rows; n += static_cast<int64_t>(gridDim.x) * kRowsPerBlock) {
    const int64_t c_out = (row_start + n) / g.out_positions();
    const Position o = out_position(g, (row_start + n) % g.out_positions());
    int64_t at = taps.stored.before(g, c_out, o) - first;
    if (lane == 0) row_pointers[n] = static_cast<Index>(at);
    if (taps.stored.per_channel(o) == 0) continue;

    const int64_t group_first = g.group_of_out_channel(c_out) * in_channels;
    const Digits step = digits_of(kLanes, taps, o);
    at += lane;
    for (Digits e = digits_of(lane, taps, o); e.c_in < in_channels; add(e, step, taps, o)) {
      const TapGroup& group0 = taps.begin(0, o.at[0])[e.slot.at[0]];
      const TapGroup& group1 = taps.begin(1, o.at[1])[e.slot.at[1]];
      const TapGroup& group2 = taps.begin(2, o.at[2])[e.slot.at[2]];
      const int64_t plane = (group_first + e.c_in) * g.axis[0].in + group0.position;
      const int64_t line = plane * g.axis[1].in + group1.position;
      columns[at] = static_cast<Index>(line * g.axis[2].in + group2.position);
      values[at] =
          sum_of_taps(g, taps, weight + g.weight_index(c_out, e.c_in), group0, group1, group2);
      at += kLanes;
    }
  }
}

template <typename T, typename Index>
cudaError_t launch(const ConvToCsrParams& params, cudaStream_t stream) {
  const int64_t rows = params.row_stop - params.row_start;
  conv_to_csr_kernel<T, Index><<<grid_of(rows / kRowsPerBlock + 1), kThreads, 0, stream>>>(
      params.geometry, params.taps, static_cast<const T*>(params.weight),
      static_cast<T*>(params.values), static_cast<Index*>(params.columns),
      static_cast<Index*>(params.row_pointers), params.row_start, rows, params.stored);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_conv_to_csr_cuda(const ConvToCsrParams& params, cudaStream_t stream) {
  return dispatch(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    return params.index32 ? launch<T, int32_t>(params, stream) : launch<T, int64_t>(params, stream);
  });
}

}  // namespace linfuse
