// Keeping the digits of the sums that the lanes take around a shift.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu_lanes.h"

namespace lambda_kernels {

constexpr int64_t kSumRows = 4096;            // after at most so many the sums go on around a better shift
constexpr int64_t kFirstSumRows = 64;         // the first values may be outliers, and a bad shift
constexpr int64_t kFoldRows = 256;            // after so many the sums go on from 0: a large one rounds off more

// Of the finite ones of some values; 0 if there is none. Equal values have it exactly, however large they are.
class Mean {
 public:
  void add(double value) {
    if (value - value == 0.0) {
      first_ = empty() ? value : first_;
      sum_ += value - first_;
      count_ += 1.0;
    }
  }
  bool empty() const { return count_ == 0.0; }
  double value() const { return empty() ? 0.0 : first_ + sum_ / count_; }

 private:
  double first_ = 0.0, sum_ = 0.0, count_ = 0.0;
};

inline void restart(LaneSums& sums, int32_t lane, double shift) {
  sums.shift[lane] = shift;
  sums.sum[lane] = sums.square[lane] = sums.folded_sum[lane] = sums.folded_square[lane] = 0.0;
  sums.minimum[lane] = INFINITY;
  sums.maximum[lane] = -INFINITY;
}

// Values are often multiples of some power of two, and then their squares may all round the same way, so that the error
// of a sum grows with the number of its terms. So no sum has many, and the sums are added up.
inline void fold(std::vector<LaneSums>& all) {
  for (LaneSums& sums : all) {
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      sums.folded_sum[lane] += sums.sum[lane];
      sums.folded_square[lane] += sums.square[lane];
      sums.sum[lane] = sums.square[lane] = 0.0;
    }
  }
}

}  // namespace lambda_kernels
