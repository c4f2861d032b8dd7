// Preloaded into a process, this makes the n-th allocation fail that a call asks for: an `operator
// new` called from within one library, or a tensor's memory, which torch's core library takes from
// posix_memalign. So failures hit each allocation in turn, those of worker threads as well, and
// none of Python's or of torch's bookkeeping.
#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

// Where the code and data of a library lie. (dladdr would look for the symbol as well, which in
// torch's libraries takes milliseconds.)
struct Library {
  const char* part_of_name;
  uintptr_t first;
  uintptr_t last;

  bool holds(const void* address) const {
    const auto at = reinterpret_cast<uintptr_t>(address);
    return first <= at && at < last;
  }
};

int find(dl_phdr_info* info, size_t, void* wanted) {
  auto* library = static_cast<Library*>(wanted);
  if (std::strstr(info->dlpi_name, library->part_of_name) == nullptr) return 0;
  library->first = UINTPTR_MAX;
  for (int n = 0; n < info->dlpi_phnum; ++n) {
    const auto& part = info->dlpi_phdr[n];
    if (part.p_type != PT_LOAD) continue;
    const uintptr_t start = info->dlpi_addr + part.p_vaddr;
    if (start < library->first) library->first = start;
    if (start + part.p_memsz > library->last) library->last = start + part.p_memsz;
  }
  return 1;
}

std::atomic<bool> armed{false};
std::atomic<long> left{0};  // NOLINT(google-runtime-int): as ctypes has it
std::atomic<long> seen{0};  // NOLINT(google-runtime-int)
Library ours = {"", 0, 0};
Library torchs = {"libc10.so", 0, 0};

// Counts an allocation if its caller lies in the library, and says whether it is to fail.
bool fails(const Library& library, const void* caller) {
  if (!armed || !library.holds(caller)) return false;
  ++seen;
  return left > 0 && left-- == 1;
}

}  // namespace

// Lets the n-th allocation from now on fail; none for 0.
extern "C" void arm(const char* path, long n) {  // NOLINT(google-runtime-int)
  ours = {path, 0, 0};
  dl_iterate_phdr(find, &ours);
  dl_iterate_phdr(find, &torchs);
  seen = 0;
  left = n;
  armed = true;
}

// Returns how many allocations there were.
extern "C" long disarm() {  // NOLINT(google-runtime-int)
  armed = false;
  return seen;
}

void* operator new(std::size_t size) {
  if (fails(ours, __builtin_return_address(0))) throw std::bad_alloc();
  void* const block = std::malloc(size > 0 ? size : 1);
  if (block == nullptr) throw std::bad_alloc();
  return block;
}

void operator delete(void* block) noexcept { std::free(block); }

void operator delete(void* block, std::size_t) noexcept { std::free(block); }

extern "C" int posix_memalign(void** block, size_t alignment, size_t size) noexcept {
  using Function = int (*)(void**, size_t, size_t);
  static const auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "posix_memalign"));
  if (fails(torchs, __builtin_return_address(0))) return ENOMEM;
  return real(block, alignment, size);
}
