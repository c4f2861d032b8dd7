#include "common.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <stdexcept>
#if defined(LINFUSE_PLAIN_THREADS)
#include <thread>
#endif

#include "../kernels/upload.h"

namespace linfuse {

using detail::reject;
using detail::to_text;
using torch::headeronly::ScalarType;

DType dtype_of(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      reject(op, std::string("`") + name +
                     "` must be float32, float64, float16 or bfloat16, got another dtype");
  }
}

void check_like(const char* op, const char* name, const Tensor& tensor, const char* like_name,
                const Tensor& like, IntList size) {
  if (tensor.scalar_type() != like.scalar_type()) {
    reject(op, std::string("`") + name + "` must have the dtype of `" + like_name + "`");
  }
  if (tensor.device() != like.device()) {
    reject(op, std::string("`") + name + "` must be on the device of `" + like_name + "`");
  }
  const IntList actual = tensor.sizes();
  if (!std::equal(actual.begin(), actual.end(), size.begin(), size.end())) {
    reject(op, std::string("`") + name + "` must have shape " + to_text(size) + ", got " +
                   to_text(actual));
  }
}

std::pair<int64_t, int64_t> row_range(const char* op, const std::optional<IntList>& rows,
                                      const Geometry& geometry) {
  if (!rows.has_value()) return {0, geometry.rows()};
  if (rows->size() != 2 || (*rows)[0] < 0 || (*rows)[0] > (*rows)[1] ||
      (*rows)[1] > geometry.rows()) {
    reject(op, "`rows` must be (start, stop) with 0 <= start <= stop <= " +
                   std::to_string(geometry.rows()) + ", got " + to_text(*rows));
  }
  return {(*rows)[0], (*rows)[1]};
}

Tensor as_contiguous(const char* op, const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  Tensor copy = allocate(op, tensor, tensor.sizes());
  torch::stable::copy_(copy, tensor);
  return copy;
}

std::optional<Tensor> checked_vector(const char* op, const char* name,
                                     const std::optional<Tensor>& vector, const char* like_name,
                                     const Tensor& like, int64_t size) {
  if (!vector.has_value()) return std::nullopt;
  check_like(op, name, *vector, like_name, like, {size});
  return as_contiguous(op, *vector);
}

Tensor allocate(const char* op, const Tensor& like, IntList size, std::optional<ScalarType> dtype) {
  int64_t stride[2 + kAxes];  // no op makes tensors of more
  int64_t step = 1;
  for (size_t n = size.size(); n > 0; --n) {
    stride[n - 1] = step;
    step *= std::max<int64_t>(size[n - 1], 1);
  }
  int32_t type = 0;
  int32_t device = 0;
  int32_t device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  if (dtype.has_value()) {
    type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  }
  AtenTensorHandle tensor = nullptr;
  if (aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.data(), stride, type, device,
                               device_index, &tensor) != AOTI_TORCH_SUCCESS) {
    // The stable ABI of 2.11 loses the allocator's own words.
    throw std::runtime_error(std::string(op) + ": out of memory, could not allocate a tensor of " +
                             to_text(size) + " elements");
  }
  return Tensor(tensor);
}

const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

void* Scratch::operator()(int64_t bytes) {
  constexpr int64_t kAlignment = 64;
  if (!like_.is_cuda() && bytes <= kSmall - taken_) {
    void* const block = small_ + taken_;
    taken_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return block;
  }
  blocks_.push_back(allocate(op_, like_, {bytes}, ScalarType::Byte));
  return blocks_.back().mutable_data_ptr();
}

#if defined(LINFUSE_PLAIN_THREADS)
// For ThreadSanitizer, which does not see what orders the threads of torch's pool: always several
// threads, however little there is to do.
ParallelFor torch_parallel_for() {
  return [](int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& body) {
    constexpr int64_t kThreads = 4;
    const int64_t size = (count + kThreads - 1) / kThreads;
    std::vector<std::thread> threads;
    for (int64_t begin = 0; begin < count; begin += size) {
      threads.emplace_back(body, begin, std::min(begin + size, count));
    }
    for (std::thread& thread : threads) thread.join();
  };
}
#else
ParallelFor torch_parallel_for() {
  return [](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    if (count <= 0) return;
    // What goes through the stable ABI of 2.11 loses its words, so that nothing is thrown there.
    std::mutex mutex;
    std::exception_ptr thrown;
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      try {
        body(begin, end);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        thrown = std::current_exception();
      }
    });
    if (thrown != nullptr) std::rethrow_exception(thrown);
  };
}
#endif

#if defined(LINFUSE_WITH_CUDA)
CudaScope::CudaScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

Tensor to_card(const char* op, const Tensor& like, const std::vector<int64_t>& words,
               cudaStream_t stream) {
  constexpr int64_t kFewWords = 2048;  // of some launches, which take about as long as a copy
  const auto count = static_cast<int64_t>(words.size());
  Tensor card = allocate(op, like, {count}, ScalarType::Long);
  auto captures = cudaStreamCaptureStatusNone;
  check_cuda(op, cudaStreamIsCapturing(stream, &captures));
  if (count <= kFewWords || captures != cudaStreamCaptureStatusNone) {
    auto* const to = static_cast<int64_t*>(card.mutable_data_ptr());
    check_cuda(op, launch_upload_cuda(words.data(), count, to, stream));
    return card;
  }
  // copy_ reads the words before it returns, and does not write them.
  const Tensor host = torch::stable::from_blob(
      const_cast<int64_t*>(words.data()), {count}, {1},
      torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Long);
  torch::stable::copy_(card, host);
  return card;
}

void check_cuda(const char* op, cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(error));
  }
}
#endif

}  // namespace linfuse
