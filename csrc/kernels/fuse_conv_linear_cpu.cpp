// fused[f, (c_in, i)] = sum over the taps (o, k) of i and over c_out of
//                       linear[f, (c_out, o)] * weight[c_out, c_in, k]
//
// Terms
//   block    up to TileSet::most_channels input channels of one group, counted over all groups
//   batch    the blocks whose weights are packed at a time: all of them, unless they are very many
//   slab     a range of input positions on one axis, and the output positions that they read
//   panel    `width` rows f of the Linear at the output positions of a slab, repacked as
//            [group][o][c_out][f] in Accumulate<T>
//   segment  kSegment consecutive input positions i
//   unit     one segment and some blocks: what a thread takes at a time
//
// For every slab and panel: pack it, then fill [segment, block] pieces of the result. Each input
// position needs one small product over exactly its valid taps times c_out (tile.h), so neither
// padding nor the holes of a stride are ever multiplied. The panel is read with unit stride and
// shared by all blocks; the pieces are turned in cache so that memory sees runs of kSegment
// elements. Every element of the result is computed whole by one thread, in a fixed order: the bits
// do not depend on the number of threads.
//
// Scratch memory is bounded by kMostPanelBytes and kMostWeightBytes, however large the layers are.
#include <algorithm>
#include <atomic>
#include <vector>

#include "../geometry/axis_taps.h"
#include "fuse_conv_linear.h"
#include "memory.h"
#include "tile.h"

namespace linfuse {
namespace {

constexpr int64_t kSegment = 16;
constexpr int64_t kMostPanelBytes = int64_t{32} << 20;
constexpr int64_t kMostWeightBytes = int64_t{16} << 20;
constexpr int64_t kUnitsPerThread = 8;
constexpr int64_t kAlignment = 64;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

struct Slab {
  Range range;                 // of input positions on the slab axis
  std::vector<int64_t> reads;  // the output positions on that axis that they read, ascending

  // Where an output position that is read stands in `reads`.
  int64_t slot(int64_t o) const {
    return std::lower_bound(reads.begin(), reads.end(), o) - reads.begin();
  }
};

// False where the slab would read more than `most` output positions.
bool make_slab(const Geometry& g, int axis, Range range, int64_t most, Slab& slab) {
  slab.range = range;
  slab.reads.clear();
  PositionTaps taps;
  for (int64_t i = range.first; i < range.last; ++i) {
    taps.list_by_column(g, axis, i);
    for (const TapGroup& group : taps.groups) {
      // Nearly always the next one, or one that is there.
      if (slab.reads.empty() || group.position > slab.reads.back()) {
        slab.reads.push_back(group.position);
        continue;
      }
      const auto place = std::lower_bound(slab.reads.begin(), slab.reads.end(), group.position);
      if (*place != group.position) slab.reads.insert(place, group.position);
    }
    if (static_cast<int64_t>(slab.reads.size()) > most) return false;
  }
  return true;
}

// The sizes of the work. They follow from the problem alone and are the same for every thread
// count.
struct Plan {
  int64_t in_channels;   // of a group
  int64_t out_channels;  // of a group
  int64_t kernel_positions;
  int64_t blocks_per_group;  // of about the same size each
  int64_t blocks;
  int64_t batch;      // blocks
  int vector_choice;  // the widest panel has 2^vector_choice vectors
  int lanes;
  int slab_axis;            // the first axis of more than one input position
  int64_t other_positions;  // output positions for each one on the slab axis
  int64_t slab_length;
  int64_t most_reads;  // of a slab

