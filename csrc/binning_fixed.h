// The rule of binning.h in fixed point, for GPUs: a fused multiply-add that rounds down leaves the position of a value
// among the bins, in fractions of a bin, in the low bits of its result. No conversion between floats and integers is
// needed, which GPUs do at a quarter of their other rates or less.
//
// As the short form of binning.h does, it gives the definition's answer or says that it cannot tell; values outside the
// bins and those that are NaN or infinite are among what it cannot tell.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "binning.h"

namespace lambda_kernels {

LAMBDA_KERNELS_HOST_DEVICE inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

LAMBDA_KERNELS_HOST_DEVICE inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// a · b + c, rounded down once.
LAMBDA_KERNELS_HOST_DEVICE inline float fma_down(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rd(a, b, c);
#else
  const double product = static_cast<double>(a) * b;  // exact
  const double sum = product + c;
  const double c_part = sum - product;
  const double error = (product - (sum - c_part)) + (c - c_part);  // what `sum` was rounded by, exact (Knuth)
  const float nearest = static_cast<float>(sum);
  const bool above = nearest > sum || (nearest == sum && error < 0.0);
  return above ? nextafterf(nearest, -INFINITY) : nearest;
#endif
}

// Positions of all channels are floats in [2^k, 2^(k+1)), 2^k at least the number of bins: the same steps everywhere.
struct FixedPoint {
  int32_t fraction;  // how many bits of a position are below one bin
  uint32_t zero;     // the bits of 2^k, the lower edge of the first bin
  uint32_t limit;    // the bins, in steps; 0: nothing is to be placed by this form
  uint32_t below;    // a mask of those bits
};

inline FixedPoint fixed_point(int32_t bins) {
  int32_t fraction = 23;
  while (int64_t{1} << (23 - fraction) < bins) {
    --fraction;
  }
  return {fraction, static_cast<uint32_t>(127 + 23 - fraction) << 23, static_cast<uint32_t>(bins) << fraction,
          (uint32_t{1} << fraction) - 1};
}

// A channel's grid: the position of a value is value · scale + base, rounded down.
struct FixedGrid {
  float scale, base;  // base NaN: nothing can be told by this form
  uint32_t margin;    // by how many steps positions may be wrong
};

// With bins of width 2^k anchored at 0 positions are exact: so are the product and the base, a whole number.
//
// Else scale and base are rounded, each by at most 2^-24 of its size. That moves the position by 2^-24 of at most
// |offset| + |first| + bins bins, where the offset is how many bins the anchor is from 0, and by half a step and 2^-24
// of |offset| + |first| bins. The margin allows for twice as much, for rounding down, and for the float64 arithmetic of
// the definition and of these lines. So this form is of no use where the range is much narrower than it is far from 0.
LAMBDA_KERNELS_HOST_DEVICE inline FixedGrid fixed_grid(const ChannelGrid& grid, int32_t bins, const FixedPoint& point) {
  const FixedGrid unfit{0.0f, NAN, 0};
  const double first = fabs(grid.first);
  // Written so that NaN and infinity fail.
  if (!(first <= 0x1p23 && nearbyint(first) == first && grid.inv_width >= 0x1p-126 && grid.inv_width <= 0x1p126)) {
    return unfit;
  }
  const float scale = static_cast<float>(grid.inv_width);
  const double base = static_cast<double>(float_of(point.zero)) - grid.first;
  uint64_t width_bits;
  memcpy(&width_bits, &grid.inv_width, sizeof width_bits);
  if (grid.anchor == 0.0 && width_bits << 12 == 0) {
    return {scale, static_cast<float>(base), 0};
  }
  const double steps = static_cast<double>(1 << point.fraction);
  const double step = float_of(static_cast<uint32_t>(127 - point.fraction) << 23);  // 1 / steps
  const double offset = grid.anchor * grid.inv_width;
  const double margin = 4.0 + 0x1p-22 * steps * (fabs(offset) + first + bins + 2.0);
  if (!(margin <= 0.125 * steps)) {
    return unfit;
  }
  const auto whole_margin = static_cast<uint32_t>(margin);
  return {scale, static_cast<float>(base - offset + whole_margin * step), whole_margin};
}

// Whether the form can tell, and the bin if so. What lies within the margin of an edge has a fraction under twice the
// margin, because `base` holds the margin too; `twice_margin` may be that of several grids together.
LAMBDA_KERNELS_HOST_DEVICE inline bool fixed_bin(float value, const FixedGrid& grid, const FixedPoint& point,
                                                 uint32_t twice_margin, uint32_t* bin) {
  const uint32_t bits = bits_of(fma_down(value, grid.scale, grid.base));
  const uint32_t position = bits - point.zero;  // beyond the limit also for what is negative, infinite or NaN
  *bin = position >> point.fraction;
  return position < point.limit && (bits & point.below) >= twice_margin;
}

}  // namespace lambda_kernels
