// matrix[row, col] = sum over the taps k that tie (o, i) of weight[c_out, c_in, k]
//
// Terms
//   segment  kSegmentBytes consecutive bytes of the matrix, seen as one flat array: part of a row,
//            or several rows where rows are short
//   pane     the part of one row that lies in a segment
//
// Who computes what: one block makes one segment at a time. It clears the segment in shared memory,
// its threads write the taps that fall into it (one thread per tap of a pane: an input channel of
// the group times a kernel element), and the block streams the segment out in 16-byte stores. Every
// byte of the matrix is written once, and no thread divides per element, only per tap.
// Where several taps meet in one element (circular, reflect, replicate), the one with the smallest
// kernel element on every axis owns it and adds the others in a fixed order: no atomics.
//
// Shared memory: 16 KB a block, so that eight blocks of 256 threads fill a multiprocessor.
// Not handled here: empty problems (the launcher) and sizes beyond int64 (make_geometry).
#include "conv_to_affine.h"
#include "grid_size.h"

namespace linfuse {
namespace {

constexpr int kThreads = 256;
constexpr int kSegmentBytes = 16384;

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

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

// Writes what kernel element k contributes to the pane [first_col, last_col) of a row.
template <typename T, bool kRepeats>
__device__ void write_tap(const Geometry& g, const T* weight, int64_t c_out, const Position& o,
                          int64_t c_in, int64_t k, int64_t first_col, int64_t last_col, T* pane) {
  const Position kernel = kernel_position(g, k);
  Position i;
  Position coarse;
  Position fine;
  for (int a = 0; a < kAxes; ++a) {
    coarse.at[a] = g.transposed ? g.coarse_position(a, o.at[a], kernel.at[a]) : o.at[a];
    fine.at[a] = g.transposed ? o.at[a] : g.fine_position(a, o.at[a], kernel.at[a]);
    i.at[a] = g.transposed ? coarse.at[a] : fine.at[a];
    if (i.at[a] < 0) return;
  }
  const int64_t col = g.column(c_out, c_in, i);
  if (col < first_col || col >= last_col) return;
  const T* elements = weight + g.weight_index(c_out, c_in);
  if constexpr (kRepeats) {
    for (int a = 0; a < kAxes; ++a) {
      if (!is_owner(g, a, coarse.at[a], kernel.at[a], fine.at[a])) return;
    }
    pane[col - first_col] = sum_of_taps(g, elements, coarse, kernel, fine);
  } else {
    pane[col - first_col] = elements[k];
  }
}

template <typename T, bool kRepeats>
__global__ void __launch_bounds__(kThreads)
    conv_to_affine_kernel(Geometry g, const T* weight, T* matrix, int64_t row_start,
                          int64_t elements) {
  constexpr int kSegment = kSegmentBytes / static_cast<int>(sizeof(T));
  __shared__ Bytes16 shared[kSegmentBytes / 16];
  T* segment = reinterpret_cast<T*>(shared);

  const int64_t cols = g.cols();
  const int64_t in_positions = g.in_positions();
  const int64_t in_channels = g.in_channels_per_group();
  const int64_t kernel_positions = g.kernel_positions();

  for (int64_t start = static_cast<int64_t>(blockIdx.x) * kSegment; start < elements;
       start += static_cast<int64_t>(gridDim.x) * kSegment) {
    const int64_t stop = start + kSegment < elements ? start + kSegment : elements;
    for (int n = threadIdx.x; n < kSegmentBytes / 16; n += kThreads) shared[n] = Bytes16{};
    __syncthreads();

    // Rows are walked in turn; a long row has one pane here, short rows have many.
    for (int64_t row = start / cols; row * cols < stop; ++row) {
      const int64_t row_begin = row * cols;
      const int64_t first_col = start > row_begin ? start - row_begin : 0;
      const int64_t last_col = stop - row_begin < cols ? stop - row_begin : cols;
      const int64_t c_out = (row_start + row) / g.out_positions();
      const Position o = out_position(g, (row_start + row) % g.out_positions());
      // Input channels of the group whose plane reaches into the pane.
      const int64_t group_first = g.group_of_out_channel(c_out) * in_channels;
      int64_t first_c_in = first_col / in_positions - group_first;
      int64_t last_c_in = (last_col - 1) / in_positions - group_first + 1;
      first_c_in = first_c_in < 0 ? 0 : first_c_in;
      last_c_in = last_c_in > in_channels ? in_channels : last_c_in;
      const int64_t taps = (last_c_in - first_c_in) * kernel_positions;
      T* pane = segment + (row_begin + first_col - start);
      for (int64_t tap = threadIdx.x; tap < taps; tap += kThreads) {
        write_tap<T, kRepeats>(g, weight, c_out, o, first_c_in + tap / kernel_positions,
                               tap % kernel_positions, first_col, last_col, pane);
      }
    }
    __syncthreads();

    // The matrix is aligned to 16 bytes and so is every segment; only the last may end within one.
    const int count = static_cast<int>(stop - start);
    constexpr int kPerStore = 16 / static_cast<int>(sizeof(T));
    Bytes16* to = reinterpret_cast<Bytes16*>(matrix + start);
    for (int n = threadIdx.x; n < count / kPerStore; n += kThreads) to[n] = shared[n];
    for (int n = count / kPerStore * kPerStore + threadIdx.x; n < count; n += kThreads) {
      matrix[start + n] = segment[n];
    }
    __syncthreads();
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

template <typename T>
cudaError_t launch(const ConvToAffineParams& params, cudaStream_t stream) {
  const int64_t rows = params.row_stop - params.row_start;
  const int64_t elements = rows * params.geometry.cols();
  if (elements <= 0) return cudaSuccess;
  const auto kernel = params.geometry.taps_may_collide() ? conv_to_affine_kernel<T, true>
                                                         : conv_to_affine_kernel<T, false>;
  kernel<<<grid_of(elements, kSegmentBytes / static_cast<int64_t>(sizeof(T))), kThreads, 0,
           stream>>>(params.geometry, static_cast<const T*>(params.weight),
                     static_cast<T*>(params.matrix), params.row_start, elements);
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