  int64_t width(int choice) const { return int64_t{lanes} << choice; }
  int64_t most_in_block() const { return divide_up(in_channels, blocks_per_group); }
  int64_t block_start(int64_t block) const {
    const int64_t within = block % blocks_per_group;
    return within * in_channels / blocks_per_group;
  }
  int64_t block_size(int64_t block) const {
    const int64_t within = block % blocks_per_group;
    return (within + 1) * in_channels / blocks_per_group - block_start(block);
  }
  // Input channels before a block, over all groups.
  int64_t channels_before(int64_t block) const {
    return block / blocks_per_group * in_channels + block_start(block);
  }
};

// Cuts the slab axis into the fewest equal ranges whose panels stay within bounds.
void cut_slabs(const Geometry& g, int64_t bytes_per_read, Plan& plan) {
  const int64_t size = g.axis[plan.slab_axis].in;
  for (int64_t length = size;; length = divide_up(length, 2)) {
    const int64_t most =
        length == 1 ? INT64_MAX : std::max<int64_t>(1, kMostPanelBytes / bytes_per_read);
    plan.slab_length = length;
    plan.most_reads = 0;
    bool fits = true;
    for (int64_t first = 0; first < size && fits; first += length) {
      Slab slab;
      fits = make_slab(g, plan.slab_axis, {first, std::min(size, first + length)}, most, slab);
      plan.most_reads = std::max(plan.most_reads, static_cast<int64_t>(slab.reads.size()));
    }
    if (fits) return;
  }
}

template <typename A>
Plan make_plan(const FuseConvLinearParams& params) {
  const Geometry& g = params.geometry;
  const TileSet<A>& tiles = tile_set<A>(simd_level());
  constexpr int64_t kSize = sizeof(A);
  Plan plan = {};
  plan.in_channels = g.in_channels_per_group();
  plan.out_channels = g.out_channels_per_group();
  plan.kernel_positions = g.kernel_positions();
  plan.blocks_per_group = divide_up(plan.in_channels, tiles.most_channels);
  plan.blocks = g.groups * plan.blocks_per_group;
  plan.lanes = tiles.lanes;
  const int64_t block_bytes =
      plan.kernel_positions * plan.out_channels * plan.most_in_block() * kSize;
  plan.batch = std::min(plan.blocks, std::max<int64_t>(1, kMostWeightBytes / block_bytes));

  plan.slab_axis = 0;
  while (plan.slab_axis < kAxes - 1 && g.axis[plan.slab_axis].in == 1) ++plan.slab_axis;
  plan.other_positions = g.out_positions() / g.axis[plan.slab_axis].out;
  for (int choice = TileSet<A>::kVectorChoices - 1; choice >= 0; --choice) {
    plan.vector_choice = choice;
    if ((int64_t{1} << choice) * plan.most_in_block() <= tiles.registers &&
        plan.width(choice) < 2 * params.features &&
        (g.rows() * plan.width(choice) * kSize <= kMostPanelBytes || choice <= 1)) {
      break;
    }
  }
  cut_slabs(g, plan.other_positions * g.out_channels * plan.width(plan.vector_choice) * kSize,
            plan);
  return plan;
}

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
        inner_positions_(positions_inside(&Axis::out)),
        linear_(static_cast<const T*>(params.linear_weight)),
        fused_(static_cast<T*>(params.weight)) {
    constexpr int64_t kSize = sizeof(A);
    const int64_t widest = plan_.width(plan_.vector_choice);
    const int64_t most_in_block = plan_.most_in_block();
    const int64_t panel_bytes =
        aligned(plan_.most_reads * plan_.other_positions * g_.out_channels * widest * kSize);
    const int64_t weight_bytes =
        aligned(plan_.batch * most_in_block * plan_.kernel_positions * plan_.out_channels * kSize);
    piece_bytes_ = aligned(kSegment * most_in_block * widest * kSize);
    char* memory =
        static_cast<char*>(allocate(panel_bytes + weight_bytes + piece_bytes_ * params.threads));
    panel_ = reinterpret_cast<A*>(memory);
    weight_ = reinterpret_cast<A*>(memory + panel_bytes);
    pieces_ = memory + panel_bytes + weight_bytes;
    workers_.resize(static_cast<size_t>(params.threads));
  }

