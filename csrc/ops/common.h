// What every op does before its kernel: read the arguments, check the tensors, find threads.
// The only folder that includes torch, and of torch only the stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../geometry/make_geometry.h"
#include "../kernels/dtype.h"
#include "../kernels/parallel.h"

#if defined(LINFUSE_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace linfuse {

using torch::stable::Tensor;
using IntList = torch::headeronly::IntHeaderOnlyArrayRef;

// The dtype of a tensor that the kernels know; rejects all others.
DType dtype_of(const char* op, const char* name, const Tensor& tensor);

// Rejects a tensor whose dtype or device is not that of `like`, or whose shape is not `size`.
void check_like(const char* op, const char* name, const Tensor& tensor, const char* like_name,
                const Tensor& like, IntList size);

// [start, stop) of the matrix's rows that are asked for; all of them without `rows`.
std::pair<int64_t, int64_t> row_range(const char* op, const std::optional<IntList>& rows,
                                      const Geometry& geometry);

// The tensor itself where it is contiguous, and else a copy.
Tensor as_contiguous(const char* op, const Tensor& tensor);

// A vector that may be left out: rejected as by check_like, and contiguous.
std::optional<Tensor> checked_vector(const char* op, const char* name,
                                     const std::optional<Tensor>& vector, const char* like_name,
                                     const Tensor& like, int64_t size);

// Fresh, contiguous and uninitialised, on the device of `like` and of its dtype unless one is
// given. Straight from the allocator: torch::stable::new_empty looks its op up by name, which for a
// small layer takes longer than the kernel; so does torch::stable::contiguous.
Tensor allocate(const char* op, const Tensor& like, IntList size,
                std::optional<torch::headeronly::ScalarType> dtype = std::nullopt);

// The data of an optional tensor, null where there is none.
const void* data_or_null(const std::optional<Tensor>& tensor);

// Calls another op that returns a weight and a bias, by its full name, on operands that fit.
template <typename... Arguments>
std::tuple<Tensor, Tensor> call_op(const char* op, const char* name,
                                   const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  if (torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) {
    // Its own words are lost in the stable ABI of 2.11.
    throw std::runtime_error(std::string(op) +
                             ": torch's convolution failed, most likely out of memory");
  }
  using torch::stable::detail::to;
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

// What `make` returns, tables of a geometry; where they do not fit, in the words of allocate().
template <typename Make>
auto make_tables(const char* op, const Make& make) {
  try {
    return make();
  } catch (const std::bad_alloc&) {
  } catch (const std::length_error&) {
  }
  throw std::runtime_error(std::string(op) + ": out of memory, could not hold the taps of rows");
}

// Scratch memory for a kernel, on the device of `like` and while this lives. On a CPU what small
// layers need is on the stack; all else comes from torch, so that running out of memory is torch's
// own error, and memory of a card is kept for the stream's work when this is gone.
class [[gnu::visibility("hidden")]] Scratch {
 public:
  Scratch(const char* op, const Tensor& like) : op_(op), like_(like) {}
  void* operator()(int64_t bytes);

 private:
  static constexpr int64_t kSmall = int64_t{1} << 15;

  const char* op_;
  const Tensor& like_;
  alignas(64) char small_[kSmall];
  int64_t taken_ = 0;  // of small_
  std::vector<Tensor> blocks_;
};

// torch's thread pool, in the kernels' terms.
ParallelFor torch_parallel_for();

#if defined(LINFUSE_WITH_CUDA)
// The caller's current stream on the tensor's device, which is current while this lives.
class [[gnu::visibility("hidden")]] CudaScope {
 public:
  explicit CudaScope(const Tensor& tensor);
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Turns a launcher's error into an exception that names the op.
void check_cuda(const char* op, cudaError_t error);

// The tables of a kernel on the card of `like`, whose stream this is. Large ones wait for what the
// stream has to do, unless it is captured.
Tensor to_card(const char* op, const Tensor& like, const std::vector<int64_t>& words,
               cudaStream_t stream);
#endif

}  // namespace linfuse
