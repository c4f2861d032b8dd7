// The input positions of a fused product in classes whose positions have the same taps.
//
// Terms
//   class   on each axis, the input positions of one remainder by the stride: they share the kernel
//           elements that can reach them at all, so that no hole of the stride is multiplied
//   slot    on each axis, a kernel element that reaches the class, and which copy of i in the
//           padding it reads (0 is i itself)
#pragma once

#include <cstdint>

#include "../geometry/geometry.h"

namespace linfuse {

// One class: the positions first + n * step, n < count, and the kernel elements that reach them.
struct Class {
  int64_t first[kAxes];
  int64_t count[kAxes];
  int64_t first_kernel[kAxes];
  int64_t kernels[kAxes];

  LINFUSE_HD int64_t positions() const { return count[0] * count[1] * count[2]; }
};

struct Tap {
  int64_t o;  // -1 where the slot is no tap
  int64_t k;
};

// What all positions of a class have in common of a slot.
struct Shift {
  int64_t out[kAxes];  // not set where padding repeats positions
  int64_t k;
};

struct Classes {
  int64_t step[kAxes];         // from one position of a class to the next
  int64_t kernel_step[kAxes];  // from one kernel element that reaches a class to the next
  bool repeats;                // whether padding repeats input positions

  LINFUSE_HD int64_t count() const { return step[0] * step[1] * step[2]; }

  LINFUSE_HD Class at(const Geometry& g, int64_t number) const {
    Class c;
    for (int a = kAxes - 1; a >= 0; --a) {
      const Axis& axis = g.axis[a];
      c.first[a] = number % step[a];
      number /= step[a];
      c.count[a] = (axis.in - c.first[a] - 1) / step[a] + 1;
      int64_t k = 0;
      if (kernel_step[a] > 1) {
        const int64_t at = c.first[a] + axis.pad_low;
        while (k < kernel_step[a] && k < axis.kernel &&
               (at - k * axis.dilation) % axis.stride != 0) {
          ++k;
        }
      }
      c.first_kernel[a] = k;
      c.kernels[a] =
          k < kernel_step[a] && k < axis.kernel ? (axis.kernel - 1 - k) / kernel_step[a] + 1 : 0;
    }
    return c;
  }

  LINFUSE_HD Position slots(const Geometry& g, const Class& c) const {
    Position slots;
    for (int a = 0; a < kAxes; ++a) slots.at[a] = g.copies(a) * c.kernels[a];
    return slots;
  }

  LINFUSE_HD int64_t slot_count(const Geometry& g, const Class& c) const {
    const Position all = slots(g, c);
    return all.at[0] * all.at[1] * all.at[2];
  }

  // Where padding repeats nothing, a slot ties position first + n * step of its class, on each
  // axis, to output out + n * out_step(); to none where that is beyond the outputs.
  LINFUSE_HD Shift shift(const Geometry& g, const Class& c, const Position& slot) const {
    constexpr int64_t kNowhere = INT64_MIN / 2;
    Shift shift;
    if (repeats) {
      shift.k = tap(g, c, {}, slot).k;
      return shift;
    }
    shift.k = 0;
    for (int a = 0; a < kAxes; ++a) {
      const Axis& axis = g.axis[a];
      const int64_t k = c.first_kernel[a] + slot.at[a] * kernel_step[a];
      shift.k = shift.k * axis.kernel + k;
      if (g.transposed) {
        shift.out[a] = k * axis.dilation - axis.pad_low;
      } else {
        const int64_t reach = c.first[a] + axis.pad_low - k * axis.dilation;
        shift.out[a] = reach % axis.stride == 0 ? reach / axis.stride : kNowhere;
      }
    }
    return shift;
  }

  LINFUSE_HD static int64_t out_step(const Geometry& g, int a) {
    return g.transposed ? g.axis[a].stride : 1;
  }

  // The input position of position n of a class.
  LINFUSE_HD Position position(const Class& c, const Position& n) const {
    Position i;
    for (int a = 0; a < kAxes; ++a) i.at[a] = c.first[a] + n.at[a] * step[a];
    return i;
  }

  // The output that slot number `slot` of `slots`, whose shift this is, ties position n of the
  // class to; -1 where there is none.
  LINFUSE_HD int64_t out_of(const Geometry& g, const Class& c, const Position& n,
                            const Shift& shift, int64_t slot, const Position& slots) const {
    if (repeats) return tap(g, c, position(c, n), unravel(slot, slots.at[1], slots.at[2])).o;
    int64_t o = 0;
    for (int a = 0; a < kAxes; ++a) {
      const int64_t at = shift.out[a] + n.at[a] * out_step(g, a);
      if (at < 0 || at >= g.axis[a].out) return -1;
      o = o * g.axis[a].out + at;
    }
    return o;
  }

  // What a slot of the class ties the input position i to.
  LINFUSE_HD Tap tap(const Geometry& g, const Class& c, const Position& i,
                     const Position& slot) const {
    Tap tap = {0, 0};
    for (int a = 0; a < kAxes; ++a) {
      const int64_t k = c.first_kernel[a] + slot.at[a] % c.kernels[a] * kernel_step[a];
      const int64_t at = g.out_of_tap(a, i.at[a], slot.at[a] / c.kernels[a], k);
      tap.o = tap.o < 0 || at < 0 ? -1 : tap.o * g.axis[a].out + at;
      tap.k = tap.k * g.axis[a].kernel + k;
    }
    return tap;
  }
};

// From one kernel element that reaches a position to the next one that does.
inline int64_t kernel_step(const Geometry& g, int a) {
  if (g.transposed) return 1;
  int64_t divisor = g.axis[a].stride;
  for (int64_t rest = g.axis[a].dilation; rest != 0;) {
    const int64_t next = divisor % rest;
    divisor = rest;
    rest = next;
  }
  return g.axis[a].stride / divisor;
}

inline Classes classes_of(const Geometry& g) {
  Classes classes;
  classes.repeats = g.taps_may_collide();
  for (int a = 0; a < kAxes; ++a) {
    const Axis& axis = g.axis[a];
    classes.step[a] = g.transposed ? 1 : axis.stride < axis.in ? axis.stride : axis.in;
    // Copies in the padding have remainders of their own.
    classes.kernel_step[a] = g.copies(a) > 1 ? 1 : kernel_step(g, a);
  }
  return classes;
}

// Positions of the largest class on an axis.
inline int64_t most_positions(const Geometry& g, const Classes& classes, int a) {
  return (g.axis[a].in - 1) / classes.step[a] + 1;
}

}  // namespace linfuse
