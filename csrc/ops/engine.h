// Who computes the products of fuse_conv_linear and fuse_linear_conv: our kernels or torch's
// convolution; and by which way ours do on a CPU.
#pragma once

#include <string>

#include "../kernels/fuse_conv_linear.h"

namespace linfuse {

enum class Engine : int { kAuto, kOwn, kTorch };

// What set_engine() said last, and before that the environment variable LINFUSE_ENGINE (auto, own,
// torch), which is read once; kAuto where neither says anything. Throws std::invalid_argument for
// an unknown name in the variable.
Engine engine();

// Returns the name of the engine that was in force. Throws std::invalid_argument for an unknown
// one.
std::string set_engine(const std::string& name);

// What set_way() said last.
Way way();

// Returns the name of the way that was in force. Throws std::invalid_argument for an unknown one.
// A layer that cannot go a way other than "cheapest" is an error, so this is for tests.
std::string set_way(const std::string& name);

// The rule: whether torch's convolution makes the product on that device. Our CPU kernels win
// nearly everywhere. Those for CUDA have not been timed against cuDNN, which so stays in charge.
bool goes_by_torch(bool is_cuda);

}  // namespace linfuse
