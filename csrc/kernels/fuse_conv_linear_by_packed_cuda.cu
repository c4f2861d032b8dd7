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
//            bytes, so that it can stay in the second-level cache until it was multiplied
//   segment  neighbouring positions of a class on the innermost axis, at most kWidth, all as wide
//   item     (segment, f, place in the segment); a row of the product
//   tile     kItems items by kChannels c_in of one group
//
// Who computes what. For each chunk its part of the Linear is packed, and with it parts of the
// fused bias made (fuse_conv_linear_pack_cuda.cu), which are added up
// (fuse_conv_linear_bias_cuda.cu). Then one block makes one tile at a time: for every slot that is
// a tap of any of its items, and every kDepth output channels, a step copies a part of the items'
// lines and of the weight's to shared memory, and the warps multiply (warp_product.h).
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

#include "fuse_conv_linear_bias.h"
#include "fuse_conv_linear_classes.h"
#include "fuse_conv_linear_pack.h"
#include "grid_size.h"
#include "warp_product.h"

namespace linfuse {
namespace {

constexpr int kSlots = 16;  // in the table at a time
constexpr int kStages = 3;
constexpr int64_t kWidth = 16;
// Each of the two packed operands; no more, as memory beside inputs and outputs is promised to be
// little, and the second-level cache of a large card holds about 50 MB.
constexpr int64_t kMostLinear = int64_t{1} << 25;
constexpr int64_t kMostWeight = int64_t{1} << 25;
constexpr int64_t kManyTiles = 128;  // about one for each multiprocessor of a large card

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

// --- the product --------------------------------------------------------------------------------

struct Item {
  bool is_there;
  int64_t f;
  Position n;  // among the positions of the class
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

