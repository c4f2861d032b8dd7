// A stack of its own that runs until it yields: one thread of a block.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <functional>
#include <memory>

namespace cuda_on_cpu {

class Fiber {
 public:
  Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Runs `body` from its start, or on from where it yielded; returns when it yields or ends.
  void resume(const std::function<void()>& body);

  // Returns to the caller of resume(); called on the fiber's own stack.
  void yield();

  bool ended() const { return ended_; }
  void restart() { ended_ = false; }
  bool on_stack(const void* address) const;

 private:
  // Five words that __builtin_setjmp fills. Unlike swapcontext it makes no system call, which would
  // take most of the time; makecontext is used once per fiber, to enter the stack.
  using Jump = void* [5];

  static void enter();
  [[noreturn]] void run();
  void switch_in();
  void switch_out();

  std::unique_ptr<char[]> stack_;
  ucontext_t entry_;
  Jump inside_;
  Jump outside_;
  const std::function<void()>* body_ = nullptr;
  bool entered_ = false;
  bool ended_ = false;

  // AddressSanitizer's view of the two stacks.
  void* fake_inside_ = nullptr;
  void* fake_outside_ = nullptr;
  const void* outside_bottom_ = nullptr;
  size_t outside_size_ = 0;
};

}  // namespace cuda_on_cpu
