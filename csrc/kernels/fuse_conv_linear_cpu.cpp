// fused[f, (c_in, i)] = sum over the taps (o, k) of i and over c_out of
//                       linear[f, (c_out, o)] * weight[c_out, c_in, k]
//
// Terms
//   panel    `width` rows f of the Linear, repacked as [group][o][c_out][f] in Accumulate<T>
//   block    up to TileSet::most_channels input channels of one group
//   segment  kSegment consecutive input positions i
//   unit     one segment and some blocks: what a thread takes at a time
//
// For every panel: pack it (and sum it for the bias), then fill [segment, block] pieces of the
// result. Each input position needs one small product over exactly its valid taps times c_out
// (tile.h), so neither padding nor the holes of a stride are ever multiplied. The panel is read
// with unit stride and shared by all blocks; the pieces are turned in cache so that memory sees
// runs of kSegment elements. Every element of the result is computed whole by one thread, in a
// fixed order: the bits do not depend on the number of threads.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "../geometry/axis_taps.h"
#include "fuse_conv_linear.h"
#include "memory.h"
#include "tile.h"

namespace linfuse {
namespace {

constexpr int64_t kSegment = 16;
// Panels wider than this gain less from wide tiles than they lose by leaving the cache.
constexpr int64_t kMostPanelBytes = int64_t{48} << 20;
constexpr int64_t kUnitsPerThread = 8;
constexpr int64_t kAlignment = 64;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Sizes that follow from the problem alone. Everything here is the same for every thread count.
struct Plan {
  int64_t positions;      // prod(in)
  int64_t out_positions;  // prod(out)
  int64_t kernel_positions;
  int64_t in_channels;   // of a group
  int64_t out_channels;  // of a group
  int64_t blocks;        // of a group
  int64_t segments;
  int vector_choice;  // the widest panel has 2^vector_choice vectors
  int lanes;
  int64_t widest;  // f of the widest panel

  int64_t block_start(int64_t block) const { return block * in_channels / blocks; }
  int64_t block_size(int64_t block) const { return block_start(block + 1) - block_start(block); }
};

template <typename A>
Plan make_plan(const FuseConvLinearParams& params) {
  const Geometry& g = params.geometry;
  const TileSet<A>& tiles = tile_set<A>(simd_level());
  Plan plan = {};
  plan.positions = g.in_positions();
  plan.out_positions = g.out_positions();
  plan.kernel_positions = g.kernel_positions();
  plan.in_channels = g.in_channels_per_group();
  plan.out_channels = g.out_channels_per_group();
  plan.blocks = divide_up(plan.in_channels, tiles.most_channels);
  plan.segments = divide_up(plan.positions, kSegment);
  plan.lanes = tiles.lanes;
  const int64_t most_in_block = divide_up(plan.in_channels, plan.blocks);
  for (int choice = TileSet<A>::kVectorChoices - 1; choice >= 0; --choice) {
    const int64_t vectors = int64_t{1} << choice;
    const int64_t bytes = g.rows() * vectors * plan.lanes * static_cast<int64_t>(sizeof(A));
    plan.vector_choice = choice;
    plan.widest = vectors * plan.lanes;
    if (vectors * most_in_block <= tiles.registers && plan.widest < 2 * params.features &&
        bytes <= kMostPanelBytes) {
      break;
    }
  }
  return plan;
}

int64_t most_taps(const AxisTaps (&taps)[kAxes]) {
  return taps[0].most_taps() * taps[1].most_taps() * taps[2].most_taps();
}

template <typename A>
struct Workspace {
  A* panel;      // [group][o][c_out][f]
  A* weight;     // [group][k][block][c_out][c_in of the block]
  A* bias_sums;  // [c_out][f]
  char* slots;   // per thread: a piece [segment][c_in of the block][f], then the taps of a segment
  int64_t slot_bytes;
  int64_t piece_bytes;