  LINFUSE_HD Item at(int64_t number, const Class& c, int64_t features) const {
    const int64_t segment = number / width / features;
    const int64_t outer = segment / segments;
    Item item;
    item.f = number / width % features;
    item.n.at[0] = outer / c.count[1];
    item.n.at[1] = outer % c.count[1];
    item.n.at[2] = segment % segments * width + number % width;
    item.is_there = number < count && item.n.at[2] < c.count[2];
    return item;
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
  int64_t in_channels;  // of a group
  int64_t depth;
  Tiles tiles;
};

struct Tile {
  Class c;
  int64_t group;
  int64_t first_item;
  int64_t first_c_in;
};

// A block's shared memory beside its panels. The tile is here as registers are for sums.
template <int kItems>
struct Tables {
  Tile tile;
  Shift shift[kSlots];
  int64_t to[kItems];               // where the items' elements of channel 0 go, -1 for none
  int32_t line_of[kSlots][kItems];  // where an item's line begins, -1 where there is none
  int32_t kernel_of[kSlots];        // where the weight's lines of the tile begin
};

template <typename T>
__device__ Item item_of(const Problem<T>& problem, const Tile& tile, int n) {
  return Items(tile.c, problem.features).at(tile.first_item + n, tile.c, problem.features);
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) product_kernel(Problem<T> problem) {
  using Product = typename Shape::Product;
  using PanelA = typename Shape::PanelA;
  using PanelB = typename Shape::PanelB;
  constexpr int kItems = Shape::kItems;
  constexpr int kRowsAtOnce = Shape::kThreads / 4;  // a thread copies one of a row's four pieces
  static_assert(kItems % kRowsAtOnce == 0 && Shape::kChannels % kRowsAtOnce == 0, "all copy alike");
  static_assert(kStages >= 2, "what a step reads of the tables is read before its last barrier");

  extern __shared__ __align__(kPieceBytes) unsigned char panels[];
  __shared__ Tables<kItems> tables;

  const Geometry& g = problem.geometry;
  const Tile& tile = tables.tile;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp_row = thread / 32 / Shape::kWarpsAcross * Product::kRows;
  const int warp_col = thread / 32 % Shape::kWarpsAcross * Product::kCols;
  const int row_at_once = thread / 4;
  const int within = thread % 4 * kPiece<T>;  // a row
  const auto depth = static_cast<int>(problem.depth);
  const auto panel_a = [&](int stage) {
    return reinterpret_cast<T*>(panels) + stage * (PanelA::kSize + PanelB::kSize);
  };
  const auto panel_b = [&](int stage) { return panel_a(stage) + PanelA::kSize; };

  for (int64_t number = blockIdx.x; number < problem.tiles.count; number += gridDim.x) {
    __syncthreads();  // the tile before has been written
    if (thread == 0) {
      const int64_t rest = number / problem.tiles.across;
      const int64_t down = rest / problem.classes.count();
      tables.tile.first_c_in = number % problem.tiles.across * Shape::kChannels;
      tables.tile.c = problem.classes.at(g, rest % problem.classes.count());
      tables.tile.first_item = down % problem.tiles.down * kItems;
      tables.tile.group = down / problem.tiles.down;
    }
    __syncthreads();
    for (int n = thread; n < kItems; n += Shape::kThreads) {
      const Item item = item_of(problem, tile, n);
      const int64_t column = g.column(tile.group * g.out_channels_per_group(), tile.first_c_in,
                                      problem.classes.position(tile.c, item.n));
      tables.to[n] = item.is_there ? item.f * g.cols() + column : -1;
    }

    float sums[Product::kSums] = {};
    for (int64_t first_slot = 0; first_slot < problem.classes.slot_count(g, tile.c);
         first_slot += kSlots) {
      const Position slots = problem.classes.slots(g, tile.c);
      const int64_t slots_left = problem.classes.slot_count(g, tile.c) - first_slot;
      const int slots_here = slots_left < kSlots ? static_cast<int>(slots_left) : kSlots;
      // The round before reads its tables ahead of its last step's barrier.
      if (thread < slots_here) {
        const Shift shift = problem.classes.shift(
            g, tile.c, unravel(first_slot + thread, slots.at[1], slots.at[2]));
        tables.shift[thread] = shift;
        const int64_t kernel = tile.group * g.kernel_positions() + shift.k;
        tables.kernel_of[thread] =
            static_cast<int32_t>((kernel * problem.in_channels + tile.first_c_in) * depth);
      }
      __syncthreads();
      uint32_t taps = 0;  // a bit for each slot that is a tap of one of its items
#pragma unroll 1
      for (int n = thread; n < kItems; n += Shape::kThreads) {
        const Item item = item_of(problem, tile, n);
        const int64_t first_line = (item.f * g.groups + tile.group) * g.out_positions();
#pragma unroll 1
        for (int slot = 0; slot < slots_here; ++slot) {
          const int64_t o = item.is_there
                                ? problem.classes.out_of(g, tile.c, item.n, tables.shift[slot],
                                                         first_slot + slot, slots)
                                : -1;
          tables.line_of[slot][n] = o >= 0 ? static_cast<int32_t>((first_line + o) * depth) : -1;
          if (o >= 0) taps |= uint32_t{1} << slot;
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
      const auto channels = static_cast<int>(problem.in_channels - tile.first_c_in);
      const auto begin = [&](int stage) {
        if (c_out < depth) {
          const int slot = __ffs(static_cast<int>(left)) - 1;
          const T* const lines = problem.linear + c_out + within;
          T* const a = panel_a(stage);
#pragma unroll
          for (int n = 0; n < kItems; n += kRowsAtOnce) {
            const int row = n + row_at_once;
            const int32_t line = tables.line_of[slot][row];
            copies.copy(a + PanelA::at(row, within), lines + (line < 0 ? 0 : line), line >= 0);
          }
          const T* const kernels = problem.weight + tables.kernel_of[slot] + c_out + within;
          T* const b = panel_b(stage);
#pragma unroll
          for (int n = 0; n < Shape::kChannels; n += kRowsAtOnce) {
            const int row = n + row_at_once;
            const bool is_there = row < channels;
            copies.copy(b + PanelB::at(row, within), kernels + (is_there ? row * depth : 0),
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
    write_sums<Product>(sums, warp_row, warp_col, lane, tables.to,
                        problem.in_channels - tile.first_c_in, g.in_positions(), problem.fused);
  }
}

// --- launching ----------------------------------------------------------------------------------

template <typename T, typename Shape>
constexpr int kPanelBytes =
    kStages * (Shape::PanelA::kSize + Shape::PanelB::kSize) * static_cast<int>(sizeof(T));

// The error, which the next one who asks is not told again.
cudaError_t forgotten(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}

// Lets the kernel have its panels on the current card.
template <typename T, typename Shape>
cudaError_t allow_panels() {
  return forgotten(cudaFuncSetAttribute(product_kernel<T, Shape>,
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        kPanelBytes<T, Shape>));
}

// Blocks of the product that the current card runs at a time; 1 where it does not say.
template <typename T, typename Shape>
int64_t blocks_at_once() {
  int device = 0;
  int multiprocessors = 0;
  int blocks = 0;
  const bool is_known =
      forgotten(cudaGetDevice(&device)) == cudaSuccess &&
      forgotten(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)) ==
          cudaSuccess &&
      forgotten(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &blocks, product_kernel<T, Shape>, Shape::kThreads, kPanelBytes<T, Shape>)) ==
          cudaSuccess;
  return is_known ? std::max(int64_t{1}, int64_t{multiprocessors} * blocks) : 1;
}

template <typename T, typename Shape>
cudaError_t launch_product(Problem<T> problem, cudaStream_t stream) {
  problem.tiles = tiles_of<Shape>(problem.geometry, problem.features);
  const auto kernel = product_kernel<T, Shape>;
  constexpr int kBytes = kPanelBytes<T, Shape>;
  kernel<<<grid_of(problem.tiles.count), Shape::kThreads, kBytes, stream>>>(problem);
  return cudaGetLastError();
}

// How many features are packed at a time: as many as fit, one at least, in chunks of about one
// size.
int64_t largest_chunk(int64_t features, int64_t bytes_of_feature, int64_t most_bytes) {
  const int64_t most = std::max(int64_t{1}, most_bytes / bytes_of_feature);
  return divide_up(features, divide_up(features, most));
}

// The same, or down to half of it, as leaves the fewest blocks of the card without a tile: each
// chunk waits for the last one's, and the last round of tiles takes as long as a full one.
template <typename T, typename Shape>
int64_t best_chunk(const Geometry& g, int64_t features, int64_t largest) {
  constexpr int64_t kMostTries = 64;
  const int64_t at_once = blocks_at_once<T, Shape>();
  const int64_t least = divide_up(features, largest);
  int64_t best = largest;
  int64_t least_rounds = INT64_MAX;
  for (int64_t chunks = least; chunks <= std::min(2 * least, least + kMostTries); ++chunks) {
    const int64_t chunk = divide_up(features, chunks);
    const int64_t rounds =
        divide_up(features, chunk) * divide_up(tiles_of<Shape>(g, chunk).count, at_once);
    if (rounds >= least_rounds) continue;
    least_rounds = rounds;
    best = chunk;
  }
  return best;
}

template <typename T>
cudaError_t launch(const FuseConvLinearParams& params, cudaStream_t stream,
                   const Allocate& allocate, int64_t most_bytes) {
  using A = Accumulate<T>;
  const Geometry& g = params.geometry;
  const PackedSizes sizes = PackedSizes::of<T>(g);
  const int64_t largest = largest_chunk(params.features, sizes.feature, most_bytes);
  // First of all, as how many blocks run at a time is asked of what they may have.
  cudaError_t error =
      with_shape<T>(g, [](auto shape) { return allow_panels<T, decltype(shape)>(); });
  if (error != cudaSuccess) return error;
  const int64_t chunk = with_shape<T>(
      g, [&](auto shape) { return best_chunk<T, decltype(shape)>(g, params.features, largest); });
  const int64_t slices = std::min((kManyBlocks - 1) / chunk + 1, sizes.tiles);
  auto* const linear = static_cast<T*>(allocate(chunk * sizes.feature));
  auto* const weight = static_cast<T*>(allocate(sizes.weight));
  auto* const parts = static_cast<A*>(allocate(chunk * slices * static_cast<int64_t>(sizeof(A))));

  error = launch_pack_weight_cuda(params, weight, stream);

  PackedChunk packed;
  packed.slices = slices;
  packed.packed = linear;
  packed.parts = parts;
  Problem<T> problem{};
  problem.geometry = g;
  problem.classes = classes_of(g);
  problem.linear = linear;
  problem.weight = weight;
  problem.depth = sizes.depth;
  problem.in_channels = g.in_channels_per_group();
  for (int64_t f = 0; f < params.features && error == cudaSuccess; f += chunk) {
    packed.first = f;
    packed.features = problem.features = std::min(chunk, params.features - f);
    error = launch_pack_linear_cuda(params, packed, stream);
    if (error != cudaSuccess) break;
    FusedBias bias;
    bias.features = packed.features;
    bias.slices = slices;
    bias.parts = parts;
    if (params.linear_bias != nullptr) {
      bias.linear_bias = static_cast<const T*>(params.linear_bias) + f;
    }
    bias.bias = static_cast<T*>(params.bias) + f;
    error = launch_add_parts_cuda(params.dtype, bias, stream);
    if (error != cudaSuccess) break;
    problem.fused = static_cast<T*>(params.weight) + f * g.cols();
    error = with_shape<T>(
        g, [&](auto shape) { return launch_product<T, decltype(shape)>(problem, stream); });
  }
  return error;
}

// Whether the current card can give a block its memory, and what runs there knows tensor cores: a
// binary for older cards alone is translated for a newer one, and does not.
template <typename T, typename Shape>
bool card_can() {
  constexpr auto kBytes =
      static_cast<int64_t>(kPanelBytes<T, Shape> + sizeof(Tables<Shape::kItems>));
  int device = 0;
  int most = 0;
  cudaFuncAttributes kernel{};
  return forgotten(cudaGetDevice(&device)) == cudaSuccess &&
         forgotten(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                          device)) == cudaSuccess &&
         forgotten(cudaFuncGetAttributes(&kernel, product_kernel<T, Shape>)) == cudaSuccess &&
         kernel.ptxVersion >= 80 && kBytes <= most;
}

// Worth packing: lines that are not mostly filling, and full tiles enough for everyone. Otherwise,
// and where a feature's lines or the weight's are too much to hold, there are the ways without
// memory.
template <typename T>
bool pays(const FuseConvLinearParams& params) {
  constexpr int64_t kLeastChannels = 16;
  const Geometry& g = params.geometry;
  const PackedSizes sizes = PackedSizes::of<T>(g);
  if (params.features == 0 || g.in_channels_per_group() < kLeastChannels ||
      g.out_channels_per_group() * 3 < sizes.depth * 2 || sizes.feature > kMostLinear ||
      sizes.weight > kMostWeight) {
    return false;
  }
  const int64_t chunk = largest_chunk(params.features, sizes.feature, kMostLinear);
  return with_shape<T>(g, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t items = chunk * g.in_positions() * g.groups;
    return tiles_of<Shape>(g, chunk).across * items >= kManyTiles * Shape::kItems &&
           card_can<T, Shape>();
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
