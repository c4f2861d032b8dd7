// fused[f, (c_in, i)] = sum over the taps (o, k) of i and over c_out of
//                       linear[f, (c_out, o)] * weight[c_out, c_in, k]
//
// as a matrix product whose operands are packed first, so that what it sums over lies side by side
// and comes in pieces of 16 bytes; for groups of many channels. On tensor cores: halves as they
// are, float32 as three products for one.
//
// Terms, beside those of fuse_conv_linear_classes.h
//   line     the output channels of one group at one place, filled up with zeros to `depth`
//   chunk    so many features that their packed part of the Linear is no more than kMostLinear
//            bytes: it stays in the second-level cache until it was multiplied
//   segment  neighbouring positions of a class on the innermost axis, at most kWidth, all as wide
//   item     (segment, f, place in the segment); a row of the product
//   tile     kItems items by kChannels c_in of one group
//
// Who computes what. pack_weight_kernel: a thread makes a piece of weight[group, k, c_in] at a
// time. pack_linear_kernel: a block makes the lines [group, o] of one feature at a time, through
// shared memory, and with all of the Linear's row in hand also the fused bias. product_kernel: one
// block makes one tile at a time; for every slot that is a tap of any of its items, and every
// kDepth output channels, it copies a part of the items' lines and of the weight's to shared
// memory, and its warps multiply (warp_product.h).
//
// Order of items: a tile has few segments and many features. So nearly all its items share their
// taps, and what padding would have had is not multiplied, however small the images; and what is
// written lies side by side in runs of a segment.
//
// Memory: kStages stages of panels in shared memory, so that two are on their way while one is
// multiplied, with one barrier a step. Slots are the inner loop: neighbours among them read nearly
// the same lines, which they find in the first-level cache.
// Sums are made in a fixed order, each element is written once: equal bits in every run.
#include <algorithm>
#include <type_traits>

#include "block_sum.h"
#include "fuse_conv_linear.h"
#include "fuse_conv_linear_classes.h"
#include "warp_product.h"