  void run() {
    advise_huge_pages(fused_, params_.features * g_.cols() * static_cast<int64_t>(sizeof(T)));
    for_each(parallel_for_, params_.features, g_.rows(), [&](int64_t f) { write_bias(f); });
    const bool one_batch = plan_.batch == plan_.blocks;
    if (one_batch) pack_weight({0, plan_.blocks});
    const int64_t size = g_.axis[plan_.slab_axis].in;
    for (int64_t start = 0; start < size; start += plan_.slab_length) {
      Slab slab;
      const Range range = {start, std::min(size, start + plan_.slab_length)};
      make_slab(g_, plan_.slab_axis, range, INT64_MAX, slab);
      list_sources(slab);
      int64_t first = 0;
      while (first < params_.features) {
        const int64_t left = params_.features - first;
        int choice = plan_.vector_choice;
        while (choice > 0 && plan_.width(choice) > left) --choice;
        const Panel panel = {slab, first, std::min(left, plan_.width(choice)), plan_.width(choice),
                             choice};
        for_each(parallel_for_, g_.out_channels,
                 static_cast<int64_t>(sources_.size()) * panel.width,
                 [&](int64_t c_out) { pack_panel(panel, c_out); });
        for (int64_t block = 0; block < plan_.blocks; block += plan_.batch) {
          const Range batch = {block, std::min(plan_.blocks, block + plan_.batch)};
          if (!one_batch) pack_weight(batch);
          multiply(panel, batch);
        }
        first += panel.count;
      }
    }
  }

 private:
  struct Panel {
    const Slab& slab;
    int64_t first;  // f of its first row
    int64_t count;  // rows that exist
    int64_t width;  // rows with the zeros that fill the last vector
    int choice;
  };

  // What a thread keeps while it lists the taps of a segment.
  struct Worker {
    PositionTaps taps[kAxes];
    std::vector<int64_t> linear_start;
    std::vector<int64_t> kernel;  // k of each tap
    int64_t first_tap[kSegment + 1];
  };

  // Positions on the axes inside the slab axis.
  int64_t positions_inside(int64_t Axis::* size) const {
    int64_t positions = 1;
    for (int a = plan_.slab_axis + 1; a < kAxes; ++a) positions *= g_.axis[a].*size;
    return positions;
  }

  // Sums over positions first and in double: the longest sums there are, and the cheapest.
  void write_bias(int64_t f) const {
    const T* conv_bias = static_cast<const T*>(params_.conv_bias);
    const T* linear_bias = static_cast<const T*>(params_.linear_bias);
    double total =
        linear_bias != nullptr ? static_cast<double>(static_cast<A>(linear_bias[f])) : 0.0;
    if (conv_bias != nullptr) {
      const int64_t stride = params_.linear_stride[1];
      const int64_t positions = g_.out_positions();
      const T* from = linear_ + f * params_.linear_stride[0];
      for (int64_t c_out = 0; c_out < g_.out_channels; ++c_out, from += positions * stride) {
        // Several sums at a time, since each addition waits for the one before.
        constexpr int kSums = 8;
        double sums[kSums] = {};
        int64_t o = 0;
        for (; o + kSums <= positions; o += kSums) {
          for (int n = 0; n < kSums; ++n) {
            sums[n] += static_cast<double>(static_cast<A>(from[(o + n) * stride]));
          }
        }
        for (; o < positions; ++o) sums[0] += static_cast<double>(static_cast<A>(from[o * stride]));
        double sum = 0;
        for (double part : sums) sum += part;
        total += static_cast<double>(static_cast<A>(conv_bias[c_out])) * sum;
      }
    }
    static_cast<T*>(params_.bias)[f] = static_cast<T>(static_cast<A>(total));
  }

  // Weights of a batch as [block][k][c_out][c_in of the block].
  void pack_weight(Range batch) const {
    const T* weight = static_cast<const T*>(params_.conv_weight);
    const int64_t work = plan_.kernel_positions * plan_.out_channels * tiles_.most_channels;
    for_each(parallel_for_, batch.last - batch.first, work, [&](int64_t n) {
      const int64_t block = batch.first + n;
      const int64_t size = plan_.block_size(block);
      A* packed = weight_of(block, batch);
      for (int64_t c = 0; c < plan_.out_channels; ++c) {
        const int64_t c_out = block / plan_.blocks_per_group * plan_.out_channels + c;
        for (int64_t c_in = 0; c_in < size; ++c_in) {
          const T* kernel = weight + g_.weight_index(c_out, plan_.block_start(block) + c_in);
          for (int64_t k = 0; k < plan_.kernel_positions; ++k) {
            packed[(k * plan_.out_channels + c) * size + c_in] = static_cast<A>(kernel[k]);
          }
        }
      }
    });
  }