  Workspace(const Plan& plan, const Geometry& g, int64_t taps, int threads,
            const Allocate& allocate) {
    constexpr int64_t kSize = sizeof(A);
    const int64_t panel_bytes = aligned(g.rows() * plan.widest * kSize);
    const int64_t weight_bytes =
        aligned(g.out_channels * plan.in_channels * plan.kernel_positions * kSize);
    const int64_t sums_bytes = aligned(g.out_channels * plan.widest * kSize);
    piece_bytes =
        aligned(kSegment * divide_up(plan.in_channels, plan.blocks) * plan.widest * kSize);
    slot_bytes = piece_bytes + aligned(2 * kSegment * taps * static_cast<int64_t>(sizeof(int64_t)));
    char* memory = static_cast<char*>(
        allocate(panel_bytes + weight_bytes + sums_bytes + slot_bytes * threads));
    panel = reinterpret_cast<A*>(memory);
    weight = reinterpret_cast<A*>(memory + panel_bytes);
    bias_sums = reinterpret_cast<A*>(memory + panel_bytes + weight_bytes);
    slots = memory + panel_bytes + weight_bytes + sums_bytes;
  }
};

template <typename T>
class Product {
  using A = Accumulate<T>;

 public:
  Product(const FuseConvLinearParams& params, const ParallelFor& parallel_for,
          const Allocate& allocate)
      : params_(params),
        g_(params.geometry),
        parallel_for_(parallel_for),
        tiles_(tile_set<A>(simd_level())),
        plan_(make_plan<A>(params)),
        taps_{taps_by_column(g_, 0), taps_by_column(g_, 1), taps_by_column(g_, 2)},
        most_taps_(most_taps(taps_)),
        memory_(plan_, g_, most_taps_, params.threads, allocate),
        linear_(static_cast<const T*>(params.linear_weight)),
        fused_(static_cast<T*>(params.weight)) {}

  void run() {
    advise_huge_pages(fused_, params_.features * g_.cols() * static_cast<int64_t>(sizeof(T)));
    for_each(parallel_for_, g_.out_channels, plan_.in_channels * plan_.kernel_positions,
             [&](int64_t c_out) { pack_weight(c_out); });
    int64_t first = 0;
    while (first < params_.features) {
      const int64_t left = params_.features - first;
      int choice = plan_.vector_choice;
      while (choice > 0 && (int64_t{plan_.lanes} << choice) > left) --choice;
      const Panel panel = {first, std::min(left, int64_t{plan_.lanes} << choice),
                           int64_t{plan_.lanes} << choice, choice};
      for_each(parallel_for_, g_.out_channels, plan_.out_positions * panel.width,
               [&](int64_t c_out) { pack_panel(panel, c_out); });
      write_bias(panel);
      multiply(panel);
      first += panel.count;
    }
  }

 private:
  struct Panel {
    int64_t first;  // f of its first row
    int64_t count;  // rows that exist
    int64_t width;  // rows with the zeros that fill the last vector
    int choice;
  };

  void pack_weight(int64_t c_out) const {
    const T* weight = static_cast<const T*>(params_.conv_weight);
    const int64_t tap_size = plan_.in_channels * plan_.out_channels;
    const int64_t group = g_.group_of_out_channel(c_out);
    const int64_t c = c_out - group * plan_.out_channels;
    for (int64_t block = 0; block < plan_.blocks; ++block) {
      const int64_t start = plan_.block_start(block);
      const int64_t size = plan_.block_size(block);
      A* packed = memory_.weight + group * plan_.kernel_positions * tap_size +
                  start * plan_.out_channels + c * size;
      for (int64_t n = 0; n < size; ++n) {
        const T* kernel = weight + g_.weight_index(c_out, start + n);
        for (int64_t k = 0; k < plan_.kernel_positions; ++k) {
          packed[k * tap_size + n] = static_cast<A>(kernel[k]);
        }
      }
    }
  }

