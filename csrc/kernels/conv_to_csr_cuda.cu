// values[e], columns[e] = the element e of the matrix that is a tap, row by row, by ascending
// column
//
// Terms
//   team  neighbouring threads that write the elements of one row
//   slot  which element of an input channel of the row one is (stored_taps.h), counted on all axes
//
// Who computes what: one block makes up to kRows rows at a time. First a thread describes each:
// where a row starts is known in closed form (stored_taps.h), so that rows need nothing of each
// other. Then the teams write them in turn (team.h): a slot has the same kernel element and the
// same place in the plane in every input channel, so that a thread looks it up once and then goes
// from channel to channel. Neighbours write side by side. One pass, everything is written once.
//
// Memory: the tables of the axes are small and stay in cache; the rows' descriptions, 5 KB, are in
// shared memory. What a row's slots do not fill of a team, once or several times, is idle.
// Not handled here: sizes beyond the index type, which the op sees to.
#include <algorithm>

#include "conv_to_csr.h"
#include "grid_size.h"
#include "row_taps.h"
#include "team.h"

namespace linfuse {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 2;  // on a multiprocessor at least: 128 registers a thread, so none spill
constexpr int kMostLanes = 32;  // of a team, where there are rows enough
constexpr int kLeastLanes = 8;
constexpr int kRows = 64;  // described at a time

struct Row {
  int64_t at;      // its first element
  int64_t weight;  // where the kernel elements of its group's first input channel begin
  int64_t column;  // where that channel's plane begins
  const TapGroup* groups[kAxes];
  int64_t count1;  // groups on the two inner axes
  int64_t count2;
  int64_t slots;
};

// Describes the row of (c_out, o).
__device__ inline Row row_of(const Geometry& g, const RowTaps& taps, int64_t c_out,
                             const Position& o) {
  Row row;
  row.at = taps.stored.before(g, c_out, o);
  row.weight = g.weight_index(c_out, 0);
  row.column = g.column(c_out, 0, Position{});
  for (int a = 0; a < kAxes; ++a) row.groups[a] = taps.begin(a, o.at[a]);
  row.count1 = taps.stored.count(1, o.at[1]);
  row.count2 = taps.stored.count(2, o.at[2]);
  row.slots = taps.stored.per_channel(o);
  return row;
}

// Writes one slot of a thread's channels of a row.
template <typename T, typename Index, bool kRepeats>
__device__ void write_slot(const Geometry& g, const RowTaps& taps, const T* weight, const Row& row,
                           const TeamShare& share, int64_t slot, const Position& groups, T* values,
                           Index* columns) {
  const TapGroup& group0 = row.groups[0][groups.at[0]];
  const TapGroup& group1 = row.groups[1][groups.at[1]];
  const TapGroup& group2 = row.groups[2][groups.at[2]];
  const int64_t in_channels = g.in_channels_per_group();
  const int64_t in_positions = g.in_positions();
  const int64_t weight_step = g.weight_step_in();
  const T* elements = weight + row.weight + share.channel * weight_step;
  if constexpr (!kRepeats) {
    elements += (taps.kernel[0][group0.first] * g.axis[1].kernel + taps.kernel[1][group1.first]) *
                    g.axis[2].kernel +
                taps.kernel[2][group2.first];
  }
  int64_t column = row.column + share.channel * in_positions +
                   (group0.position * g.axis[1].in + group1.position) * g.axis[2].in +
                   group2.position;
  int64_t at = row.at + share.channel * row.slots + slot;
  for (int64_t c = share.channel; c < in_channels; c += share.channel_step) {
    columns[at] = static_cast<Index>(column);
    if constexpr (kRepeats) {
      values[at] = sum_of_taps(g, taps, elements, group0, group1, group2);
    } else {
      values[at] = *elements;
    }
    at += share.channel_step * row.slots;
    column += share.channel_step * in_positions;
    elements += share.channel_step * weight_step;
  }
}

template <typename T, typename Index, bool kRepeats>
__global__ void __launch_bounds__(kThreads, kBlocks)
    conv_to_csr_kernel(Geometry g, RowTaps taps, const T* weight, T* values, Index* columns,
                       Index* row_pointers, int64_t row_start, int64_t rows, int64_t stored,
                       int lanes, int rows_at_once) {
  __shared__ Row described[kRows];
  if (blockIdx.x == 0 && threadIdx.x == 0) row_pointers[rows] = static_cast<Index>(stored);
  if (rows == 0) return;
  const int64_t before = taps.stored.before(g, row_start);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % lanes;

  // What a thread does in one row, it mostly does in the next.
  TeamShare share{};
  Position groups{};  // of the share's first slot
  int64_t slots = 0;
  int64_t count1 = 0;
  int64_t count2 = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * rows_at_once; first < rows;
       first += static_cast<int64_t>(gridDim.x) * rows_at_once) {
    if (thread < rows_at_once && first + thread < rows) {
      const int64_t n = row_start + first + thread;
      const int64_t c_out = n / g.out_positions();
      Row row = row_of(g, taps, c_out, out_position(g, n - c_out * g.out_positions()));
      row.at -= before;
      row_pointers[first + thread] = static_cast<Index>(row.at);
      described[thread] = row;
    }
    __syncthreads();
    for (int n = thread / lanes; n < rows_at_once && first + n < rows; n += kThreads / lanes) {
      const Row& row = described[n];
      if (row.slots == 0) continue;
      if (row.slots != slots || row.count1 != count1 || row.count2 != count2) {
        slots = row.slots;
        count1 = row.count1;
        count2 = row.count2;
        share = team_share(lane, lanes, slots);
        groups = unravel(share.element, count1, count2);
      }
      for (int64_t slot = share.element; slot < slots; slot += share.element_step) {
        write_slot<T, Index, kRepeats>(
            g, taps, weight, row, share, slot,
            slot == share.element ? groups : unravel(slot, count1, count2), values, columns);
      }
    }
    __syncthreads();
  }
}

// Threads of a team: about as many as a row has elements, within limits; up to all of a block where
// rows are few and long.
int lanes_for(int64_t rows, int64_t elements) {
  int lanes = kMostLanes;
  while (lanes > kLeastLanes && elements <= lanes / 2) lanes /= 2;
  while (lanes < kThreads && elements > 4 * lanes && rows < kManyBlocks * (kThreads / lanes)) {
    lanes *= 2;
  }
  return lanes;
}

template <typename T, typename Index>
cudaError_t launch(const ConvToCsrParams& params, cudaStream_t stream) {
  const int64_t rows = params.row_stop - params.row_start;
  const auto kernel = params.geometry.taps_may_collide() ? conv_to_csr_kernel<T, Index, true>
                                                         : conv_to_csr_kernel<T, Index, false>;
  const int lanes = lanes_for(rows, rows > 0 ? params.stored / rows : 0);
  const auto rows_at_once =
      static_cast<int>(std::clamp<int64_t>(rows / kManyBlocks, kThreads / lanes, kRows));
  kernel<<<grid_of(rows / rows_at_once + 1), kThreads, 0, stream>>>(
      params.geometry, params.taps, static_cast<const T*>(params.weight),
      static_cast<T*>(params.values), static_cast<Index*>(params.columns),
      static_cast<Index*>(params.row_pointers), params.row_start, rows, params.stored, lanes,
      rows_at_once);
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
