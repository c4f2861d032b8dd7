// Feeds csrc/geometry random arguments, extremes included, and holds what it accepts to what must
// hold of any convolution. Built with the sanitizers, which stop it at an overflow.
//
//   geometry <count> <seed>     prints how many were accepted, walked through tap by tap, rejected
//
// A broken rule is printed with its arguments, and the exit status is 1.
#include "geometry.h"

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "axis_taps.h"
#include "make_geometry.h"
#include "stored_taps.h"

namespace {

using linfuse::Axis;
using linfuse::AxisTaps;
using linfuse::ConvArguments;
using linfuse::Geometry;
using linfuse::kAxes;
using linfuse::PaddingMode;
using linfuse::Position;
using linfuse::PositionTaps;
using linfuse::Range;
using linfuse::RowTables;
using linfuse::RowTaps;
using linfuse::TapGroup;

constexpr int64_t kMin = std::numeric_limits<int64_t>::min();
constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
// Accepted geometries of up to so many elements are walked through tap by tap.
constexpr int64_t kMostToWalk = 4000;

// __int128 holds every intermediate value of the formulas exactly.
using Wide = __int128;

struct Random {
  std::mt19937_64 bits;

  explicit Random(uint64_t seed) : bits(seed) {}
  uint64_t below(uint64_t n) { return bits() % n; }
  bool one_in(uint64_t n) { return below(n) == 0; }
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(below(static_cast<uint64_t>(high - low) + 1));
  }

  int64_t extreme() {
    switch (below(5)) {
      case 0:
        return std::vector<int64_t>{kMin, kMin + 1, kMax, kMax - 1, -1, 0}[below(6)];
      case 1: {  // a power of two, or one beside it
        const int64_t power = int64_t{1} << below(63);
        return (one_in(2) ? power : -power) + between(-1, power == kMax ? 0 : 1);
      }
      case 2:
        return static_cast<int64_t>(bits());
      case 3:
        return static_cast<int64_t>(bits() >> below(64));  // of any length in bits
      default:
        return between(-2, 9);
    }
  }
};

std::vector<int64_t> list(Random& random, size_t size, int64_t low, int64_t high) {
  std::vector<int64_t> values(size);
  for (int64_t& value : values) value = random.between(low, high);
  return values;
}

// ConvArguments that hold their numbers.
struct Drawn {
  std::vector<int64_t> weight_size;
  std::vector<int64_t> input_size;
  std::vector<int64_t> stride;
  std::vector<int64_t> padding;
  std::vector<int64_t> dilation;
  int64_t groups = 1;
  bool transposed = false;
  std::vector<int64_t> output_padding;
  std::string padding_mode = "zeros";

  ConvArguments view() const {
    return {weight_size, input_size, stride,         padding,     dilation,
            groups,      transposed, output_padding, padding_mode};
  }
};

// Small and mostly valid.
Drawn small_arguments(Random& random) {
  Drawn arguments;
  const auto axes = static_cast<size_t>(random.between(1, 3));
  const int64_t most = axes == 3 ? 4 : axes == 2 ? 7 : 14;
  arguments.groups = random.between(1, 3);
  arguments.weight_size = {arguments.groups * random.between(1, 2), random.between(1, 2)};
  for (int64_t size : list(random, axes, 1, axes == 3 ? 2 : 4)) {
    arguments.weight_size.push_back(size);
  }
  arguments.input_size = list(random, random.one_in(4) ? 1 : axes, 1, most);
  arguments.stride = list(random, random.one_in(3) ? 1 : axes, 1, 4);
  arguments.dilation = list(random, random.one_in(3) ? 1 : axes, 1, 3);
  const size_t sides = random.one_in(2) ? 2 * axes : random.one_in(2) ? axes : 1;
  arguments.padding = list(random, sides, 0, random.one_in(4) ? 8 : 2);
  arguments.transposed = random.one_in(2);
  arguments.output_padding = {arguments.transposed ? random.between(0, 2) : 0};
  if (!arguments.transposed) {
    arguments.padding_mode =
        std::vector<std::string>{"zeros", "reflect", "replicate", "circular"}[random.below(4)];
  }
  return arguments;
}

