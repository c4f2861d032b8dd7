// Between a matrix of rows f, as torch has it, and one with f innermost, as the tiles want it:
//
//   pack           to[place[n] + f] = from[f * stride + n]
//   unpack         to[f * stride + n] = from[n * step + f]
//
// or with one that has f innermost itself:
//
//   pack_lines     to[place[n] + f] = from[n * stride + f]
//   unpack_lines   to[n * stride + f] = from[n * step + f]
//
// or with one in which each lane of a vector has its own place, such as rows of several channels:
//
//   pack_lanes     to[n * step + m] = from[offset[m] + n * position]
//
// or convert a line and turn nothing:
//
//   widen, narrow  to[n] = from[n]
//
// pack, unpack and pack_lanes turn square blocks of one vector by one vector inside registers. All
// convert between T and Accumulate<T> on the way; those with `stream` may write past the caches,
// for what is far larger than they are: a store that misses would wait for a line that nobody
// needs. turn.inl is the one source, compiled once per SIMD level and type.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "simd.h"

namespace linfuse {

template <typename T>
struct PackTask {
  const T* from;         // row 0
  int64_t stride;        // from one row to the next, or from one n
  int64_t rows;          // that exist; the rest of the vectors is filled with zeros
  int64_t count;         // n
  int vectors;           // of f
  int64_t next;          // from here to what will be packed next, in elements
  const int64_t* place;  // null where only the sums are wanted
  Accumulate<T>* to;
  bool stream;  // whether to write past the caches
  // Where wanted, sums[f] += sum over n of scale[n] times what goes to place[n] + f: in
  // Accumulate<T> over a few neighbours, then in double.
  double* sums;
  const Accumulate<T>* scale;
};

template <typename T>
struct PackLanesTask {
  const T* from;
  const int64_t* offset;  // of each lane; -1 where it is filled with zeros
  int64_t position;       // from one n to the next
  int64_t count;          // n
  int64_t lanes;          // that are written
  Accumulate<T>* to;      // null where only the sums are wanted
  int64_t step;
  double* sums;  // where wanted, sums[m] += sum over n, like those of pack
};

template <typename T>
struct UnpackTask {
  const Accumulate<T>* from;
  int64_t step;
  int64_t rows;
  int64_t count;
  T* to;
  int64_t stride;
  bool stream;
};

template <typename T>
struct TurnSet {
  void (*pack)(const PackTask<T>& task);
  void (*unpack)(const UnpackTask<T>& task);
  void (*pack_lines)(const PackTask<T>& task);
  void (*unpack_lines)(const UnpackTask<T>& task);
  void (*pack_lanes)(const PackLanesTask<T>& task);
  void (*widen)(const T* from, int64_t count, Accumulate<T>* to);
  void (*narrow)(const Accumulate<T>* from, int64_t count, T* to);
  // Makes what was streamed visible to other threads.
  void (*finish)();
};

}  // namespace linfuse
