// What is counted, and the statistics that come from the same read; without anything of PyTorch.
#pragma once

#include <cmath>
#include <cstdint>

#include "binning.h"

namespace lambda_kernels {

// Which values share a row of the results.
enum Per : int64_t { kPerChannel, kPerLayer, kPerSample, kPerCount };

// A tensor [outer, rows, columns] in memory; strides in elements.
struct Source {
  const void* data;
  int64_t outer, rows, columns;
  int64_t outer_stride, row_stride, column_stride;
  int64_t target;  // its first row of the results

  LAMBDA_KERNELS_HOST_DEVICE int64_t targets(Per per) const {
    return per == kPerChannel ? columns : per == kPerSample ? outer : 1;
  }
  LAMBDA_KERNELS_HOST_DEVICE int64_t values_per_target(Per per) const {
    return per == kPerChannel ? outer * rows : per == kPerSample ? rows * columns : outer * rows * columns;
  }
};

// Columns of the moments tensor.
constexpr int64_t kMomentsColumns = 7;

// A row of the tensor [K, 7] float64: the finite values' number, mean and M2 = Σ (x − mean)², what float64 rounds off
// these two, smallest and largest; the last two are NaN where there is no value.
//
// A mean of 53 bits is wrong in proportion to itself, and so is the distance to the mean of a part that is merged,
// which enters M2. With some 106 bits what is lost is in proportion to the spread, however large the mean; and M2 loses
// nothing that grows with the number of parts.
struct Moments {
  double count = 0.0;
  double mean = 0.0;
  double m2 = 0.0;
  double mean_low = 0.0;  // at most half a unit in the last place of the mean
  double m2_low = 0.0;
  double minimum = NAN;
  double maximum = NAN;
};
static_assert(sizeof(Moments) == kMomentsColumns * sizeof(double), "Moments is a row of the moments tensor in memory");

// Adds to the number high + low: the sum, and its rounding error, which is known exactly (Knuth's TwoSum) and joins the
// low part. These are additions alone, which a compiler may not reorder without -ffast-math. Where it fuses the product
// that `by` comes from with one of them, `by` is rounded once less, which does no harm.
LAMBDA_KERNELS_HOST_DEVICE inline void add_to(double& high, double& low, double by) {
  const double sum = high + by;
  if (!(fabs(sum) < INFINITY)) {
    high = sum;
    low = 0.0;
    return;
  }
  const double added = sum - high;
  const double rest = (high - (sum - added)) + (by - added) + low;
  high = sum + rest;
  low = rest - (high - sum);
}

// The moments of `count` values, from their sums Σ (x − shift) and Σ (x − shift)². Loses few digits where the shift is
// one of the values, or near their mean. M2 is infinite where a square overflows: inf − inf must not look like a spread
// of 0.
LAMBDA_KERNELS_HOST_DEVICE inline Moments moments_of(double count, double shift, double sum, double square,
                                                     double minimum, double maximum) {
  Moments result;
  if (count > 0.0) {
    const double mean = sum / count;
    const double m2 = square - sum * mean;
    result.count = count;
    result.mean = shift;
    add_to(result.mean, result.mean_low, mean);
    result.m2 = !(square < INFINITY) ? INFINITY : m2 > 0.0 ? m2 : 0.0;
    result.minimum = minimum;
    result.maximum = maximum;
  }
  return result;
}

// Adds `other` to `total` (Chan, Golub, LeVeque 1979, equation 2.1b in its form for unequal parts). The mean takes a
// step from that of the larger part; the step is rounded in proportion to itself, so that a plain product will do.
LAMBDA_KERNELS_HOST_DEVICE inline void merge(Moments& total, const Moments& other) {
  if (other.count == 0.0) {
    return;
  }
  if (total.count == 0.0) {
    total = other;
    return;
  }
  const double count = total.count + other.count;
  const double difference = (other.mean - total.mean) + (other.mean_low - total.mean_low);
  const double part = other.count / count;
  total.m2_low += other.m2_low;
  add_to(total.m2, total.m2_low, other.m2 + difference * (difference * (total.count * part)));
  if (other.count > total.count) {
    const double rest = total.count / count;
    total.mean = other.mean;
    total.mean_low = other.mean_low;
    add_to(total.mean, total.mean_low, -difference * rest);
  } else {
    add_to(total.mean, total.mean_low, difference * part);
  }
  total.count = count;
  total.minimum = other.minimum < total.minimum ? other.minimum : total.minimum;
  total.maximum = other.maximum > total.maximum ? other.maximum : total.maximum;
}

}  // namespace lambda_kernels
