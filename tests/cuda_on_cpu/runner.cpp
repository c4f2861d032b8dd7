// The launchers in plain C, for ctypes. kernels.py mirrors these declarations.
//
// Every function returns null, or what went wrong. Inputs and outputs are copied to and from memory
// of their own, where it shows if a kernel goes beyond their ends. Inputs may be views, aligned to
// their elements; outputs are fresh, and aligned to 16 bytes at least.
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../geometry/make_geometry.h"
#include "conv_to_affine.h"
#include "conv_to_affine_backward.h"
#include "conv_to_csr.h"
#include "conv_to_csr_backward.h"
#include "dtype.h"
#include "fuse_conv_linear.h"
#include "planted/planted.h"
#include "shim/grid.h"
#include "shim/memory.h"
#include "upload.h"

using cuda_on_cpu::Memory;

extern "C" struct Problem {
  int64_t axes;
  const int64_t* weight_size;  // [axes + 2]
  const int64_t* input_size;
  const int64_t* stride;
  const int64_t* padding;  // [2 * axes], (low, high) pairs
  const int64_t* dilation;
  int64_t groups;
  int64_t transposed;
  const int64_t* output_padding;
  const char* padding_mode;
  int64_t row_start;
  int64_t row_stop;
  int64_t dtype;  // as enum DType counts
};

namespace {

constexpr size_t kOutputAlignment = 16;

linfuse::Geometry geometry_of(const Problem& problem) {
  const auto list = [](const int64_t* values, int64_t count) {
    return linfuse::Numbers(values, static_cast<size_t>(count));
  };
  const int64_t axes = problem.axes;
  return linfuse::make_geometry(
      "cuda_on_cpu", {list(problem.weight_size, axes + 2), list(problem.input_size, axes),
                      list(problem.stride, axes), list(problem.padding, 2 * axes),
                      list(problem.dilation, axes), problem.groups, problem.transposed != 0,
                      list(problem.output_padding, axes), problem.padding_mode});
}

size_t product(const int64_t* values, int64_t count) {
  int64_t result = 1;
  for (int64_t n = 0; n < count; ++n) result *= values[n];
  return static_cast<size_t>(result);
}

cudaError_t upload(const std::vector<int64_t>& words, Memory& on_card) {
  return linfuse::launch_upload_cuda(words.data(), static_cast<int64_t>(words.size()),
                                     static_cast<int64_t*>(on_card.data()), nullptr);
}

const std::map<std::string, cudaError_t (*)(const float*, float*, int)> kPlanted = {
    {"out_of_bounds", launch_out_of_bounds},
    {"out_of_bounds_shared", launch_out_of_bounds_shared},
    {"missing_barrier", launch_missing_barrier},
    {"divergent_barrier", launch_divergent_barrier},
    {"no_fault", launch_no_fault},
};

// Memory of the card for one call, as torch's allocator gives it.
class Scratch {
 public:
  void* operator()(int64_t bytes) {
    blocks_.push_back(std::make_unique<Memory>("scratch", static_cast<size_t>(bytes), 512));
    return blocks_.back()->data();
  }

