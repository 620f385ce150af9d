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

// A row of the tensor [K, 5] float64: the finite values' number, mean, M2 = Σ (x − mean)², smallest and largest; these
// two are NaN where there is none.
struct Moments {
  double count = 0.0;
  double mean = 0.0;
  double m2 = 0.0;
  double minimum = NAN;
  double maximum = NAN;
};
static_assert(sizeof(Moments) == 5 * sizeof(double), "Moments is a row of the moments tensor in memory");

// The moments of `count` values, from their sums Σ (x − shift) and Σ (x − shift)². Loses few digits where the shift is
// one of the values, or near their mean.
LAMBDA_KERNELS_HOST_DEVICE inline Moments moments_of(double count, double shift, double sum, double square,
                                                     double minimum, double maximum) {
  Moments result;
  if (count > 0.0) {
    const double mean = sum / count;
    const double m2 = square - sum * mean;
    result.count = count;
    result.mean = shift + mean;
    result.m2 = m2 > 0.0 ? m2 : 0.0;
    result.minimum = minimum;
    result.maximum = maximum;
  }
  return result;
}

// Adds `other` to `total` (Chan, Golub, LeVeque 1979, equation 2.1b in its form for unequal parts).
LAMBDA_KERNELS_HOST_DEVICE inline void merge(Moments& total, const Moments& other) {
  if (other.count == 0.0) {
    return;
  }
  if (total.count == 0.0) {
    total = other;
    return;
  }
  const double count = total.count + other.count;
  const double difference = other.mean - total.mean;
  const double part = other.count / count;
  total.mean += difference * part;
  total.m2 += other.m2 + difference * difference * (total.count * part);
  total.count = count;
  total.minimum = other.minimum < total.minimum ? other.minimum : total.minimum;
  total.maximum = other.maximum > total.maximum ? other.maximum : total.maximum;
}

}  // namespace lambda_kernels
