// What the CPU and the CUDA half of the histogram share: the checks of the arguments and the shapes of the results.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include "binning.h"

namespace lambda_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A [N, C] tensor in memory; strides in elements.
template <typename scalar_t>
struct Matrix {
  const scalar_t* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
};

template <typename scalar_t>
Matrix<scalar_t> matrix_of(const Tensor& x) {
  return {static_cast<const scalar_t*>(x.data_ptr()), x.size(0), x.size(1), x.stride(0), x.stride(1)};
}

template <typename scalar_t>
LAMBDA_KERNELS_HOST_DEVICE inline double to_double(scalar_t value) {
  return static_cast<double>(static_cast<float>(value));
}
template <>
LAMBDA_KERNELS_HOST_DEVICE inline double to_double(double value) {
  return value;
}

inline std::string device_name(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : "device " + std::to_string(tensor.get_device_index());
}

inline void check_histogram_arguments(const Tensor& x, const Tensor& grid, int64_t bins) {
  STD_TORCH_CHECK(x.dim() == 2, "histogram: x must have 2 dimensions [N, C], got ", x.dim());
  STD_TORCH_CHECK(bins >= 1 && bins <= kMaxBins, "histogram: bins must be in [1, ", kMaxBins, "], got ", bins);
  STD_TORCH_CHECK(grid.dim() == 2 && grid.size(0) == x.size(1) && grid.size(1) == 4,
                  "histogram: grid must have shape [C, 4] with C = ", x.size(1), " like x, got ", grid.dim(),
                  " dimensions and ", grid.numel(), " elements");
  STD_TORCH_CHECK(grid.scalar_type() == ScalarType::Double, "histogram: grid must have dtype Double, got ",
                  grid.scalar_type());
  STD_TORCH_CHECK(grid.is_contiguous(), "histogram: grid must be contiguous, got strides ", grid.stride(0), ", ",
                  grid.stride(1));
  STD_TORCH_CHECK(x.is_cpu() == grid.is_cpu() && x.get_device_index() == grid.get_device_index(),
                  "histogram: x and grid must be on one device, got x on ", device_name(x), " and grid on ",
                  device_name(grid));
}

// Calls `body` with a null pointer to the element type of x.
template <typename Body>
void with_scalar_type(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return body(static_cast<const float*>(nullptr));
    case ScalarType::Half:
      return body(static_cast<const torch::headeronly::Half*>(nullptr));
    case ScalarType::BFloat16:
      return body(static_cast<const torch::headeronly::BFloat16*>(nullptr));
    case ScalarType::Double:
      return body(static_cast<const double*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "histogram: x must have dtype Float, Half, BFloat16 or Double, got ", x.scalar_type());
  }
}

// Zeroed counters on the device of x: counts [C, bins] and outside [C, 5], int64.
inline std::tuple<Tensor, Tensor> new_counters(const Tensor& x, int64_t bins) {
  return {torch::stable::new_zeros(x, {x.size(1), bins}, ScalarType::Long),
          torch::stable::new_zeros(x, {x.size(1), static_cast<int64_t>(kOutsideCount)}, ScalarType::Long)};
}

}  // namespace lambda_kernels
