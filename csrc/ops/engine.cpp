#include "engine.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace linfuse {
namespace {

// In the order of their enumerations.
constexpr const char* kEngines[] = {"auto", "own", "torch"};
constexpr const char* kWays[] = {"cheapest", "input",    "tiles",         "output",
                                 "columns",  "position", "position_tiles"};

template <typename Choice, size_t kCount>
Choice choice_from(const std::string& what, const char* const (&names)[kCount],
                   const std::string& name) {
  std::string all;
  for (size_t n = 0; n < kCount; ++n) {
    if (name == names[n]) return static_cast<Choice>(n);
    all += std::string(n == 0 ? "" : n + 1 < kCount ? ", " : " or ") + names[n];
  }
  throw std::invalid_argument(what + " must be " + all + ", got '" + name + "'");
}

Engine engine_from(const std::string& what, const std::string& name) {
  return choice_from<Engine>(what, kEngines, name);
}

std::atomic<Engine>& current_engine() {
  static std::atomic<Engine> engine = [] {
    const char* name = std::getenv("LINFUSE_ENGINE");
    return name == nullptr || *name == '\0' ? Engine::kAuto : engine_from("LINFUSE_ENGINE", name);
  }();
  return engine;
}

std::atomic<Way>& current_way() {
  static std::atomic<Way> way = Way::kCheapest;
  return way;
}

}  // namespace

Engine engine() { return current_engine().load(std::memory_order_relaxed); }

std::string set_engine(const std::string& name) {
  const Engine next = engine_from("set_engine: the engine", name);
  return kEngines[static_cast<int>(current_engine().exchange(next))];
}

Way way() { return current_way().load(std::memory_order_relaxed); }

std::string set_way(const std::string& name) {
  const Way next = choice_from<Way>("set_way: the way", kWays, name);
  return kWays[static_cast<int>(current_way().exchange(next))];
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
