#include "common.h"

#include <stdexcept>

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
                const Tensor& like, const IntList& size) {
  if (tensor.scalar_type() != like.scalar_type()) {
    reject(op, std::string("`") + name + "` must have the dtype of `" + like_name + "`");
  }
  if (tensor.device() != like.device()) {
    reject(op, std::string("`") + name + "` must be on the device of `" + like_name + "`");
  }
  if (size_of(tensor) != size) {
    reject(op, std::string("`") + name + "` must have shape " + to_text(size) + ", got " +
                   to_text(size_of(tensor)));
  }
}

IntList size_of(const Tensor& tensor) {
  IntList size(static_cast<size_t>(tensor.dim()));
  for (size_t n = 0; n < size.size(); ++n) size[n] = tensor.size(static_cast<int64_t>(n));
  return size;
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

Tensor allocate(const char* op, const Tensor& like, const IntList& size,
                std::optional<torch::headeronly::ScalarType> dtype) {
  try {
    return torch::stable::new_empty(like, size, dtype);
  } catch (const std::exception&) {
    // The stable ABI of 2.11 loses the allocator's own words.
    throw std::runtime_error(std::string(op) + ": out of memory, could not allocate a tensor of " +
                             to_text(size) + " elements");
  }
}

const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

ParallelFor torch_parallel_for() {
  return [](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    if (count > 0) torch::stable::parallel_for(0, count, grain, body);
  };
}

#if defined(LINFUSE_WITH_CUDA)
CudaScope::CudaScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

Tensor to_card(const char* op, const Tensor& like, const std::vector<int64_t>& words) {
  const auto count = static_cast<int64_t>(words.size());
  // copy_ reads the words before it returns, and does not write them.
  const Tensor host = torch::stable::from_blob(
      const_cast<int64_t*>(words.data()), {count}, {1},
      torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Long);
  Tensor card = allocate(op, like, {count}, ScalarType::Long);
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