namespace linfuse {
namespace {

constexpr int kSlots = 16;  // in the table at a time
constexpr int kStages = 3;
constexpr int64_t kWidth = 16;
constexpr int64_t kMostBlocks = int64_t{1} << 20;
// Each of the two packed operands; no more, as memory beside inputs and outputs is promised to be
// little, and as the second-level cache of a large card holds about 50 MB.
constexpr int64_t kMostLinear = int64_t{1} << 25;
constexpr int64_t kMostWeight = int64_t{1} << 25;
constexpr int64_t kManyTiles = 128;  // about one for each multiprocessor of a large card

template <typename T>
constexpr int kPiece = kPieceBytes / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kDepth = 4 * kPiece<T>;

// A block's warps, below each other and side by side, and what each of them makes: as much as
// registers hold, since what shared memory has to deliver goes down with it.
template <typename WarpsProduct, int kWarpsDown, int kAcross>
struct Shape {
  using Product = WarpsProduct;
  static constexpr int kWarpsAcross = kAcross;
  static constexpr int kThreads = 32 * kWarpsDown * kWarpsAcross;
  static constexpr int kItems = kWarpsDown * Product::kRows;
  static constexpr int kChannels = kWarpsAcross * Product::kCols;
  using PanelA = typename Product::template Panel<kItems>;
  using PanelB = typename Product::template Panel<kChannels>;
};

// For 128 input channels, 64 and 32. A warp that splits its operands holds two sums for each.
template <typename T>
struct ShapesOf {
  using Wide = Shape<WarpProduct<T, 4, 8>, 4, 2>;
  using Narrow = Shape<WarpProduct<T, 4, 8>, 4, 1>;
  using Slim = Shape<WarpProduct<T, 4, 4>, 4, 1>;
};
template <>
struct ShapesOf<float> {
  using Wide = Shape<SplitProduct<4, 4>, 2, 4>;
  using Narrow = Shape<SplitProduct<4, 4>, 4, 2>;
  using Slim = Shape<SplitProduct<4, 4>, 4, 1>;
};

// Calls visit(Shape{}) with the narrowest that takes all channels of a group, or the widest.
template <typename T, typename Visitor>
auto with_shape(const Geometry& g, const Visitor& visit) {
  using Shapes = ShapesOf<T>;
  const int64_t channels = g.in_channels_per_group();
  if (channels <= Shapes::Slim::kChannels) return visit(typename Shapes::Slim{});
  if (channels <= Shapes::Narrow::kChannels) return visit(typename Shapes::Narrow{});
  return visit(typename Shapes::Wide{});
}

int64_t depth_of(const Geometry& g, int64_t step) {
  return (g.out_channels_per_group() + step - 1) / step * step;
}

unsigned grid_of(int64_t blocks) { return static_cast<unsigned>(std::min(blocks, kMostBlocks)); }

// --- packing ------------------------------------------------------------------------------------

template <typename T>
__device__ void store_piece(T* to, const T (&values)[kPiece<T>]) {
  struct alignas(kPieceBytes) Values {
    T at[kPiece<T>];
  };
  Values piece;
#pragma unroll
  for (int n = 0; n < kPiece<T>; ++n) piece.at[n] = values[n];
  *reinterpret_cast<Values*>(to) = piece;
}

constexpr int kPackThreads = 256;

// packed[group, k, c_in, c_out]
template <typename T>
__global__ void __launch_bounds__(kPackThreads)
    pack_weight_kernel(Geometry g, const T* weight, T* packed, int64_t depth, int64_t pieces) {
  const int64_t in_channels = g.in_channels_per_group();
  const int64_t out_channels = g.out_channels_per_group();
  const int64_t step = g.weight_step_out();
  for (int64_t piece = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
       piece < pieces; piece += static_cast<int64_t>(gridDim.x) * kPackThreads) {
    const int64_t line = piece / (depth / kPiece<T>);
    const int64_t c_out = piece % (depth / kPiece<T>)*kPiece<T>;
    const int64_t c_in = line % in_channels;
    const int64_t k = line / in_channels % g.kernel_positions();
    const int64_t group = line / in_channels / g.kernel_positions();
    const T* from = weight + g.weight_index(group * out_channels, c_in) + k + c_out * step;
    T values[kPiece<T>];
#pragma unroll
    for (int n = 0; n < kPiece<T>; ++n) {
      values[n] = c_out + n < out_channels ? from[n * step] : T{};
    }
    store_piece(packed + piece * kPiece<T>, values);
  }
}

template <typename T>
struct LinearToPack {
  const T* linear;  // of the chunk's first feature
  int64_t feature_stride;
  int64_t row_stride;
  T* packed;
  int64_t depth;
  int64_t features;
  int64_t groups;
  int64_t channels;  // of a group
  int64_t positions;
  const T* conv_bias;    // or null
  const T* linear_bias;  // of the chunk's first feature, or null
  T* bias;               // likewise
};

// packed[f, group, o, c_out], and the fused bias.
template <typename T>
__global__ void __launch_bounds__(kPackThreads) pack_linear_kernel(LinearToPack<T> job) {
  using A = Accumulate<T>;
  constexpr int kPositions = 64;
  constexpr int kStride = kPositions + 2;  // so that a warp that reads a column meets no bank twice
  constexpr int kThreadsDown = kPackThreads / kPositions;
  static_assert(kPackThreads == kPositions * 4, "a thread stores one of the four pieces of a line");
  __shared__ T tile[kDepth<T>][kStride];
  __shared__ A partial[kPackThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int row = thread / kPositions;
  const int column = thread % kPositions;

  for (int64_t f = blockIdx.x; f < job.features; f += gridDim.x) {
    A total = 0;
    for (int64_t group = 0; group < job.groups; ++group) {
      const int64_t first_channel = group * job.channels;
      for (int64_t c_out = 0; c_out < job.depth; c_out += kDepth<T>) {
        const auto channels = static_cast<int>(
            job.channels - c_out < kDepth<T> ? job.channels - c_out : int64_t{kDepth<T>});
        for (int64_t o = 0; o < job.positions; o += kPositions) {
          const bool is_position = o + column < job.positions;
          const T* from =
              job.linear + f * job.feature_stride +
              ((first_channel + c_out + row) * job.positions + o + column) * job.row_stride;
          T values[kDepth<T> / kThreadsDown];
#pragma unroll
          for (int n = 0; n < kDepth<T> / kThreadsDown; ++n) {
            const bool is_there = is_position && row + n * kThreadsDown < channels;
            values[n] = is_there ? *from : T{};
            from += kThreadsDown * job.positions * job.row_stride;
          }
          __syncthreads();  // the tile before has been read
#pragma unroll
          for (int n = 0; n < kDepth<T> / kThreadsDown; ++n) {
            const int channel = row + n * kThreadsDown;
            tile[channel][column] = values[n];
            if (job.conv_bias != nullptr && channel < channels) {
              total += static_cast<A>(values[n]) *
                       static_cast<A>(job.conv_bias[first_channel + c_out + channel]);
            }
          }
          __syncthreads();
          const int place = thread / 4;
          const int piece = thread % 4 * kPiece<T>;
          if (o + place < job.positions) {
            T line[kPiece<T>];
#pragma unroll
            for (int n = 0; n < kPiece<T>; ++n) line[n] = tile[piece + n][place];
            const int64_t to = ((f * job.groups + group) * job.positions + o + place) * job.depth;
            store_piece(job.packed + to + c_out + piece, line);
          }
        }
      }
    }
    total = block_sum<kPackThreads>(total, partial);
    if (thread == 0) {
      const A linear_bias = job.linear_bias != nullptr ? static_cast<A>(job.linear_bias[f]) : A{0};
      job.bias[f] = static_cast<T>(total + linear_bias);
    }
  }
}

// --- the product --------------------------------------------------------------------------------

struct Item {
  bool is_there;
  int64_t f;
  Position i;
};

// The items of one class.
struct Items {
  int64_t segments;  // on the innermost axis
  int64_t width;     // of each
  int64_t count;

  LINFUSE_HD Items(const Class& c, int64_t features)
      : segments((c.count[2] + kWidth - 1) / kWidth),
        width((c.count[2] + segments - 1) / segments),
        count(c.count[0] * c.count[1] * segments * width * features) {}

  LINFUSE_HD Item at(int64_t item, const Classes& classes, const Class& c, int64_t features) const {
    const int64_t segment = item / width / features;
    const int64_t place = segment % segments * width + item % width;
    const int64_t outer = segment / segments;
    Item found;
    found.is_there = item < count && place < c.count[2];
    found.f = item / width % features;
    found.i.at[0] = c.first[0] + outer / c.count[1] * classes.step[0];
    found.i.at[1] = c.first[1] + outer % c.count[1] * classes.step[1];
    found.i.at[2] = c.first[2] + place * classes.step[2];
    return found;
  }
};

struct Tiles {
  int64_t across;  // of the input channels of a group
  int64_t down;    // of the items of the largest class
  int64_t count;   // of all groups and classes
};

template <typename Shape>
Tiles tiles_of(const Geometry& g, int64_t features) {
  const Classes classes = classes_of(g);
  Class largest{};
  for (int a = 0; a < kAxes; ++a) largest.count[a] = most_positions(g, classes, a);
  Tiles tiles;
  tiles.across = (g.in_channels_per_group() - 1) / Shape::kChannels + 1;
  tiles.down = (Items(largest, features).count - 1) / Shape::kItems + 1;
  tiles.count = tiles.across * tiles.down * classes.count() * g.groups;
  return tiles;
}

template <typename T>
struct Problem {
  Geometry geometry;
  Classes classes;
  const T* linear;  // packed, of the chunk
  const T* weight;  // packed
  T* fused;         // of the chunk's first feature
  int64_t features;
  int64_t depth;
  Tiles tiles;
};

struct Tile {
  Class c;
  int64_t group;
  int64_t first_item;
  int64_t first_c_in;
};

template <typename T>
__device__ Item item_of(const Problem<T>& problem, const Tile& tile, int n) {
  return Items(tile.c, problem.features)
      .at(tile.first_item + n, problem.classes, tile.c, problem.features);
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) product_kernel(Problem<T> problem) {
  using Product = typename Shape::Product;
  using PanelA = typename Shape::PanelA;
  using PanelB = typename Shape::PanelB;
  constexpr int kItems = Shape::kItems;
  constexpr int kRowsAtOnce = Shape::kThreads / 4;  // a thread copies one of a row's four pieces
  static_assert(kItems % kRowsAtOnce == 0 && Shape::kChannels % kRowsAtOnce == 0, "all copy alike");

  extern __shared__ __align__(kPieceBytes) unsigned char panels[];
  __shared__ int32_t
      line_of[kSlots][kItems];           // where an item's line begins, -1 where there is none
  __shared__ int32_t kernel_of[kSlots];  // where the weight's lines of the tile begin
  __shared__ Tile place;                 // in memory, as registers are for sums
  __shared__ int64_t to[kItems];         // where the items' elements of channel 0 go, -1 for none

  const Geometry& g = problem.geometry;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp_row = thread / 32 / Shape::kWarpsAcross * Product::kRows;
  const int warp_col = thread / 32 % Shape::kWarpsAcross * Product::kCols;
  const int piece = thread % 4 * kPiece<T>;
  const int64_t in_channels = g.in_channels_per_group();
  const auto depth = static_cast<int>(problem.depth);
  const auto panel_a = [&](int stage) {
    return reinterpret_cast<T*>(panels) + stage * (PanelA::kSize + PanelB::kSize);
  };
  const auto panel_b = [&](int stage) { return panel_a(stage) + PanelA::kSize; };

  for (int64_t tile = blockIdx.x; tile < problem.tiles.count; tile += gridDim.x) {
    __syncthreads();  // the tile before has read `place` and `to`
    if (thread == 0) {
      const int64_t rest = tile / problem.tiles.across;
      place.first_c_in = tile % problem.tiles.across * Shape::kChannels;
      place.c = problem.classes.at(g, rest % problem.classes.count());
      const int64_t down = rest / problem.classes.count();
      place.first_item = down % problem.tiles.down * kItems;
      place.group = down / problem.tiles.down;
    }
    __syncthreads();
    for (int n = thread; n < kItems; n += Shape::kThreads) {
      const Item item = item_of(problem, place, n);
      const int64_t first_c_out = place.group * g.out_channels_per_group();
      to[n] =
          item.is_there ? item.f * g.cols() + g.column(first_c_out, place.first_c_in, item.i) : -1;
    }

    float sums[Product::kSums] = {};
    for (int64_t first_slot = 0; first_slot < problem.classes.slot_count(g, place.c);
         first_slot += kSlots) {
      // Steps behind a barrier read neither table, and the votes below are barriers for the panels.
      const Position slots = problem.classes.slots(g, place.c);
      const int64_t slots_left = problem.classes.slot_count(g, place.c) - first_slot;
      const int slots_here = slots_left < kSlots ? static_cast<int>(slots_left) : kSlots;
      uint32_t taps = 0;  // a bit for each slot that is a tap of any item here
#pragma unroll 1
      for (int n = thread; n < kItems; n += Shape::kThreads) {
        const Item item = item_of(problem, place, n);
#pragma unroll 1
        for (int slot = 0; slot < slots_here; ++slot) {
          const Tap tap = problem.classes.tap(g, place.c, item.i,
                                              unravel(first_slot + slot, slots.at[1], slots.at[2]));
          const bool is_tap = item.is_there && tap.o >= 0;
          const int64_t line = (item.f * g.groups + place.group) * g.out_positions() + tap.o;
          line_of[slot][n] = is_tap ? static_cast<int32_t>(line * depth) : -1;
          if (is_tap) taps |= uint32_t{1} << slot;
          if (n != 0) continue;
          const int64_t kernel = place.group * g.kernel_positions() + tap.k;
          kernel_of[slot] = static_cast<int32_t>((kernel * in_channels + place.first_c_in) * depth);
        }
      }
      int steps = 0;
      uint32_t voted = 0;
#pragma unroll 1
      for (int slot = 0; slot < slots_here; ++slot) {
        if (__syncthreads_or((taps >> slot & 1) != 0) == 0) continue;
        voted |= uint32_t{1} << slot;
        ++steps;
      }
      steps *= depth / kDepth<T>;

      // Steps go through the slots of the table for some channels, then through those for the next.
      AsyncCopies copies;
      uint32_t left = voted;
      int c_out = steps > 0 ? 0 : depth;
      const auto channels = static_cast<int>(in_channels - place.first_c_in);
      const auto begin = [&](int stage) {
        if (c_out < depth) {
          const int slot = __ffs(static_cast<int>(left)) - 1;
          const T* const from = problem.linear + c_out + piece;
          T* const a = panel_a(stage);
#pragma unroll
          for (int row = 0; row < kItems; row += kRowsAtOnce) {
            const int32_t line = line_of[slot][row + thread / 4];
            copies.copy(a + PanelA::at(row + thread / 4, piece), from + (line < 0 ? 0 : line),
                        line >= 0);
          }
          const T* const kernels = problem.weight + kernel_of[slot] + c_out + piece;
          T* const b = panel_b(stage);
#pragma unroll
          for (int row = 0; row < Shape::kChannels; row += kRowsAtOnce) {
            const int channel = row + thread / 4;
            const bool is_there = channel < channels;
            copies.copy(b + PanelB::at(channel, piece), kernels + (is_there ? channel * depth : 0),
                        is_there);
          }
          left &= left - 1;
          if (left == 0) {
            left = voted;
            c_out += kDepth<T>;
          }
        }
        copies.commit();
      };
#pragma unroll
      for (int stage = 0; stage < kStages - 1; ++stage) begin(stage);
      int stage = 0;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        copies.template wait<kStages - 2>();
        __syncthreads();
        begin(stage == 0 ? kStages - 1 : stage - 1);
        Product::template add<PanelA, PanelB>(panel_a(stage), panel_b(stage), warp_row, warp_col,
                                              lane, sums);
        stage = stage == kStages - 1 ? 0 : stage + 1;
      }
    }

    __syncthreads();  // `to` is there, even if there was no step
    write_sums<Product>(sums, warp_row, warp_col, lane, to, in_channels - place.first_c_in,
                        g.in_positions(), problem.fused);
  }
}

// --- launching ----------------------------------------------------------------------------------

template <typename T, typename Shape>
cudaError_t launch_product(Problem<T> problem, cudaStream_t stream) {
  constexpr int kBytes =
      kStages * (Shape::PanelA::kSize + Shape::PanelB::kSize) * static_cast<int>(sizeof(T));
  problem.tiles = tiles_of<Shape>(problem.geometry, problem.features);
  const auto kernel = product_kernel<T, Shape>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid_of(problem.tiles.count), Shape::kThreads, kBytes, stream>>>(problem);
  return cudaGetLastError();
}

// How many features are packed at a time: as many as fit, in chunks of about one size.
int64_t chunk_of(int64_t features, int64_t bytes_of_feature, int64_t most_bytes) {
  const int64_t most = std::max(int64_t{1}, most_bytes / bytes_of_feature);
  const int64_t chunks = (features + most - 1) / most;
  return (features + chunks - 1) / chunks;
}

template <typename T>
struct PackedSizes {
  int64_t depth;
  int64_t feature;  // bytes
  int64_t weight;   // bytes

