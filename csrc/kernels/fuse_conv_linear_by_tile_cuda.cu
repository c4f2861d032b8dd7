// fused[f, (c_in, i)] = sum over the taps (o, k) of i and over c_out of
//                       linear[f, (c_out, o)] * weight[c_out, c_in, k]
//
// as one matrix product that reads and writes N, C, spatial as they lie.
//
// Terms, beside those of fuse_conv_linear_classes.h
//   item    (f, i) with i of one class; a row of the product
//   tile    kItems items by kChannels c_in of one group
//
// Who computes what: one block makes one tile at a time. For every slot that is a tap of any of its
// items, and every kDepth output channels, the block brings linear[f, (c_out, o)] and
// weight[c_out, c_in, k] to shared memory, where o is the one that the slot ties to the item; its
// warps multiply (warp_product.h). A thread always brings elements of the same item, whose o for
// the slots at hand it keeps in a table. Items that a slot does not reach take zeros.
//
// Order of items: by feature first, so that neighbours are neighbouring i and so are the o that
// they read. Where most slots would not reach most positions, by position first: a tile then is one
// position, nothing is multiplied in vain, and each element that is read has a sector to itself.
//
// Memory: two stages of panels, so that a step has one barrier and the loads of the next are under
// way during it: 27 KB, and 16 KB of the table. Each element of the Linear is read once per
// tap and kChannels input channels, each weight once per tap and kItems items; neighbouring slots
// find their lines in the first-level cache, for which the slots are the inner loop.
// Sums are made in a fixed order, each element is written once: equal bits in every run.
#include "fuse_conv_linear.h"
#include "fuse_conv_linear_classes.h"
#include "grid_size.h"
#include "warp_product.h"

