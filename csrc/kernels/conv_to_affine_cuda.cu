// matrix[row, col] = sum over the taps k that tie (o, i) of weight[c_out, c_in, k]
//
// Terms
//   segment  kSegmentBytes consecutive bytes of the matrix, seen as one flat array: part of a row,
//            or several rows where rows are short
//   pane     the part of one row that lies in a segment
//   team     neighbouring threads that write the taps of one pane; all of the block where a segment
//            has one pane, a warp where it has many
//
// Who computes what: one block makes one segment at a time. It clears the segment in shared memory,
// while its first threads describe a pane each: what has to be divided is divided there.
// Its teams write the taps of the panes (team.h): where in a plane a kernel element falls is the
// same in every input channel, so that a thread finds it once and then goes from plane to plane.
// The block streams the segment out in 16-byte stores. Every byte of the matrix is written once.
// Where several taps meet in one element (circular, reflect, replicate), the one with the smallest
// kernel element on every axis owns it and adds the others in a fixed order: no atomics.
//
// Shared memory: 23 KB a block; registers let four blocks of 256 threads fit a multiprocessor, or
// two where taps repeat elements. Not handled here: empty problems (the launcher) and sizes beyond
// int64 (make_geometry).
#include <algorithm>

#include "conv_to_affine.h"
#include "grid_size.h"
#include "ptx.h"
#include "team.h"

