#include "fiber.h"

#include <cstdint>

#if defined(CUDA_ON_CPU_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {
namespace {

// Room for AddressSanitizer to print a report; pages that are not touched cost nothing.
constexpr size_t kStackBytes = size_t{1} << 18;

Fiber* entering = nullptr;

// GCC forbids __builtin_longjmp in the function that called __builtin_setjmp.
[[noreturn, gnu::noinline]] void jump(void** to) { __builtin_longjmp(to, 1); }

void start_switch(void** save, const void* bottom, size_t size) {
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_start_switch_fiber(save, bottom, size);
#else
  (void)save, (void)bottom, (void)size;
#endif
}

void finish_switch(void* saved, const void** bottom, size_t* size) {
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_finish_switch_fiber(saved, bottom, size);
#else
  (void)saved, (void)bottom, (void)size;
#endif
}

}  // namespace

Fiber::Fiber() : stack_(new char[kStackBytes]) {}

bool Fiber::on_stack(const void* address) const {
  return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(stack_.get()) <
         kStackBytes;
}

void Fiber::resume(const std::function<void()>& body) {
  body_ = &body;
  start_switch(&fake_outside_, stack_.get(), kStackBytes);
  switch_in();
  finish_switch(fake_outside_, nullptr, nullptr);
}

void Fiber::yield() {
  start_switch(&fake_inside_, outside_bottom_, outside_size_);
  switch_out();
  finish_switch(fake_inside_, &outside_bottom_, &outside_size_);
}

[[gnu::noinline]] void Fiber::switch_in() {
  if (__builtin_setjmp(outside_) != 0) return;
  if (entered_) jump(inside_);
  entered_ = true;
  entering = this;
  getcontext(&entry_);
  entry_.uc_stack.ss_sp = stack_.get();
  entry_.uc_stack.ss_size = kStackBytes;
  makecontext(&entry_, &Fiber::enter, 0);
  setcontext(&entry_);
}

[[gnu::noinline]] void Fiber::switch_out() {
  if (__builtin_setjmp(inside_) == 0) jump(outside_);
}

void Fiber::enter() { entering->run(); }

void Fiber::run() {
  finish_switch(nullptr, &outside_bottom_, &outside_size_);
  for (;;) {  // once per block
    (*body_)();
    ended_ = true;
    yield();
  }
}

}  // namespace cuda_on_cpu