Drawn random_arguments(Random& random) {
  Drawn arguments = small_arguments(random);
  std::vector<std::vector<int64_t>*> lists = {&arguments.weight_size, &arguments.input_size,
                                              &arguments.stride,      &arguments.padding,
                                              &arguments.dilation,    &arguments.output_padding};
  // None, one, a few or all of the numbers are anything at all; lists are of any length.
  const uint64_t kind = random.below(4);
  for (std::vector<int64_t>* values : lists) {
    for (int64_t& value : *values) {
      if (kind == 3 || (kind == 2 && random.one_in(4))) value = random.extreme();
    }
    if (kind > 0 && random.one_in(30)) values->resize(random.below(8), random.extreme());
  }
  if (kind == 1) {
    std::vector<int64_t>& chosen = *lists[random.below(lists.size())];
    if (!chosen.empty()) chosen[random.below(chosen.size())] = random.extreme();
  }
  if (kind == 3 || (kind > 0 && random.one_in(8))) arguments.groups = random.extreme();
  if (random.one_in(50)) arguments.padding_mode = random.one_in(2) ? "mirror" : "";
  if (random.one_in(50)) arguments.transposed = !arguments.transposed;
  return arguments;
}

std::string describe(const Drawn& arguments) {
  using linfuse::detail::to_text;
  std::ostringstream text;
  text << "make_geometry(\"op\", {" << to_text(arguments.weight_size) << ", input_size "
       << to_text(arguments.input_size) << ", stride " << to_text(arguments.stride) << ", padding "
       << to_text(arguments.padding) << ", dilation " << to_text(arguments.dilation) << ", groups "
       << arguments.groups << ", transposed " << arguments.transposed << ", output_padding "
       << to_text(arguments.output_padding) << ", \"" << arguments.padding_mode << "\"})";
  return text.str();
}

// What is being looked at.
std::string current;

[[noreturn]] void broken(int line, const char* rule) {
  throw std::logic_error("line " + std::to_string(line) + ": " + rule);
}

