#include "memory.h"

#include <cstring>
#include <new>

#include "races.h"

namespace cuda_on_cpu {
namespace {

constexpr int kPoison = 0xff;

}  // namespace

// Storage is aligned to twice of what was asked for, and skipping once that leaves the one but not
// the other: a kernel that counts on more than it was promised does not get it by chance.
Memory::Memory(const std::string& name, size_t bytes, size_t alignment, const void* contents)
    : bytes_(bytes),
      alignment_(2 * alignment),
      storage_(static_cast<char*>(::operator new(kOutskirts + alignment + bytes + kOutskirts,
                                                 std::align_val_t(alignment_)))),
      data_(storage_ + kOutskirts + alignment) {
  std::memset(data_, kPoison, bytes);
  if (contents != nullptr) std::memcpy(data_, contents, bytes);
  watch(name, data_, bytes, /*initialised=*/contents != nullptr);
}

Memory::~Memory() {
  unwatch(data_);
  ::operator delete(storage_, std::align_val_t(alignment_));
}

void Memory::copy_to(void* host) const { std::memcpy(host, data_, bytes_); }

}  // namespace cuda_on_cpu