 private:
  std::vector<std::unique_ptr<Memory>> blocks_;
};

using Way = cudaError_t (*)(const linfuse::FuseConvLinearParams&, const linfuse::Allocate&);
const std::map<std::string, Way> kWays = {
    {"auto",
     [](const auto& params, const auto& allocate) {
       return linfuse::launch_fuse_conv_linear_cuda(params, nullptr, allocate);
     }},
    {"packed",
     [](const auto& params, const auto& allocate) {
       return linfuse::launch_fuse_conv_linear_by_packed_cuda(params, nullptr, allocate);
     }},
    {"packed_in_chunks",
     [](const auto& params, const auto& allocate) {
       const int64_t line = 64 * params.geometry.groups * params.geometry.out_positions();
       return linfuse::launch_fuse_conv_linear_by_packed_cuda(params, nullptr, allocate, 3 * line);
     }},
    {"element",
     [](const auto& params, const auto&) {
       return linfuse::launch_fuse_conv_linear_by_element_cuda(params, nullptr);
     }},
    {"tile",
     [](const auto& params, const auto&) {
       return linfuse::launch_fuse_conv_linear_by_tile_cuda(params, nullptr);
     }},
    {"large_tile",
     [](const auto& params, const auto&) {
       return linfuse::launch_fuse_conv_linear_by_tile_cuda(params, nullptr,
                                                            linfuse::TileSize::kLarge);
     }},
};

// The launcher's error as text, which stays until the next call.
const char* text_of(const std::function<cudaError_t()>& run) {
  static std::string text;
  try {
    const cudaError_t error = run();
    if (error == cudaSuccess) return nullptr;
    text = cudaGetErrorString(error);
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}

}  // namespace

extern "C" {

void set_schedule(int order, uint64_t seed, unsigned most_blocks, int without_barrier,
                  int capability, int shared_bytes) {
  cuda_on_cpu::set_schedule({static_cast<cuda_on_cpu::Order>(order), seed, most_blocks,
                             without_barrier, capability, shared_bytes});
}

// weight as the problem says, bias [C_out] or null  ->  matrix [rows, cols], offset [rows]
const char* conv_to_affine(const Problem* problem, const void* weight, const void* bias,
                           void* matrix, void* offset) {
  return text_of([&] {
    linfuse::ConvToAffineParams params;
    params.geometry = geometry_of(*problem);
    params.row_start = problem->row_start;
    params.row_stop = problem->row_stop;
    params.dtype = static_cast<linfuse::DType>(problem->dtype);

    const auto bytes = static_cast<size_t>(linfuse::element_size(params.dtype));
    const auto rows = static_cast<size_t>(params.row_stop - params.row_start);
    const auto cols = static_cast<size_t>(params.geometry.cols());
    const auto channels = static_cast<size_t>(params.geometry.out_channels);
    const size_t elements = product(problem->weight_size, problem->axes + 2);
    Memory weight_copy("weight", bytes * elements, bytes, weight);
    Memory bias_copy("bias", bytes * channels, bytes, bias);
    Memory matrix_made("matrix", bytes * rows * cols, kOutputAlignment);
    Memory offset_made("offset", bytes * rows, kOutputAlignment);
    params.weight = weight_copy.data();
    params.bias = bias == nullptr ? nullptr : bias_copy.data();
    params.matrix = matrix_made.data();
    params.offset = offset_made.data();
    const cudaError_t error = linfuse::launch_conv_to_affine_cuda(params, nullptr);
    matrix_made.copy_to(matrix);
    offset_made.copy_to(offset);
    return error;
  });
}

// grad_matrix [rows, cols]  ->  grad_weight as the problem says
const char* conv_to_affine_backward(const Problem* problem, const void* grad_matrix,
                                    void* grad_weight) {
  return text_of([&] {
    linfuse::ConvToAffineBackwardParams params;
    params.geometry = geometry_of(*problem);
    params.row_start = problem->row_start;
    params.row_stop = problem->row_stop;
    params.dtype = static_cast<linfuse::DType>(problem->dtype);

    const auto bytes = static_cast<size_t>(linfuse::element_size(params.dtype));
    const auto rows = static_cast<size_t>(params.row_stop - params.row_start);
    const auto cols = static_cast<size_t>(params.geometry.cols());
    const size_t elements = product(problem->weight_size, problem->axes + 2);
    Memory grad_matrix_copy("grad_matrix", bytes * rows * cols, bytes, grad_matrix);
    Memory grad_weight_made("grad_weight", bytes * elements, kOutputAlignment);
    params.grad_matrix = grad_matrix_copy.data();
    params.grad_weight = grad_weight_made.data();
    const cudaError_t error = linfuse::launch_conv_to_affine_backward_cuda(params, nullptr);
    grad_weight_made.copy_to(grad_weight);
    return error;
  });
}

// weight as the problem says  ->  values [stored], columns [stored], row_pointers [rows + 1]
const char* conv_to_csr(const Problem* problem, int64_t index32, const void* weight, void* values,
                        void* columns, void* row_pointers) {
  return text_of([&] {
    linfuse::ConvToCsrParams params;
    params.geometry = geometry_of(*problem);
    params.row_start = problem->row_start;
    params.row_stop = problem->row_stop;
    params.dtype = static_cast<linfuse::DType>(problem->dtype);
    params.index32 = index32 != 0;

    const linfuse::RowTables tables(params.geometry, params.row_start, params.row_stop);
    params.stored =
        tables.view().stored.between(params.geometry, params.row_start, params.row_stop);
    const auto bytes = static_cast<size_t>(linfuse::element_size(params.dtype));
    const size_t index_bytes = params.index32 ? sizeof(int32_t) : sizeof(int64_t);
    const auto stored = static_cast<size_t>(params.stored);
    const auto rows = static_cast<size_t>(params.row_stop - params.row_start);
    const std::vector<int64_t> words = tables.pack();
    Memory on_card("words", sizeof(int64_t) * words.size(), kOutputAlignment);
    Memory weight_copy("weight", bytes * product(problem->weight_size, problem->axes + 2), bytes,
                       weight);
    Memory values_made("values", bytes * stored, kOutputAlignment);
    Memory columns_made("columns", index_bytes * stored, kOutputAlignment);
    Memory row_pointers_made("row_pointers", index_bytes * (rows + 1), kOutputAlignment);
    params.taps = tables.view(static_cast<const int64_t*>(on_card.data()));
    params.weight = weight_copy.data();
    params.values = values_made.data();
    params.columns = columns_made.data();
    params.row_pointers = row_pointers_made.data();
    cudaError_t error = upload(words, on_card);
    if (error == cudaSuccess) error = linfuse::launch_conv_to_csr_cuda(params, nullptr);
    values_made.copy_to(values);
    columns_made.copy_to(columns);
    row_pointers_made.copy_to(row_pointers);
    return error;
  });
}

// grad_values [stored]  ->  grad_weight as the problem says
const char* conv_to_csr_backward(const Problem* problem, const void* grad_values,
                                 void* grad_weight) {
  return text_of([&] {
    linfuse::ConvToCsrBackwardParams params;
    params.geometry = geometry_of(*problem);
    params.row_start = problem->row_start;
    params.row_stop = problem->row_stop;
    params.dtype = static_cast<linfuse::DType>(problem->dtype);

    if (params.row_start == params.row_stop) params.row_start = params.row_stop = 0;  // is held
    const linfuse::KernelTables tables(params.geometry, params.row_start, params.row_stop);
    const auto bytes = static_cast<size_t>(linfuse::element_size(params.dtype));
    const auto stored = static_cast<size_t>(
        tables.view().stored.between(params.geometry, params.row_start, params.row_stop));
    const std::vector<int64_t> words = tables.pack();
    Memory on_card("words", sizeof(int64_t) * words.size(), kOutputAlignment);
    Memory grad_values_copy("grad_values", bytes * stored, bytes, grad_values);
    Memory grad_weight_made("grad_weight", bytes * product(problem->weight_size, problem->axes + 2),
                            kOutputAlignment);
    params.taps = tables.view(static_cast<const int64_t*>(on_card.data()));
    params.grad_values = grad_values_copy.data();
    params.grad_weight = grad_weight_made.data();
    cudaError_t error = upload(words, on_card);
    if (error == cudaSuccess) error = linfuse::launch_conv_to_csr_backward_cuda(params, nullptr);
    grad_weight_made.copy_to(grad_weight);
    return error;
  });
}

// conv_weight as the problem says, conv_bias [C_out] or null, linear_weight [features, rows],
// linear_bias [features] or null  ->  weight [features, cols], bias [features]. `way` is one of
// kWays; "element" and the tiles leave the bias alone.
const char* fuse_conv_linear(const Problem* problem, const char* way, int64_t features,
                             const void* conv_weight, const void* conv_bias,
                             const void* linear_weight, const void* linear_bias, void* weight,
                             void* bias) {
  return text_of([&] {
    linfuse::FuseConvLinearParams params;
    params.geometry = geometry_of(*problem);
    params.features = features;
    params.dtype = static_cast<linfuse::DType>(problem->dtype);

    const auto bytes = static_cast<size_t>(linfuse::element_size(params.dtype));
    const auto rows = static_cast<size_t>(params.geometry.rows());
    const auto cols = static_cast<size_t>(params.geometry.cols());
    const auto count = static_cast<size_t>(features);
    const auto channels = static_cast<size_t>(params.geometry.out_channels);
    Memory conv_weight_copy("conv_weight", bytes * product(problem->weight_size, problem->axes + 2),
                            bytes, conv_weight);
    Memory conv_bias_copy("conv_bias", bytes * channels, bytes, conv_bias);
    Memory linear_weight_copy("linear_weight", bytes * count * rows, bytes, linear_weight);
    Memory linear_bias_copy("linear_bias", bytes * count, bytes, linear_bias);
    Memory weight_made("weight", bytes * count * cols, kOutputAlignment);
    Memory bias_made("bias", bytes * count, kOutputAlignment);
    params.conv_weight = conv_weight_copy.data();
    params.conv_bias = conv_bias == nullptr ? nullptr : conv_bias_copy.data();
    params.linear_weight = linear_weight_copy.data();
    params.linear_stride.row = static_cast<int64_t>(rows);
    params.linear_stride.position = 1;
    params.linear_bias = linear_bias == nullptr ? nullptr : linear_bias_copy.data();
    params.weight = weight_made.data();
    params.bias = bias_made.data();
    Scratch scratch;
    const cudaError_t error = kWays.at(way)(params, std::ref(scratch));
    weight_made.copy_to(weight);
    bias_made.copy_to(bias);
    return error;
  });
}

// One of the faulty kernels on `count` floats: in [count]  ->  out [count]
const char* planted(const char* name, int64_t count, const float* in, float* out) {
  return text_of([&] {
    const size_t bytes = sizeof(float) * static_cast<size_t>(count);
    Memory in_copy("in", bytes, sizeof(float), in);
    Memory out_made("out", bytes, kOutputAlignment);
    const cudaError_t error =
        kPlanted.at(name)(static_cast<const float*>(in_copy.data()),
                          static_cast<float*>(out_made.data()), static_cast<int>(count));
    out_made.copy_to(out);
    return error;
  });
}

void widen(int dtype, const uint16_t* narrow, float* wide, int64_t count) {
  const bool is_half = static_cast<linfuse::DType>(dtype) == linfuse::DType::kFloat16;
  for (int64_t n = 0; n < count; ++n) {
    linfuse::Float16 half;
    linfuse::BFloat16 bfloat;
    half.bits = bfloat.bits = narrow[n];
    wide[n] = is_half ? static_cast<float>(half) : static_cast<float>(bfloat);
  }
}

void narrow(int dtype, const float* wide, uint16_t* narrow, int64_t count) {
  const bool is_half = static_cast<linfuse::DType>(dtype) == linfuse::DType::kFloat16;
  for (int64_t n = 0; n < count; ++n) {
    narrow[n] = is_half ? linfuse::Float16(wide[n]).bits : linfuse::BFloat16(wide[n]).bits;
  }
}

}  // extern "C"
