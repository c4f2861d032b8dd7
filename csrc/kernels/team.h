// How a team of threads divides what every channel of some has: a number of elements.
//
// Where a team has threads enough for several channels, each keeps one element, and goes from
// channel to channel with what it knows of it. Neighbours have neighbouring elements, then
// neighbouring channels.
#pragma once

#include <cstdint>

#include "../geometry/geometry.h"

namespace linfuse {

// Elements element, element + element_step, ... of channels channel, channel + channel_step, ...
struct TeamShare {
  int64_t element;
  int64_t element_step;
  int channel;
  int channel_step;
};

// The share of thread `lane` of `lanes`, where a channel has `elements`.
LINFUSE_HD inline TeamShare team_share(int lane, int lanes, int64_t elements) {
  if (elements >= lanes) return {lane, lanes, 0, 1};
  const int each = static_cast<int>(elements);
  const int channels = lanes / each;
  const int channel = lane / each;
  // What does not fill a channel is left out.
  return {channel < channels ? lane - channel * each : elements, elements, channel, channels};
}

}  // namespace linfuse