  explicit PackedSizes(const Geometry& g)
      : depth(depth_of(g, kDepth<T>)),
        feature(g.groups * g.out_positions() * depth * static_cast<int64_t>(sizeof(T))),
        weight(g.groups * g.kernel_positions() * g.in_channels_per_group() * depth *
               static_cast<int64_t>(sizeof(T))) {}
};

template <typename T>
cudaError_t launch(const FuseConvLinearParams& params, cudaStream_t stream,
                   const Allocate& allocate, int64_t most_bytes) {
  const Geometry& g = params.geometry;
  const PackedSizes<T> sizes(g);
  const int64_t chunk = chunk_of(params.features, sizes.feature, most_bytes);
  auto* const linear = static_cast<T*>(allocate(chunk * sizes.feature));
  auto* const weight = static_cast<T*>(allocate(sizes.weight));

  const int64_t pieces = sizes.weight / kPieceBytes;
  pack_weight_kernel<T><<<grid_of((pieces - 1) / kPackThreads + 1), kPackThreads, 0, stream>>>(
      g, static_cast<const T*>(params.conv_weight), weight, sizes.depth, pieces);
  cudaError_t error = cudaGetLastError();

  LinearToPack<T> job{};
  job.feature_stride = params.linear_stride.row;
  job.row_stride = params.linear_stride.position;
  job.packed = linear;
  job.depth = sizes.depth;
  job.groups = g.groups;
  job.channels = g.out_channels_per_group();
  job.positions = g.out_positions();
  job.conv_bias = static_cast<const T*>(params.conv_bias);
  Problem<T> problem{};
  problem.geometry = g;
  problem.classes = classes_of(g);
  problem.linear = linear;
  problem.weight = weight;
  problem.depth = sizes.depth;
  for (int64_t f = 0; f < params.features && error == cudaSuccess; f += chunk) {
    job.features = problem.features = std::min(chunk, params.features - f);
    job.linear = static_cast<const T*>(params.linear_weight) + f * job.feature_stride;
    job.linear_bias =
        params.linear_bias == nullptr ? nullptr : static_cast<const T*>(params.linear_bias) + f;
    job.bias = static_cast<T*>(params.bias) + f;
    problem.fused = static_cast<T*>(params.weight) + f * g.cols();
    pack_linear_kernel<T><<<grid_of(job.features), kPackThreads, 0, stream>>>(job);
    error = cudaGetLastError();
    if (error != cudaSuccess) break;
    error = with_shape<T>(
        g, [&](auto shape) { return launch_product<T, decltype(shape)>(problem, stream); });
  }
  return error;
}

// Worth packing: lines that are not mostly filling, and enough tiles for everyone. Otherwise, and
// where a feature's lines or the weight's are too much to hold, there are the ways without memory.
template <typename T>
bool pays(const FuseConvLinearParams& params) {
  constexpr int64_t kLeastChannels = 16;
  const Geometry& g = params.geometry;
  const PackedSizes<T> sizes(g);
  if (g.in_channels_per_group() < kLeastChannels ||
      g.out_channels_per_group() * 3 < sizes.depth * 2 || sizes.feature > kMostLinear ||
      sizes.weight > kMostWeight) {
    return false;
  }
  const int64_t chunk = chunk_of(params.features, sizes.feature, kMostLinear);
  return with_shape<T>(
      g, [&](auto shape) { return tiles_of<decltype(shape)>(g, chunk).count >= kManyTiles; });
}

// Calls visit(T{}) for the types that go this way, and returns `other` for double, whose tensor
// cores are fed well enough without packing.
template <typename Result, typename Visitor>
Result dispatch_packed(DType dtype, Result other, const Visitor& visit) {
  return dispatch(dtype, [&](auto zero) -> Result {
    if constexpr (std::is_same_v<decltype(zero), double>) {
      return other;
    } else {
      return visit(zero);
    }
  });
}

}  // namespace

bool goes_by_packed_cuda(const FuseConvLinearParams& params) {
  return dispatch_packed(params.dtype, false,
                         [&](auto zero) { return pays<decltype(zero)>(params); });
}

cudaError_t launch_fuse_conv_linear_by_packed_cuda(const FuseConvLinearParams& params,
                                                   cudaStream_t stream, const Allocate& allocate,
                                                   int64_t most_bytes) {
  if (params.features == 0) return cudaSuccess;
  return dispatch_packed(params.dtype, cudaErrorInvalidValue, [&](auto zero) {
    return launch<decltype(zero)>(params, stream, allocate, std::min(most_bytes, kMostLinear));
  });
}

}  // namespace linfuse