  A* weight_of(int64_t block, Range batch) const {
    const int64_t channels = plan_.channels_before(block) - plan_.channels_before(batch.first);
    return weight_ + channels * plan_.kernel_positions * plan_.out_channels;
  }

  // Which output position stands where in a panel of this slab.
  void list_sources(const Slab& slab) {
    sources_.clear();
    const int64_t outer = plan_.other_positions / inner_positions_;
    for (int64_t n = 0; n < outer; ++n) {
      for (int64_t read : slab.reads) {
        const int64_t line = n * g_.axis[plan_.slab_axis].out + read;
        for (int64_t inner = 0; inner < inner_positions_; ++inner) {
          sources_.push_back(line * inner_positions_ + inner);
        }
      }
    }
  }

  // One output channel of a panel.
  void pack_panel(const Panel& panel, int64_t c_out) const {
    const auto positions = static_cast<int64_t>(sources_.size());
    const int64_t step = plan_.out_channels * panel.width;
    const int64_t group = g_.group_of_out_channel(c_out);
    A* packed =
        panel_ + group * positions * step + (c_out - group * plan_.out_channels) * panel.width;
    // A few positions at a time keep the lines that are being filled in the first-level cache.
    for (int64_t first = 0; first < positions; first += kSegment) {
      const int64_t some = std::min(kSegment, positions - first);
      const int64_t* source = sources_.data() + first;
      for (int64_t f = 0; f < panel.width; ++f) {
        A* to = packed + first * step + f;
        if (f >= panel.count) {
          for (int64_t n = 0; n < some; ++n) to[n * step] = A(0);
          continue;
        }
        const T* from = linear_ + (panel.first + f) * params_.linear_stride[0] +
                        c_out * g_.out_positions() * params_.linear_stride[1];
        for (int64_t n = 0; n < some; ++n) {
          to[n * step] = static_cast<A>(from[source[n] * params_.linear_stride[1]]);
        }
      }
    }
  }

