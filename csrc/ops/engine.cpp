#include "engine.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace linfuse {
namespace {

constexpr const char* kNames[] = {"auto", "own", "torch"};

Engine engine_from(const std::string& what, const std::string& name) {
  for (int n = 0; n < 3; ++n) {
    if (name == kNames[n]) return static_cast<Engine>(n);
  }
  throw std::invalid_argument(what + " must be auto, own or torch, got '" + name + "'");
}

std::atomic<Engine>& current() {
  static std::atomic<Engine> engine = [] {
    const char* name = std::getenv("LINFUSE_ENGINE");
    return name == nullptr || *name == '\0' ? Engine::kAuto : engine_from("LINFUSE_ENGINE", name);
  }();
  return engine;
}

}  // namespace

Engine engine() { return current().load(std::memory_order_relaxed); }

std::string set_engine(const std::string& name) {
  const Engine next = engine_from("set_engine: the engine", name);
  return kNames[static_cast<int>(current().exchange(next))];
}

bool goes_by_torch(bool is_cuda) {
  switch (engine()) {
    case Engine::kOwn:
      return false;
    case Engine::kTorch:
      return true;
    case Engine::kAuto:
      break;
  }
  return is_cuda;
}

}  // namespace linfuse