  // One output channel of a panel, and its sums over the output positions.
  void pack_panel(const Panel& panel, int64_t c_out) const {
    const int64_t stride = plan_.out_channels * panel.width;
    const int64_t group = g_.group_of_out_channel(c_out);
    A* packed = memory_.panel + group * plan_.out_positions * stride +
                (c_out - group * plan_.out_channels) * panel.width;
    A* sums = memory_.bias_sums + c_out * panel.width;
    std::fill(sums, sums + panel.width, A(0));
    // A few positions at a time keep the lines that are being filled in the first-level cache.
    for (int64_t o = 0; o < plan_.out_positions; o += kSegment) {
      const int64_t some = std::min(kSegment, plan_.out_positions - o);
      for (int64_t f = 0; f < panel.width; ++f) {
        A* to = packed + o * stride + f;
        if (f >= panel.count) {
          for (int64_t n = 0; n < some; ++n) to[n * stride] = A(0);
          continue;
        }
        const T* from = linear_ + (panel.first + f) * g_.rows() + c_out * plan_.out_positions + o;
        A sum = sums[f];
        for (int64_t n = 0; n < some; ++n) {
          const A value = static_cast<A>(from[n]);
          to[n * stride] = value;
          sum += value;
        }
        sums[f] = sum;
      }
    }
  }

  void write_bias(const Panel& panel) {
    const T* conv_bias = static_cast<const T*>(params_.conv_bias);
    const T* linear_bias = static_cast<const T*>(params_.linear_bias);
    T* bias = static_cast<T*>(params_.bias) + panel.first;
    for (int64_t f = 0; f < panel.count; ++f) {
      A total = linear_bias != nullptr ? static_cast<A>(linear_bias[panel.first + f]) : A(0);
      if (conv_bias != nullptr) {
        for (int64_t c_out = 0; c_out < g_.out_channels; ++c_out) {
          total += static_cast<A>(conv_bias[c_out]) * memory_.bias_sums[c_out * panel.width + f];
        }
      }
      bias[f] = static_cast<T>(total);
    }
  }

  void multiply(const Panel& panel) {
    const int64_t blocks = g_.groups * plan_.blocks;
    const int64_t splits =
        std::min(blocks, divide_up(kUnitsPerThread * params_.threads, plan_.segments));
    const int64_t units = plan_.segments * splits;
    const int64_t work = kSegment * most_taps_ * plan_.out_channels * panel.width *
                         divide_up(blocks, splits) * divide_up(plan_.in_channels, plan_.blocks);
    const int64_t workers = std::min<int64_t>(params_.threads, divide_up(units, grain_for(work)));
    std::atomic<int64_t> next{0};
    parallel_for_(workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        char* slot = memory_.slots + worker * memory_.slot_bytes;
        for (int64_t unit = next++; unit < units; unit = next++) {
          const int64_t split = unit % splits;
          multiply_unit(panel, unit / splits * kSegment, split * blocks / splits,
                        (split + 1) * blocks / splits, slot);
        }
      }
    });
  }