#define MUST(rule) \
  if (!(rule)) broken(__LINE__, #rule)

// --- accepted geometries of any size: every method is called, and formulas are held to 128 bits

void check_sizes(const Geometry& g, const Drawn& arguments) {
  Wide rows = g.out_channels;
  Wide cols = g.in_channels;
  for (const Axis& axis : g.axis) {
    MUST(axis.in > 0 && axis.kernel > 0 && axis.out > 0 && axis.stride > 0 && axis.dilation > 0);
    MUST(axis.pad_low >= 0 && axis.pad_high >= 0);
    rows *= axis.out;
    cols *= axis.in;
  }
  MUST(rows == g.rows() && cols == g.cols() && rows * cols * 8 <= kMax);
  const size_t axes = arguments.weight_size.size() - 2;
  for (size_t n = 0; n < axes; ++n) {
    const Axis& axis = g.axis[kAxes - axes + n];
    const Wide extent = static_cast<Wide>(axis.kernel - 1) * axis.dilation + 1;
    const Wide pad = static_cast<Wide>(axis.pad_low) + axis.pad_high;
    const auto& extra = arguments.output_padding;
    const Wide out = g.transposed ? static_cast<Wide>(axis.in - 1) * axis.stride + extent - pad +
                                        extra[extra.size() == 1 ? 0 : n]
                                  : (axis.in + pad - extent) / axis.stride + 1;
    MUST(out == axis.out);
  }
  MUST(g.in_channels % g.groups == 0 && g.out_channels % g.groups == 0);
  MUST(g.in_channels_per_group() * g.groups == g.in_channels);
  MUST(g.out_channels_per_group() * g.groups == g.out_channels);
}

// Position, index or element: one of the two ends, or any between them.
int64_t any_of(Random& random, int64_t size) {
  return random.one_in(3) ? 0 : random.one_in(2) ? size - 1 : random.between(0, size - 1);
}

Position any_position(Random& random, const Geometry& g, int64_t Axis::* size) {
  Position position;
  for (int a = 0; a < kAxes; ++a) position.at[a] = any_of(random, g.axis[a].*size);
  return position;
}

void check_anywhere(const Geometry& g, Random& random) {
  const Geometry back = linfuse::adjoint(linfuse::adjoint(g));
  MUST(back.rows() == g.rows() && back.cols() == g.cols() && back.transposed == g.transposed);
  const Geometry turned = linfuse::adjoint(g);
  MUST(turned.rows() == g.cols() && turned.cols() == g.rows());
  const int64_t c_out = any_of(random, g.out_channels);
  const int64_t c_in = any_of(random, g.in_channels_per_group());
  MUST(g.group_of_out_channel(c_out) < g.groups);

  const Position i = any_position(random, g, &Axis::in);
  const int64_t col = g.column(c_out, c_in, i);
  MUST(col >= 0 && col < g.cols());
  const Position same = linfuse::in_position(g, col % g.in_positions());
  for (int a = 0; a < kAxes; ++a) MUST(same.at[a] == i.at[a]);
  const int64_t row = any_of(random, g.rows());
  const Position of_row = linfuse::out_position(g, row % g.out_positions());
  for (int a = 0; a < kAxes; ++a) MUST(of_row.at[a] >= 0 && of_row.at[a] < g.axis[a].out);

  // A weight of so many elements exists only where they fit; ours is a list of sizes.
  Wide elements = static_cast<Wide>(g.in_channels_per_group()) * g.out_channels;
  for (const Axis& axis : g.axis) elements *= axis.kernel;
  if (elements * 8 > kMax) return;
  const int64_t index = g.weight_index(c_out, c_in);
  MUST(index >= 0 && index + g.kernel_positions() <= elements);
  if (c_in + 1 < g.in_channels_per_group()) {
    MUST(g.weight_index(c_out, c_in + 1) == index + g.weight_step_in());
  }
  if ((c_out + 1) % g.out_channels_per_group() != 0) {
    MUST(g.weight_index(c_out + 1, c_in) == index + g.weight_step_out());
  }
  const Position k = any_position(random, g, &Axis::kernel);
  const int64_t flat = (k.at[0] * g.axis[1].kernel + k.at[1]) * g.axis[2].kernel + k.at[2];
  const Position again = linfuse::kernel_position(g, flat);
  for (int a = 0; a < kAxes; ++a) MUST(again.at[a] == k.at[a]);

  for (int a = 0; a < kAxes; ++a) {
    const int64_t coarse = any_of(random, g.coarse_size(a));
    const int64_t fine = g.fine_position(a, coarse, k.at[a]);
    MUST(fine >= -1 && fine < g.fine_size(a));
    const Wide padded = static_cast<Wide>(coarse) * g.axis[a].stride +
                        static_cast<Wide>(k.at[a]) * g.axis[a].dilation - g.axis[a].pad_low;
    if (padded >= 0 && padded < g.fine_size(a)) MUST(fine == padded);
    if (fine == padded) MUST(g.coarse_position(a, fine, k.at[a]) == coarse);
    const int64_t copies = g.copies(a);
    MUST(copies >= 1);
    const int64_t copy = any_of(random, copies);
    const int64_t at = g.unfold(a, any_of(random, g.fine_size(a)), copy);
    MUST(at >= -1 - g.axis[a].pad_low && at - g.axis[a].pad_high < g.fine_size(a));
    const int64_t to = g.out_of_tap(a, i.at[a], any_of(random, g.transposed ? 1 : copies), k.at[a]);
    MUST(to >= -1 && to < g.axis[a].out);
  }
}

// Lists of taps of single positions, where they are short.
void check_lists_anywhere(const Geometry& g, Random& random) {
  PositionTaps taps;
  for (int a = 0; a < kAxes; ++a) {
    if (g.axis[a].kernel > 1000 || g.copies(a) > 1000) continue;
    const int64_t o = any_of(random, g.axis[a].out);
    taps.list_by_row(g, a, o);
    MUST(static_cast<int64_t>(taps.kernel.size()) <= g.axis[a].kernel);
    for (const TapGroup& group : taps.groups) {
      MUST(group.position >= 0 && group.position < g.axis[a].in);
      PositionTaps back;
      back.list_by_column(g, a, group.position);
      bool found = false;
      for (const TapGroup& other : back.groups) {
        MUST(other.position >= 0 && other.position < g.axis[a].out);
        found =
            found || (other.position == o && other.last - other.first == group.last - group.first);
      }
      MUST(found);
    }
  }
}

// --- accepted geometries of small size, tap by tap

// (o, i, k) of one axis.
using Taps = std::set<std::tuple<int64_t, int64_t, int64_t>>;

// From the definition: which positions of the padded axis there are, and what each one reads.
Taps taps_by_definition(const Geometry& g, int a) {
  const Axis& axis = g.axis[a];
  Taps taps;
  for (int64_t coarse = 0; coarse < g.coarse_size(a); ++coarse) {
    for (int64_t k = 0; k < axis.kernel; ++k) {
      int64_t fine = coarse * axis.stride + k * axis.dilation - axis.pad_low;
      const int64_t size = g.fine_size(a);
      if (fine < 0 || fine >= size) {
        if (g.padding_mode == PaddingMode::kZeros) continue;
        if (g.padding_mode == PaddingMode::kReplicate) {
          fine = std::clamp<int64_t>(fine, 0, size - 1);
        }
        if (g.padding_mode == PaddingMode::kCircular) fine = (fine + size) % size;
        if (g.padding_mode == PaddingMode::kReflect) {
          fine = fine < 0 ? -fine : 2 * (size - 1) - fine;
        }
      }
      g.transposed ? taps.emplace(fine, coarse, k) : taps.emplace(coarse, fine, k);
    }
  }
  return taps;
}

Taps taps_by_list(const Geometry& g, int a, bool by_row) {
  Taps taps;
  PositionTaps lists;
  for (int64_t p = 0; p < (by_row ? g.axis[a].out : g.axis[a].in); ++p) {
    by_row ? lists.list_by_row(g, a, p) : lists.list_by_column(g, a, p);
    int64_t before = -1;
    for (const TapGroup& group : lists.groups) {
      MUST(group.position > before && group.first < group.last);
      before = group.position;
      for (int64_t n = group.first; n < group.last; ++n) {
        const int64_t k = lists.kernel[static_cast<size_t>(n)];
        MUST(n == group.first || k > lists.kernel[static_cast<size_t>(n - 1)]);
        const bool is_new = by_row ? taps.emplace(p, group.position, k).second
                                   : taps.emplace(group.position, p, k).second;
        MUST(is_new);
      }
    }
  }
  return taps;
}

Taps taps_by_copies(const Geometry& g, int a) {
  Taps taps;
  for (int64_t i = 0; i < g.axis[a].in; ++i) {
    for (int64_t copy = 0; copy < (g.transposed ? 1 : g.copies(a)); ++copy) {
      for (int64_t k = 0; k < g.axis[a].kernel; ++k) {
        const int64_t o = g.out_of_tap(a, i, copy, k);
        MUST(o >= -1 && o < g.axis[a].out);
        if (o >= 0) MUST(taps.emplace(o, i, k).second);
      }
    }
  }
  return taps;
}

void check_rows(const Geometry& g) {
  const RowTables tables(g);
  const RowTaps taps = tables.view();
  const std::vector<int64_t> words = tables.pack();
  const RowTaps packed = tables.view(words.data());
  const linfuse::KernelTables by_kernel(g);
  const linfuse::KernelTaps kernel_taps = by_kernel.view();
  const std::vector<int64_t> kernel_words = by_kernel.pack();
  const linfuse::KernelTaps kernel_packed = by_kernel.view(kernel_words.data());
  bool collides = false;
  int64_t before = 0;
  for (int64_t row = 0; row < g.rows(); ++row) {
    const int64_t c_out = row / g.out_positions();
    const Position o = linfuse::out_position(g, row % g.out_positions());
    MUST(taps.stored.before(g, row) == before && taps.stored.before(g, c_out, o) == before);
    MUST(packed.stored.before(g, row) == before && kernel_taps.stored.before(g, row) == before);
    MUST(kernel_packed.stored.before(g, row) == before);
    // The elements of the row, one after the other, by ascending column.
    int64_t last_col = -1;
    int64_t here = 0;
    for (int64_t c_in = 0; c_in < g.in_channels_per_group(); ++c_in) {
      Position slot{{0, 0, 0}};
      for (auto* x = taps.begin(0, o.at[0]); x != taps.end(0, o.at[0]); ++x, ++slot.at[0]) {
        slot.at[1] = 0;
        for (auto* y = taps.begin(1, o.at[1]); y != taps.end(1, o.at[1]); ++y, ++slot.at[1]) {
          slot.at[2] = 0;
          for (auto* z = taps.begin(2, o.at[2]); z != taps.end(2, o.at[2]); ++z, ++slot.at[2]) {
            const int64_t col = g.column(c_out, c_in, {{x->position, y->position, z->position}});
            MUST(col > last_col && col < g.cols());
            last_col = col;
            MUST(taps.stored.index(g, c_out, c_in, o, slot) == before + here);
            ++here;
            collides = collides || x->last - x->first > 1 || y->last - y->first > 1 ||
                       z->last - z->first > 1;
          }
        }
      }
    }
    MUST(here == taps.stored.per_channel(o) * g.in_channels_per_group());
    before += here;
  }
  MUST(taps.stored.before(g, g.rows()) == before);
  if (collides) MUST(g.taps_may_collide());

  // By kernel element: the same taps once more, and the slot of each among those of its row.
  for (int a = 0; a < kAxes; ++a) {
    Taps found;
    for (int64_t k = 0; k < g.axis[a].kernel; ++k) {
      MUST(kernel_packed.end(a, k) - kernel_packed.begin(a, k) ==
           kernel_taps.end(a, k) - kernel_taps.begin(a, k));
      int64_t last_o = -1;
      for (auto* use = kernel_taps.begin(a, k); use != kernel_taps.end(a, k); ++use) {
        MUST(use->o > last_o);
        last_o = use->o;
        const TapGroup* group = taps.begin(a, use->o) + use->slot;
        MUST(use->slot >= 0 && group < taps.end(a, use->o));
        found.emplace(use->o, group->position, k);
      }
    }
    MUST(found == taps_by_definition(g, a));
  }
}

// A block of rows: its tables begin where it begins, and hold the same.
void check_block(const Geometry& g, Random& random) {
  const int64_t start = random.between(0, g.rows());
  const int64_t stop = random.between(start, g.rows());
  const RowTables all(g);
  const RowTables some(g, start, stop);
  const RowTaps taps = all.view();
  const std::vector<int64_t> words = some.pack();
  const linfuse::KernelTables by_kernel(g, start, stop);
  const std::vector<int64_t> kernel_words = by_kernel.pack();
  const int64_t stored = taps.stored.between(g, start, stop);
  for (const linfuse::StoredRows& block :
       {some.view().stored, by_kernel.view().stored, by_kernel.view(kernel_words.data()).stored}) {
    MUST(block.between(g, start, stop) == stored);
    for (int64_t row = start; row < stop; ++row) {
      MUST(block.between(g, start, row) == taps.stored.between(g, start, row));
    }
  }
  for (const RowTaps& block : {some.view(), some.view(words.data())}) {
    for (int64_t row = start; row < stop; ++row) {
      const Position o = linfuse::out_position(g, row % g.out_positions());
      for (int a = 0; a < kAxes; ++a) {
        const TapGroup* one = taps.begin(a, o.at[a]);
        const TapGroup* two = block.begin(a, o.at[a]);
        MUST(taps.end(a, o.at[a]) - one == block.end(a, o.at[a]) - two);
        for (; one != taps.end(a, o.at[a]); ++one, ++two) {
          MUST(one->position == two->position && one->last - one->first == two->last - two->first);
          for (int64_t n = 0; n < one->last - one->first; ++n) {
            MUST(taps.kernel[a][one->first + n] == block.kernel[a][two->first + n]);
          }
        }
      }
    }
  }
}

void check_every_tap(const Geometry& g, Random& random) {
  for (int a = 0; a < kAxes; ++a) {
    const Taps taps = taps_by_definition(g, a);
    for (const auto& [o, i, k] : taps) {
      MUST(o >= 0 && o < g.axis[a].out && i >= 0 && i < g.axis[a].in);
      MUST(k >= 0 && k < g.axis[a].kernel);
    }
    MUST(taps == taps_by_list(g, a, true));
    MUST(taps == taps_by_list(g, a, false));
    MUST(taps == taps_by_copies(g, a));
    const AxisTaps table = linfuse::taps_by_row(g, a);
    MUST(table.kernel.size() == taps.size());
  }
  check_rows(g);
  check_block(g, random);
  std::set<int64_t> starts;
  for (int64_t c_out = 0; c_out < g.out_channels; ++c_out) {
    for (int64_t c_in = 0; c_in < g.in_channels_per_group(); ++c_in) {
      starts.insert(g.weight_index(c_out, c_in));
    }
  }
  const int64_t pairs = g.out_channels * g.in_channels_per_group();
  MUST(static_cast<int64_t>(starts.size()) == pairs && *starts.begin() == 0);
  MUST(*starts.rbegin() == (pairs - 1) * g.kernel_positions());
}

}  // namespace

