// The one rule that turns a value into a counter, compiled for the CPU and for the GPU from this text, so that both
// count alike bit for bit.
//
// The definition is in float64, with every operation rounded once: a difference, a product, a floor, a difference. None
// of these pairs can be contracted into a fused multiply-add, whose other rounding would move values at bin edges.
//
// float64 is slow on most GPUs and halves the width of a CPU's vectors, so float32 and narrower values take a short
// form first: on CPUs the one in float32 below, on GPUs that of binning_fixed.h. It gives the definition's answer or
// says that it cannot tell, which happens to values within a few roundings of a bin edge; those are computed again by
// the definition.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define LAMBDA_KERNELS_HOST_DEVICE __host__ __device__
#else
#define LAMBDA_KERNELS_HOST_DEVICE
#endif

namespace lambda_kernels {

// One channel's row of the grid tensor [K, 4] float64.
struct ChannelGrid {
  double anchor;     // where bin 0 begins
  double inv_width;  // bins per unit of value
  double first;      // index, counted from the anchor, of the first bin that has a counter
  double closed_hi;  // values up to here that fall just beyond the last bin belong to it; NaN: the edge is open
};
static_assert(sizeof(ChannelGrid) == 4 * sizeof(double), "a ChannelGrid is a row of the grid tensor in memory");

// Columns of the tensor [K, 5] of counters for what no bin holds; in a table of counters they follow the bins.
enum Outside : int32_t { kUnderflow, kOverflow, kNan, kPositiveInfinity, kNegativeInfinity, kOutsideCount };

constexpr int64_t kMaxBins = 65536;

// The counter of a value that is NaN or infinite, by its kind.
template <typename Float>
LAMBDA_KERNELS_HOST_DEVICE inline int32_t counter_of_non_finite(Float value, int32_t bins) {
  if (value != value) {
    return bins + kNan;
  }
  return bins + (value > 0 ? kPositiveInfinity : kNegativeInfinity);
}

// The definition. The counter of `value`: in [0, bins) a bin, from `bins` on an `Outside`.
LAMBDA_KERNELS_HOST_DEVICE inline int32_t counter_of(double value, const ChannelGrid& grid, int32_t bins) {
  if (value - value != 0.0) {  // NaN − NaN and ∞ − ∞ are NaN; every finite value gives 0
    return counter_of_non_finite(value, bins);
  }
  const double index = floor((value - grid.anchor) * grid.inv_width) - grid.first;
  if (index >= bins) {
    return value <= grid.closed_hi ? bins - 1 : bins + kOverflow;
  }
  // Written so that an index that is NaN, which only a malformed grid can give, is never used as an address.
  return index >= 0.0 ? static_cast<int32_t>(index) : bins + kUnderflow;
}

// What the short form needs of a channel's grid.
struct ShortGrid {
  float origin;      // the anchor, rounded
  float scale;       // inv_width, rounded
  float correction;  // what the rounding of the anchor moves, in bins
  float first;
  float closed_hi;  // NaN also where float32 has no such value, so that none can equal it
  float certain;    // the answer stands if the index lies within this distance of the middle of a bin
};

// The short form of a grid.
//
// Where bins have a width 2^k and are anchored at 0 it is exact: a product with a power of two is, unless it underflows
// to 0, whose sign `short_index` sees to; a floor is; and two float32 integers less than 2^24 apart have an exact
// difference. Else each of four roundings moves the index by at most 2^-24 of its size; the margin below allows for
// six.
inline ShortGrid shorten(const ChannelGrid& grid, int32_t bins) {
  const float scale = static_cast<float>(grid.inv_width);
  const float closed_hi = static_cast<float>(grid.closed_hi);
  ShortGrid result{0.0f, scale, 0.0f, static_cast<float>(grid.first), closed_hi, -1.0f};
  if (static_cast<double>(closed_hi) != grid.closed_hi) {
    result.closed_hi = NAN;
  }
  const double first = fabs(grid.first);
  // Written so that NaN, infinity and a scale that float32 would round to a subnormal number fail.
  const bool in_range = grid.inv_width >= 0x1p-126 && grid.inv_width <= 0x1p126 && floor(first) == first;
  if (!in_range) {
    return result;
  }
  const bool open = grid.closed_hi != grid.closed_hi;
  int exponent;
  if (grid.anchor == 0.0 && first <= 0x1p24 && frexp(grid.inv_width, &exponent) == 0.5 &&
      (open || grid.closed_hi == (grid.first + bins) / grid.inv_width)) {  // without rounding, also next to 0
    result.certain = 0.5f;
    return result;
  }
  result.origin = static_cast<float>(grid.anchor);
  const double correction = (static_cast<double>(result.origin) - grid.anchor) * grid.inv_width;
  const double end = (grid.closed_hi - grid.anchor) * grid.inv_width - grid.first - bins;  // about 0 for a closed edge
  const double margin = 0x1.8p-22 * (first + bins + fabs(correction) + 2.0);
  const bool ordinary = fabs(grid.anchor) <= 0x1p60 && grid.inv_width >= 0x1p-60 && grid.inv_width <= 0x1p60;
  if (ordinary && margin <= 0.125 && (open || fabs(end) <= 0x1p-24)) {
    result.correction = static_cast<float>(correction);
    result.certain = static_cast<float>(0.5 - margin);
  }
  return result;
}

// The short form for a finite value: whether it can tell, and the index counted from `first`, a whole number or
// infinite.
inline bool short_index(float value, const ShortGrid& grid, float* index) {
  const float distance = value - grid.origin;
  const float position = distance * grid.scale + grid.correction;
  float whole = floorf(position);
  if (distance < 0.0f) {  // also where the product underflowed to −0
    whole = fminf(whole, -1.0f);
  }
  *index = whole - grid.first;
  return fabsf(position - whole - 0.5f) <= grid.certain;  // not so where the position is infinite
}

// The counter of a value that float32 holds exactly; equal to the definition's.
inline int32_t counter_of(float value, const ShortGrid& grid, const ChannelGrid& definition, int32_t bins) {
  if (value - value != 0.0f) {
    return counter_of_non_finite(value, bins);
  }
  float index;
  if (!short_index(value, grid, &index)) {
    return counter_of(static_cast<double>(value), definition, bins);
  }
  if (index >= static_cast<float>(bins)) {
    return value <= grid.closed_hi ? bins - 1 : bins + kOverflow;
  }
  return index >= 0.0f ? static_cast<int32_t>(index) : bins + kUnderflow;
}

// The exact histogram of bfloat16: a counter for every value with a magnitude in [2^-24, 2^16), in order of sign and
// magnitude. The first counter of either sign also holds all smaller magnitudes; −0 counts as 0.
constexpr int32_t kCodeMantissas = 128;
constexpr int32_t kCodeExponents = 40;
constexpr int32_t kCodesPerSign = kCodeExponents * kCodeMantissas;
constexpr int32_t kCodes = 2 * kCodesPerSign;
constexpr int32_t kFirstCode = (127 - 24) * kCodeMantissas;  // the bits of 2^-24

// The counter of a bfloat16 by its bits: in [0, kCodes) a code, from there on an `Outside`.
LAMBDA_KERNELS_HOST_DEVICE inline int32_t counter_of_code(uint16_t bits) {
  const int32_t magnitude = bits & 0x7fff;
  const bool negative = bits > 0x8000;
  if (magnitude >= 0x7f80) {
    return kCodes + (magnitude > 0x7f80 ? kNan : negative ? kNegativeInfinity : kPositiveInfinity);
  }
  const int32_t code = magnitude - kFirstCode;
  if (code >= kCodesPerSign) {
    return kCodes + (negative ? kUnderflow : kOverflow);
  }
  return (code > 0 ? code : 0) + (negative ? kCodesPerSign : 0);
}

}  // namespace lambda_kernels