  void multiply(const Panel& panel, Range batch) {
    // The positions of a slab follow each other: all axes outside it have one.
    const int64_t inside = positions_inside(&Axis::in);
    const Range positions = {panel.slab.range.first * inside, panel.slab.range.last * inside};
    const int64_t segments = divide_up(positions.last - positions.first, kSegment);
    const int64_t blocks = batch.last - batch.first;
    const int64_t splits = std::min(blocks, divide_up(kUnitsPerThread * params_.threads, segments));
    const int64_t units = segments * splits;
    const int64_t work = kSegment * plan_.out_channels * panel.width * divide_up(blocks, splits) *
                         tiles_.most_channels;
    const int64_t workers = std::min<int64_t>(params_.threads, divide_up(units, grain_for(work)));
    std::atomic<int64_t> next{0};
    parallel_for_(workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        Worker& worker = workers_[static_cast<size_t>(n)];
        A* piece = reinterpret_cast<A*>(pieces_ + n * piece_bytes_);
        for (int64_t unit = next++; unit < units; unit = next++) {
          const int64_t split = unit % splits;
          const int64_t first = positions.first + unit / splits * kSegment;
          const Range segment = {first, std::min(positions.last, first + kSegment)};
          const Range some = {batch.first + split * blocks / splits,
                              batch.first + (split + 1) * blocks / splits};
          multiply_unit(panel, batch, segment, some, worker, piece);
        }
      }
    });
  }

  // The pieces of one segment and some blocks.
  void multiply_unit(const Panel& panel, Range batch, Range segment, Range blocks, Worker& worker,
                     A* piece) const {
    list_taps(panel, segment, worker);
    const auto panel_positions = static_cast<int64_t>(sources_.size());
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
      const int64_t group = block / plan_.blocks_per_group;
      const int64_t channels = plan_.block_size(block);
      const Tile<A> tile = tiles_.tile[panel.choice][channels];
      TileTask<A> task = {};
      task.linear = panel_ + group * panel_positions * plan_.out_channels * panel.width;
      task.weight = weight_of(block, batch);
      task.weight_step = plan_.out_channels * channels;
      task.channels = plan_.out_channels;
      for (int64_t s = 0; s < segment.last - segment.first; ++s) {
        task.linear_start = worker.linear_start.data() + worker.first_tap[s];
        task.kernel = worker.kernel.data() + worker.first_tap[s];
        task.taps = worker.first_tap[s + 1] - worker.first_tap[s];
        tile(task, piece + s * channels * panel.width);
      }
      write_piece(panel, piece, plan_.channels_before(block), channels, segment);
    }
  }

  // Where the operands of every tap of a segment begin: in the panel, and among the kernel
  // elements.
  void list_taps(const Panel& panel, Range segment, Worker& worker) const {
    const int64_t step = plan_.out_channels * panel.width;
    const auto reads = static_cast<int64_t>(panel.slab.reads.size());
    worker.linear_start.clear();
    worker.kernel.clear();
    Position before = {{-1, -1, -1}};
    for (int64_t position = segment.first; position < segment.last; ++position) {
      const Position i = in_position(g_, position);
      for (int a = 0; a < kAxes; ++a) {
        if (i.at[a] == before.at[a]) continue;
        worker.taps[a].list_by_column(g_, a, i.at[a]);
        if (a != plan_.slab_axis) continue;
        for (TapGroup& group : worker.taps[a].groups)
          group.position = panel.slab.slot(group.position);
      }
      before = i;
      worker.first_tap[position - segment.first] = static_cast<int64_t>(worker.linear_start.size());
      // Sizes of the panel's axes: those of the output, and the slab's reads on its axis.
      const int64_t size1 = plan_.slab_axis == 1 ? reads : g_.axis[1].out;
      const int64_t size2 = plan_.slab_axis == 2 ? reads : g_.axis[2].out;
      for_each_tap(worker.taps[0], [&](int64_t o0, int64_t k0) {
        for_each_tap(worker.taps[1], [&](int64_t o1, int64_t k1) {
          const int64_t o_line = (o0 * size1 + o1) * size2;
          const int64_t k_line = (k0 * g_.axis[1].kernel + k1) * g_.axis[2].kernel;
          for_each_tap(worker.taps[2], [&](int64_t o2, int64_t k2) {
            worker.linear_start.push_back((o_line + o2) * step);
            worker.kernel.push_back(k_line + k2);
          });
        });
      });
    }
    worker.first_tap[segment.last - segment.first] =
        static_cast<int64_t>(worker.linear_start.size());
  }

  template <typename Visitor>
  static void for_each_tap(const PositionTaps& taps, Visitor&& visit) {
    for (const TapGroup& group : taps.groups) {
      for (int64_t n = group.first; n < group.last; ++n) {
        visit(group.position, taps.kernel[static_cast<size_t>(n)]);
      }
    }
  }

  void write_piece(const Panel& panel, const A* piece, int64_t c_in, int64_t channels,
                   Range segment) const {
    const int64_t count = segment.last - segment.first;
    for (int64_t f = 0; f < panel.count; ++f) {
      T* row = fused_ + (panel.first + f) * g_.cols() + segment.first;
      for (int64_t n = 0; n < channels; ++n) {
        T* to = row + (c_in + n) * g_.in_positions();
        const A* from = piece + n * panel.width + f;
        for (int64_t s = 0; s < count; ++s) {
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
  const int64_t inner_positions_;  // output positions on the axes inside the slab axis
  const T* linear_;
  T* fused_;
  A* panel_ = nullptr;
  A* weight_ = nullptr;
  char* pieces_ = nullptr;  // per thread: [segment][c_in of the block][f]
  int64_t piece_bytes_ = 0;
  std::vector<int64_t> sources_;
  std::vector<Worker> workers_;
};

}  // namespace

void launch_fuse_conv_linear_cpu(const FuseConvLinearParams& params,
                                 const ParallelFor& parallel_for, const Allocate& allocate) {
  if (params.features == 0) return;
  dispatch(params.dtype,
           [&](auto zero) { Product<decltype(zero)>(params, parallel_for, allocate).run(); });
}

}  // namespace linfuse