  // The pieces of one segment and blocks [first_block, last_block), counted over all groups.
  void multiply_unit(const Panel& panel, int64_t first_position, int64_t first_block,
                     int64_t last_block, char* slot) const {
    A* piece = reinterpret_cast<A*>(slot);
    int64_t* linear_start = reinterpret_cast<int64_t*>(slot + memory_.piece_bytes);
    int64_t* weight_start = linear_start + kSegment * most_taps_;
    const int64_t positions = std::min(kSegment, plan_.positions - first_position);
    int64_t first_tap[kSegment + 1] = {0};
    for (int64_t s = 0; s < positions; ++s) {
      first_tap[s + 1] =
          first_tap[s] + list_taps(first_position + s, panel, linear_start + first_tap[s],
                                   weight_start + first_tap[s]);
    }

    const int64_t tap_size = plan_.in_channels * plan_.out_channels;
    for (int64_t n = first_block; n < last_block; ++n) {
      const int64_t group = n / plan_.blocks;
      const int64_t block = n % plan_.blocks;
      const int64_t channels = plan_.block_size(block);
      const A* linear =
          memory_.panel + group * plan_.out_positions * plan_.out_channels * panel.width;
      const A* weight = memory_.weight + group * plan_.kernel_positions * tap_size +
                        plan_.block_start(block) * plan_.out_channels;
      const Tile<A> tile = tiles_.tile[panel.choice][channels];
      for (int64_t s = 0; s < positions; ++s) {
        const TileTask<A> task = {linear,
                                  linear_start + first_tap[s],
                                  weight,
                                  weight_start + first_tap[s],
                                  first_tap[s + 1] - first_tap[s],
                                  plan_.out_channels};
        tile(task, piece + s * channels * panel.width);
      }
      write_piece(panel, piece, group * plan_.in_channels + plan_.block_start(block), channels,
                  first_position, positions);
    }
  }

  // Where the operands of every tap of one input position begin. Returns the number of taps.
  int64_t list_taps(int64_t position, const Panel& panel, int64_t* linear_start,
                    int64_t* weight_start) const {
    const Position i = in_position(g_, position);
    const int64_t linear_step = plan_.out_channels * panel.width;
    const int64_t weight_step = plan_.out_channels * plan_.in_channels;
    int64_t count = 0;
    for_each_tap(taps_[0], i.at[0], [&](int64_t o0, int64_t k0) {
      for_each_tap(taps_[1], i.at[1], [&](int64_t o1, int64_t k1) {
        const int64_t o_line = (o0 * g_.axis[1].out + o1) * g_.axis[2].out;
        const int64_t k_line = (k0 * g_.axis[1].kernel + k1) * g_.axis[2].kernel;
        for_each_tap(taps_[2], i.at[2], [&](int64_t o2, int64_t k2) {
          linear_start[count] = (o_line + o2) * linear_step;
          weight_start[count] = (k_line + k2) * weight_step;
          ++count;
        });
      });
    });
    return count;
  }

  template <typename Visitor>
  static void for_each_tap(const AxisTaps& taps, int64_t position, Visitor&& visit) {
    for (const TapGroup* group = taps.begin(position); group != taps.end(position); ++group) {
      for (int64_t n = group->first; n < group->last; ++n) {
        visit(group->position, taps.kernel[static_cast<size_t>(n)]);
      }
    }
  }

  void write_piece(const Panel& panel, const A* piece, int64_t c_in, int64_t channels,
                   int64_t first_position, int64_t positions) const {
    for (int64_t f = 0; f < panel.count; ++f) {
      T* row = fused_ + (panel.first + f) * g_.cols() + first_position;
      for (int64_t n = 0; n < channels; ++n) {
        T* to = row + (c_in + n) * plan_.positions;
        const A* from = piece + n * panel.width + f;
        for (int64_t s = 0; s < positions; ++s) {
          to[s] = static_cast<T>(from[s * channels * panel.width]);
        }
      }
    }
  }

  const FuseConvLinearParams& params_;
  const Geometry& g_;
  const ParallelFor& parallel_for_;
  const TileSet<A>& tiles_;
  const Plan plan_;
  const AxisTaps taps_[kAxes];
  const int64_t most_taps_;
  const Workspace<A> memory_;
  const T* linear_;
  T* fused_;
};

}  // namespace

void launch_fuse_conv_linear_cpu(const FuseConvLinearParams& params,
                                 const ParallelFor& parallel_for, const Allocate& allocate) {
  if (params.features == 0) return;
  dispatch(params.dtype,
           [&](auto zero) { Product<decltype(zero)>(params, parallel_for, allocate).run(); });
}

}  // namespace linfuse