int main(int count_of_arguments, char** arguments) {
  if (count_of_arguments != 3) {
    std::cerr << "usage: geometry <count> <seed>\n";
    return 2;
  }
  // Whatever ends the process, a sanitizer or the caller's patience, the arguments are said.
  for (int number : {SIGABRT, SIGTERM}) {
    std::signal(number, [](int) {
      std::cout << current << std::endl;
      std::_Exit(1);
    });
  }
  const int64_t count = std::strtoll(arguments[1], nullptr, 10);
  Random random(std::strtoull(arguments[2], nullptr, 10));
  int64_t accepted = 0;
  int64_t walked = 0;
  std::map<std::string, int64_t> rejected;
  for (int64_t n = 0; n < count; ++n) {
    const Drawn drawn = random_arguments(random);
    current = describe(drawn);
    try {
      const Geometry g = linfuse::make_geometry("op", drawn.view());
      ++accepted;
      check_sizes(g, drawn);
      check_anywhere(g, random);
      check_lists_anywhere(g, random);
      if (g.rows() * g.cols() <= kMostToWalk && g.kernel_positions() <= kMostToWalk) {
        bool is_short = true;
        for (int a = 0; a < kAxes; ++a) is_short = is_short && g.copies(a) <= kMostToWalk;
        if (is_short) {
          ++walked;
          check_every_tap(g, random);
        }
      }
    } catch (const std::invalid_argument& error) {
      const std::string message = error.what();
      if (message.rfind("op: ", 0) != 0) {
        std::cout << current << "\nan error that does not name its op: " << message << "\n";
        return 1;
      }
      ++rejected[message.substr(4, message.find(' ', 4) - 4)];
    } catch (const std::logic_error& error) {
      std::cout << current << "\nbroken, " << error.what() << "\n";
      return 1;
    }
  }
  int64_t refused = 0;
  for (const auto& [first_word, times] : rejected) refused += times;
  std::cout << "accepted " << accepted << " walked " << walked << " rejected " << refused << "\n";
  for (const auto& [first_word, times] : rejected) {
    std::cout << "  " << times << " " << first_word << "\n";
  }
  return 0;
}