namespace linfuse {
namespace {

constexpr int kWarpsDown = 2;
constexpr int kWarpsAcross = 2;
constexpr int kThreads = 32 * kWarpsDown * kWarpsAcross;
constexpr int kSlots = 16;  // in the table at a time

// Large: 64 sums a thread, 32 of double; with operands on their way they fit 255 registers, and two
// blocks a multiprocessor. Small: so that a small product still has a block for everyone.
template <typename T, bool kIsLarge>
using ProductOf = WarpProduct<T, kIsLarge ? 4 : 1, kIsLarge ? 4 : 1>;
constexpr int64_t kManyTiles = 256;  // two for each of the multiprocessors of a large card

template <typename T>
struct Problem {
  Geometry geometry;
  Classes classes;
  const T* linear;
  int64_t feature_stride;
  int64_t row_stride;
  const T* weight;
  T* fused;
  int64_t features;
  bool by_position;
  int64_t channel_tiles;
  int64_t item_tiles;  // of the largest class
  int64_t tiles;
};

template <typename T, bool kIsLarge>
__global__ void __launch_bounds__(kThreads, 2) by_tile_kernel(Problem<T> problem) {
  using Product = ProductOf<T, kIsLarge>;
  constexpr int kItems = kWarpsDown * Product::kRows;
  constexpr int kChannels = kWarpsAcross * Product::kCols;
  using PanelA = typename Product::template Panel<kItems>;
  using PanelB = typename Product::template Panel<kChannels>;
  constexpr int kDepth = PanelA::kDepth;
  constexpr int kLoadsA = kItems * kDepth / kThreads;
  constexpr int kLoadsB = kChannels * kDepth / kThreads;
  static_assert(kThreads % kItems == 0 && kThreads % kChannels == 0, "a thread stays with its row");

  __shared__ alignas(16) T panels_a[2][PanelA::kSize];
  __shared__ alignas(16) T panels_b[2][PanelB::kSize];
  __shared__ int64_t positions_of[kSlots][kThreads];  // a thread's o, -1 where there is none
  __shared__ Shift shift_of[kSlots];
  __shared__ int64_t to[kItems];  // where the items' elements of channel 0 go, -1 beyond the last

  const Geometry& g = problem.geometry;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp_row = thread / 32 / kWarpsAcross * Product::kRows;
  const int warp_col = thread / 32 % kWarpsAcross * Product::kCols;
  const int row_a = thread % kItems;
  const int depth_a = thread / kItems * kLoadsA;
  const int row_b = thread % kChannels;
  const int depth_b = thread / kChannels * kLoadsB;
  const int64_t in_channels = g.in_channels_per_group();
  const int64_t out_channels = g.out_channels_per_group();
  const int64_t weight_step = g.weight_step_out();
  const int64_t channel_step = g.out_positions() * problem.row_stride;
  const int64_t classes = problem.classes.count();
  int stage = 0;

  for (int64_t tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
    const int64_t first_c_in = tile % problem.channel_tiles * kChannels;
    int64_t rest = tile / problem.channel_tiles;
    const Class c = problem.classes.at(g, rest % classes);
    rest /= classes;
    const int64_t first_item = rest % problem.item_tiles * kItems;
    const int64_t group = rest / problem.item_tiles;
    const int64_t items = problem.features * c.positions();
    if (first_item >= items) continue;

    // This thread's item, and the elements that it brings.
    const bool is_item = first_item + row_a < items;
    const int64_t item = is_item ? first_item + row_a : first_item;
    const int64_t f = problem.by_position ? item % problem.features : item / c.positions();
    // Found anew where it is needed: registers are for sums.
    const auto within_class = [&] {
      return unravel(problem.by_position ? item / problem.features : item % c.positions(),
                     c.count[1], c.count[2]);
    };
    const int64_t first_c_out = group * out_channels;
    const int64_t from_a = f * problem.feature_stride + (first_c_out + depth_a) * channel_step;
    const bool is_channel = first_c_in + row_b < in_channels;
    const int64_t from_b =
        g.weight_index(first_c_out, is_channel ? first_c_in + row_b : 0) + depth_b * weight_step;

    __syncthreads();  // the tile before has read `to`
    if (thread < kItems) {
      const int64_t column =
          g.column(first_c_out, first_c_in, problem.classes.position(c, within_class()));
      to[thread] = is_item ? f * g.cols() + column : -1;
    }

    T loads_a[kLoadsA];
    T loads_b[kLoadsB];
    const auto load = [&](int slot, int64_t c_out) {
      const int64_t o = positions_of[slot][thread];
      const auto channels =
          static_cast<int>(out_channels - c_out < kDepth ? out_channels - c_out : int64_t{kDepth});
      const int taps_a = o >= 0 ? channels - depth_a : 0;
      const int taps_b = is_channel ? channels - depth_b : 0;
      const T* linear = problem.linear + from_a + c_out * channel_step;
      int64_t at = o * problem.row_stride;
#pragma unroll
      for (int n = 0; n < kLoadsA; ++n, at += channel_step) {
        loads_a[n] = n < taps_a ? linear[at] : T{};
      }
      const T* weight = problem.weight + from_b + c_out * weight_step;
      at = shift_of[slot].k;
#pragma unroll
      for (int n = 0; n < kLoadsB; ++n, at += weight_step) {
        loads_b[n] = n < taps_b ? weight[at] : T{};
      }
    };

    Accumulate<T> sums[Product::kSums] = {};
    const int64_t slot_count = problem.classes.slot_count(g, c);
    for (int64_t first_slot = 0; first_slot < slot_count; first_slot += kSlots) {
      const Position slots = problem.classes.slots(g, c);
      const Position within = within_class();
      const int64_t slots_left = slot_count - first_slot;
      const int slots_here = slots_left < kSlots ? static_cast<int>(slots_left) : kSlots;
      // The round before reads its table ahead of its last barrier.
      if (thread < slots_here) {
        const Shift shift =
            problem.classes.shift(g, c, unravel(first_slot + thread, slots.at[1], slots.at[2]));
        shift_of[thread] = shift;
      }
      __syncthreads();
      uint32_t taps = 0;  // a bit for each slot that is a tap of any item here
#pragma unroll 1
      for (int n = 0; n < slots_here; ++n) {
        const int64_t o =
            is_item ? problem.classes.out_of(g, c, within, shift_of[n], first_slot + n, slots) : -1;
        positions_of[n][thread] = o;
        if (__syncthreads_or(o >= 0)) taps |= uint32_t{1} << n;
      }
      if (taps == 0) continue;

      // Steps go through the slots of the table for some channels, then through those for the next.
      uint32_t left = taps;
      int64_t c_out = 0;
      load(__ffs(static_cast<int>(left)) - 1, c_out);
      while (c_out < out_channels) {
        PanelA::store(panels_a[stage], row_a, depth_a, loads_a);
        PanelB::store(panels_b[stage], row_b, depth_b, loads_b);
        __syncthreads();
        left &= left - 1;
        if (left == 0) {
          left = taps;
          c_out += kDepth;
        }
        if (c_out < out_channels) load(__ffs(static_cast<int>(left)) - 1, c_out);
        Product::template add<PanelA, PanelB>(panels_a[stage], panels_b[stage], warp_row, warp_col,
                                              lane, sums);
        stage ^= 1;
      }
    }

    __syncthreads();  // `to` is there, even if there was no step
    write_sums<Product>(sums, warp_row, warp_col, lane, to, in_channels - first_c_in,
                        g.in_positions(), problem.fused);
  }
}

// How many of an axis's pairs of a position and a kernel element of its class are taps.
double share_of_taps(const Geometry& g, int a) {
  const Axis& axis = g.axis[a];
  double taps = 0;
  for (int64_t k = 0; k < axis.kernel; ++k) {
    // 0 <= coarse * stride + shift < fine
    const int64_t shift = k * axis.dilation - axis.pad_low;
    const int64_t first = shift >= 0 ? 0 : (-shift - 1) / axis.stride + 1;
    const int64_t reach = g.fine_size(a) - 1 - shift;
    int64_t stop = reach < 0 ? 0 : reach / axis.stride + 1;
    if (stop > g.coarse_size(a)) stop = g.coarse_size(a);
    if (stop > first) taps += static_cast<double>(stop - first);
  }
  const auto pairs = static_cast<double>(axis.in) * static_cast<double>(axis.kernel);
  return taps / (g.transposed ? pairs : pairs / static_cast<double>(axis.stride));
}

// Cuts the product into tiles, and returns how many they are.
template <typename Product, typename T>
int64_t cut(Problem<T>& problem, int64_t items) {
  constexpr int64_t kItems = kWarpsDown * Product::kRows;
  constexpr int64_t kChannels = kWarpsAcross * Product::kCols;
  const Geometry& g = problem.geometry;
  problem.channel_tiles = (g.in_channels_per_group() - 1) / kChannels + 1;
  problem.item_tiles = (items - 1) / kItems + 1;
  problem.tiles = problem.channel_tiles * problem.classes.count() * problem.item_tiles * g.groups;
  return problem.tiles;
}

template <typename T>
cudaError_t launch(const FuseConvLinearParams& params, TileSize size, cudaStream_t stream) {
  constexpr double kFewTaps = 0.5;
  const Geometry& g = params.geometry;
  Problem<T> problem{};
  problem.geometry = g;
  problem.classes = classes_of(g);
  problem.linear = static_cast<const T*>(params.linear_weight);
  problem.feature_stride = params.linear_stride.row;
  problem.row_stride = params.linear_stride.position;
  problem.weight = static_cast<const T*>(params.conv_weight);
  problem.fused = static_cast<T*>(params.weight);
  problem.features = params.features;
  double share = 1;
  int64_t items = params.features;  // of the largest class
  for (int a = 0; a < kAxes; ++a) {
    share *= share_of_taps(g, a);
    items *= most_positions(g, problem.classes, a);
  }
  problem.by_position = share < kFewTaps;
  if (items <= 0) return cudaSuccess;
  const bool is_large =
      cut<ProductOf<T, true>>(problem, items) >= kManyTiles || size == TileSize::kLarge;
  if (!is_large) cut<ProductOf<T, false>>(problem, items);
  const auto kernel = is_large ? by_tile_kernel<T, true> : by_tile_kernel<T, false>;
  kernel<<<grid_of(problem.tiles), kThreads, 0, stream>>>(problem);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_fuse_conv_linear_by_tile_cuda(const FuseConvLinearParams& params,
                                                 cudaStream_t stream, TileSize size) {
  return dispatch(params.dtype,
                  [&](auto zero) { return launch<decltype(zero)>(params, size, stream); });
}

}  // namespace linfuse
