// The one rule that turns a value into a counter, compiled for the CPU and for the GPU from this text, so that both
// count alike bit for bit. Every operation is rounded once in float64: a difference, a product, a floor, a difference.
// None of these pairs can be contracted into a fused multiply-add, whose other rounding would move values at bin edges.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define LAMBDA_KERNELS_HOST_DEVICE __host__ __device__
#else
#define LAMBDA_KERNELS_HOST_DEVICE
#endif

namespace lambda_kernels {

// One channel's row of the grid tensor [C, 4] float64.
struct ChannelGrid {
  double anchor;     // where bin 0 begins
  double inv_width;  // bins per unit of value
  double first;      // index, counted from the anchor, of the first bin that has a counter
  double closed_hi;  // values up to here that fall just beyond the last bin belong to it; NaN: the edge is open
};
static_assert(sizeof(ChannelGrid) == 4 * sizeof(double), "a ChannelGrid is a row of the grid tensor in memory");

// Columns of the tensor [C, 5] of counters for what no bin holds; in a table of counters they follow the bins.
enum Outside : int32_t { kUnderflow, kOverflow, kNan, kPositiveInfinity, kNegativeInfinity, kOutsideCount };

constexpr int64_t kMaxBins = 65536;

// The counter of `value`: in [0, bins) a bin, from `bins` on an `Outside`.
LAMBDA_KERNELS_HOST_DEVICE inline int32_t counter_of(double value, const ChannelGrid& grid, int32_t bins) {
  if (value - value != 0.0) {  // NaN − NaN and ∞ − ∞ are NaN; every finite value gives 0
    if (value != value) {
      return bins + kNan;
    }
    return bins + (value > 0.0 ? kPositiveInfinity : kNegativeInfinity);
  }
  const double index = floor((value - grid.anchor) * grid.inv_width) - grid.first;
  if (index >= bins) {
    return value <= grid.closed_hi ? bins - 1 : bins + kOverflow;
  }
  // Written so that an index that is NaN, which only a malformed grid can give, is never used as an address.
  return index >= 0.0 ? static_cast<int32_t>(index) : bins + kUnderflow;
}

}  // namespace lambda_kernels
