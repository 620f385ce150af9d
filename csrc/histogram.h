// What the CPU and the CUDA half of the histogram share: the checks of the arguments and the shapes of the results.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "problem.h"

namespace lambda_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The arguments of the operator, checked, and its results, allocated.
struct Call {
  std::vector<Source> sources;  // those that hold values
  ScalarType dtype;
  Per per;
  int32_t bins;             // 0: no histogram, only what is outside and the moments
  const ChannelGrid* grid;  // [K]; null: bfloat16 codes, or bins is 0
  const bool* only;         // [K]: the rows to be counted, the others stay 0; null: all
  int64_t targets;          // K
  int64_t* counts;          // [K, bins], zeros
  int64_t* outside;         // [K, 5], zeros
  Moments* moments;         // [K], every row to be written; null: not wanted
  std::tuple<Tensor, Tensor, Tensor> results;
};

// Checks the arguments and allocates counts int64 [K, bins], outside int64 [K, 5] and moments float64 [K, 7], without
// statistics [0, 7].
Call prepare(const std::vector<Tensor>& x, const std::optional<Tensor>& grid, int64_t bins, int64_t per,
             bool statistics, const std::optional<Tensor>& only);

}  // namespace lambda_kernels