namespace linfuse {
namespace {

constexpr int kThreads = 256;
// On a multiprocessor at least: so few that no register spills.
template <bool kRepeats>
constexpr int kBlocks = kRepeats ? 2 : 4;
constexpr int kLeastLanes = 32;  // of a team
constexpr int kSegmentBytes = 16384;
constexpr int kPieces = kSegmentBytes / kPieceBytes;
constexpr int kFewPanes = 32;  // described at a time
constexpr int kPanes = 128;    // described at a time, where rows are short
static_assert(kPieces % kThreads == 0, "all threads clear and store alike");

// True for the smallest kernel element of an axis that ties these two positions.
__device__ inline bool is_owner(const Geometry& g, int a, int64_t coarse, int64_t k, int64_t fine) {
#pragma unroll 1
  for (int64_t earlier = 0; earlier < k; ++earlier) {
    if (g.fine_position(a, coarse, earlier) == fine) return false;
  }
  return true;
}

template <typename T>
__device__ T sum_of_taps(const Geometry& g, const T* kernel, const Position& coarse,
                         const Position& first, const Position& fine) {
  Accumulate<T> total = 0;
#pragma unroll 1
  for (int64_t k0 = first.at[0]; k0 < g.axis[0].kernel; ++k0) {
    if (g.fine_position(0, coarse.at[0], k0) != fine.at[0]) continue;
#pragma unroll 1
    for (int64_t k1 = first.at[1]; k1 < g.axis[1].kernel; ++k1) {
      if (g.fine_position(1, coarse.at[1], k1) != fine.at[1]) continue;
#pragma unroll 1
      for (int64_t k2 = first.at[2]; k2 < g.axis[2].kernel; ++k2) {
        if (g.fine_position(2, coarse.at[2], k2) != fine.at[2]) continue;
        total += static_cast<Accumulate<T>>(
            kernel[(k0 * g.axis[1].kernel + k1) * g.axis[2].kernel + k2]);
      }
    }
  }
  return static_cast<T>(total);
}

struct Pane {
  Position o;
  int64_t weight;  // where the kernel elements of its first input channel begin
  int64_t plane;   // where that channel's plane begins; this and what follows, from the segment on
  int first;       // elements [first, last) of the segment; both are its end where there is none
  int last;
  int channels;  // of the row's group, that reach into it
};

// What a row, counted from row_start, has in the segment of `count` elements from `start` on.
__device__ inline void describe(const Geometry& g, int64_t row_start, int64_t row, int64_t start,
                                int count, Pane& pane) {
  const int64_t begin = row * g.cols() - start;
  const int64_t end = begin + g.cols();
  const int first = begin < count ? (begin < 0 ? 0 : static_cast<int>(begin)) : count;
  const int last = end < count ? static_cast<int>(end) : count;
  pane.first = first;
  pane.last = last;
  if (first == count) return;
  const int64_t out_positions = g.out_positions();
  const int64_t c_out = (row_start + row) / out_positions;
  pane.o = out_position(g, row_start + row - c_out * out_positions);
  const int64_t group_first = g.group_of_out_channel(c_out) * g.in_channels_per_group();
  int64_t c_in = (first - begin) / g.in_positions() - group_first;
  int64_t c_end = (last - 1 - begin) / g.in_positions() + 1 - group_first;
  if (c_in < 0) c_in = 0;
  if (c_end > g.in_channels_per_group()) c_end = g.in_channels_per_group();
  pane.channels = c_end > c_in ? static_cast<int>(c_end - c_in) : 0;
  pane.weight = g.weight_index(c_out, c_in);
  pane.plane = begin + (group_first + c_in) * g.in_positions();
}

// Writes what kernel element k contributes to a thread's channels of a pane.
template <typename T, bool kRepeats>
__device__ void write_taps(const Geometry& g, const T* weight, const Pane& pane,
                           const TeamShare& share, int64_t k, const Position& kernel, T* segment) {
  if (share.channel >= pane.channels) return;
  Position i;
  Position coarse;
  Position fine;
  for (int a = 0; a < kAxes; ++a) {
    coarse.at[a] = g.transposed ? g.coarse_position(a, pane.o.at[a], kernel.at[a]) : pane.o.at[a];
    fine.at[a] = g.transposed ? pane.o.at[a] : g.fine_position(a, pane.o.at[a], kernel.at[a]);
    i.at[a] = g.transposed ? coarse.at[a] : fine.at[a];
    if (i.at[a] < 0) return;
  }
  if constexpr (kRepeats) {
    for (int a = 0; a < kAxes; ++a) {
      if (!is_owner(g, a, coarse.at[a], kernel.at[a], fine.at[a])) return;
    }
  }
  const int64_t in_positions = g.in_positions();
  const int64_t weight_step = g.weight_step_in();
  const T* elements = weight + pane.weight + share.channel * weight_step;
  int64_t at = pane.plane + share.channel * in_positions +
               (i.at[0] * g.axis[1].in + i.at[1]) * g.axis[2].in + i.at[2];
  for (int c = share.channel; c < pane.channels; c += share.channel_step) {
    if (at >= pane.first && at < pane.last) {
      if constexpr (kRepeats) {
        segment[at] = sum_of_taps(g, elements, coarse, kernel, fine);
      } else {
        segment[at] = elements[k];
      }
    }
    at += share.channel_step * in_positions;
    elements += share.channel_step * weight_step;
  }
}

template <typename T, bool kRepeats>
__global__ void __launch_bounds__(kThreads, kBlocks<kRepeats>)
    conv_to_affine_kernel(Geometry g, const T* weight, T* matrix, int64_t row_start,
                          int64_t elements, int lanes, int panes_at_once) {
  constexpr int kSegment = kSegmentBytes / static_cast<int>(sizeof(T));
  __shared__ Piece pieces[kPieces];
  __shared__ Pane panes[kPanes];
  T* segment = reinterpret_cast<T*>(pieces);

  const int thread = static_cast<int>(threadIdx.x);
  const int team = thread / lanes;
  const int64_t kernel_positions = g.kernel_positions();
  const TeamShare share = team_share(thread % lanes, lanes, kernel_positions);
  const Position first_kernel = kernel_position(g, share.element);

  for (int64_t start = static_cast<int64_t>(blockIdx.x) * kSegment; start < elements;
       start += static_cast<int64_t>(gridDim.x) * kSegment) {
    const int count = elements - start < kSegment ? static_cast<int>(elements - start) : kSegment;
    // These are the pieces that the thread itself has stored before.
#pragma unroll
    for (int n = 0; n < kPieces; n += kThreads) pieces[n + thread] = Piece{};

    int64_t row = thread < panes_at_once ? start / g.cols() + thread : 0;
    bool is_done = false;
    while (!is_done) {
      if (thread < panes_at_once) describe(g, row_start, row, start, count, panes[thread]);
      row += panes_at_once;
      __syncthreads();
      for (int n = team; n < panes_at_once && panes[n].first < count; n += kThreads / lanes) {
        for (int64_t k = share.element; k < kernel_positions; k += share.element_step) {
          const Position kernel = k == share.element ? first_kernel : kernel_position(g, k);
          write_taps<T, kRepeats>(g, weight, panes[n], share, k, kernel, segment);
        }
      }
      is_done = panes[panes_at_once - 1].last == count;
      __syncthreads();
    }

    // The matrix is aligned to 16 bytes and so is every segment; only the last may end within one.
    auto* const to = reinterpret_cast<Piece*>(matrix + start);
#pragma unroll
    for (int n = 0; n < kPieces; n += kThreads) {
      if ((n + thread + 1) * kPiece<T> <= count) to[n + thread] = pieces[n + thread];
    }
    for (int n = count / kPiece<T> * kPiece<T> + thread; n < count; n += kThreads) {
      matrix[start + n] = segment[n];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    offset_kernel(Geometry g, const T* bias, T* offset, int64_t row_start, int64_t rows) {
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; n < rows;
       n += static_cast<int64_t>(gridDim.x) * kThreads) {
    offset[n] = bias != nullptr ? bias[(row_start + n) / g.out_positions()] : T(0.0f);
  }
}

// Threads of a team: as many as leave every pane of a segment one, a warp at least.
int lanes_for(int64_t panes) {
  int lanes = kThreads;
  while (lanes > kLeastLanes && lanes * panes > kThreads) lanes /= 2;
  return lanes;
}

template <typename T>
cudaError_t launch(const ConvToAffineParams& params, cudaStream_t stream) {
  const int64_t rows = params.row_stop - params.row_start;
  const int64_t elements = rows * params.geometry.cols();
  if (elements <= 0) return cudaSuccess;
  const auto kernel = params.geometry.taps_may_collide() ? conv_to_affine_kernel<T, true>
                                                         : conv_to_affine_kernel<T, false>;
  constexpr int64_t kSegment = kSegmentBytes / static_cast<int64_t>(sizeof(T));
  // Several for a block spread what it finds out once; few must be spread over the card.
  constexpr int64_t kManySegments = 1 << 12;
  constexpr int64_t kSegmentsPerBlock = 4;
  const int64_t segments = (elements - 1) / kSegment + 1;
  const unsigned blocks = grid_of(segments, segments < kManySegments ? 1 : kSegmentsPerBlock);
  const int lanes = lanes_for(kSegment / params.geometry.cols());
  kernel<<<blocks, kThreads, 0, stream>>>(
      params.geometry, static_cast<const T*>(params.weight), static_cast<T*>(params.matrix),
      params.row_start, elements, lanes, lanes == kLeastLanes ? kPanes : kFewPanes);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  offset_kernel<T><<<grid_of(rows, kThreads), kThreads, 0, stream>>>(
      params.geometry, static_cast<const T*>(params.bias), static_cast<T*>(params.offset),
      params.row_start, rows);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_conv_to_affine_cuda(const ConvToAffineParams& params, cudaStream_t stream) {
  return dispatch(params.dtype, [&](auto zero) { return launch<decltype(zero)>(params, stream); });
}

}  // namespace linfuse
