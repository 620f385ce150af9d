// Counting value by value: for more bins than the lanes' tables take, for bfloat16 codes, and for so few values that
// clearing a table would take longer than counting them.
#pragma once

#include <algorithm>
#include <cmath>
#include <mutex>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu_walk.h"
#include "histogram.h"

namespace lambda_kernels {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

inline double to_double(double value) {
  return value;
}
template <typename Narrow>
double to_double(Narrow value) {
  return static_cast<double>(static_cast<float>(value));
}

// A part of a source: of `targets` targets from `target` on, the rows (columns side by side) or values [begin, end).
struct CpuTask {
  const Source* source;
  int64_t target, targets;  // within the source
  int64_t begin, end;
  int64_t part;     // which of the parts of these targets
  bool only_part;   // so that no other task adds to these results
};

// Value by value: into the results, or first into a table.
class ScalarCounter {
 public:
  // `lock` is that of the results.
  ScalarCounter(const Call& call, const CpuTask& task, std::mutex& lock)
      : call_(call), task_(task), lock_(lock), bins_(call.bins) {
    const int64_t first = task.source->target + task.target;
    const int64_t counters = bins_ + kOutsideCount;
    counts_ = call.counts + first * bins_;
    outside_ = call.outside + first * kOutsideCount;
    if (!task.only_part && task.end - task.begin >= counters) {
      own_.resize(task.targets * counters);
      counts_ = own_.data();
      outside_ = own_.data() + task.targets * bins_;
    } else if (!task.only_part) {
      guard_ = std::unique_lock<std::mutex>(lock);
    }
    grids_ = call.grid == nullptr ? nullptr : call.grid + first;
    only_ = call.only == nullptr ? nullptr : call.only + first;
    for (int64_t index = 0; index < task.targets && grids_ != nullptr; ++index) {
      short_grids_.push_back(shorten(grids_[index], bins_));
    }
    sums_.resize(call.moments == nullptr ? 0 : task.targets);
  }

  template <typename Element>
  void take(int64_t index, Element value) {
    if (only_ != nullptr && !only_[index]) {
      return;
    }
    const double wide = to_double(value);
    const bool finite = wide - wide == 0.0;
    if (bins_ > 0 || !finite) {
      const int32_t counter = counter_for(index, value, wide);
      ++(counter < bins_ ? counts_[index * bins_ + counter] : outside_[index * kOutsideCount + counter - bins_]);
    }
    if (finite && !sums_.empty()) {
      Sums& sums = sums_[index];
      if (sums.count == sums.most) {  // nothing yet, or enough for a better shift
        merge(sums.collected, sums.moments());
        const double shift = sums.collected.count > 0.0 ? sums.collected.mean : wide;
        sums = {sums.collected, shift, 0.0, 0.0, wide, wide, 0.0, std::clamp(8.0 * sums.most, 64.0, 512.0)};
      }
      const double distance = wide - sums.shift;
      sums.sum += distance;
      sums.square += distance * distance;
      sums.minimum = std::min(sums.minimum, wide);
      sums.maximum = std::max(sums.maximum, wide);
      sums.count += 1.0;
    }
  }

  // All values of the first target, by way of how often each of the 2^16 bfloat16 occurs.
  void take_codes(const Runs& runs) {
    std::vector<int64_t> occurrences(1 << 16);
    for_pieces<BFloat16>(runs, task_.begin, task_.end, [&](const BFloat16* values, int64_t stride, int64_t length) {
      for (int64_t i = 0; i < length; ++i) {
        ++occurrences[values[i * stride].x];
      }
    });
    double count = 0.0, sum = 0.0;
    for_codes(occurrences, [&](uint16_t bits, double value, double times) {
      const int32_t counter = counter_of_code(bits);
      (counter < bins_ ? counts_[counter] : outside_[counter - bins_]) += occurrences[bits];
      if (value - value == 0.0) {
        count += times;
        sum += times * value;
      }
    });
    if (sums_.empty() || count == 0.0) {
      return;
    }
    const double mean = sum / count;
    Sums sums{};
    sums.shift = mean;
    sums.count = count;
    sums.minimum = INFINITY;
    sums.maximum = -INFINITY;
    for_codes(occurrences, [&](uint16_t, double value, double times) {
      if (value - value == 0.0) {
        sums.sum += times * (value - mean);
        sums.square += times * (value - mean) * (value - mean);
        sums.minimum = std::min(sums.minimum, value);
        sums.maximum = std::max(sums.maximum, value);
      }
    });
    sums_[0] = sums;
  }

  Moments moments(int64_t index) const {
    Moments result;
    if (!sums_.empty()) {
      result = sums_[index].collected;
      merge(result, sums_[index].moments());
    }
    return result;
  }

  void collect() {
    if (!own_.empty()) {
      const std::lock_guard<std::mutex> guard(lock_);
      const int64_t first = task_.source->target + task_.target;
      for (int64_t i = 0; i < task_.targets * bins_; ++i) {
        call_.counts[first * bins_ + i] += counts_[i];
      }
      for (int64_t i = 0; i < task_.targets * kOutsideCount; ++i) {
        call_.outside[first * kOutsideCount + i] += outside_[i];
      }
    }
    guard_ = {};
  }

 private:
  template <typename Take>
  static void for_codes(const std::vector<int64_t>& occurrences, const Take& take) {
    for (int32_t bits = 0; bits < 1 << 16; ++bits) {
      if (occurrences[bits] != 0) {
        const BFloat16 value(static_cast<unsigned short>(bits), BFloat16::from_bits());
        take(static_cast<uint16_t>(bits), to_double(value), static_cast<double>(occurrences[bits]));
      }
    }
  }

  struct Sums {
    Moments collected;
    double shift = 0.0, sum = 0.0, square = 0.0, minimum = 0.0, maximum = 0.0, count = 0.0, most = 0.0;

    Moments moments() const { return moments_of(count, shift, sum, square, minimum, maximum); }
  };

  int32_t counter_for(int64_t index, BFloat16 value, double wide) const {
    const bool codes = grids_ == nullptr && bins_ > 0;
    return codes ? counter_of_code(value.x) : counter_for(index, static_cast<float>(value), wide);
  }
  int32_t counter_for(int64_t index, double value, double) const {
    return bins_ > 0 ? counter_of(value, grids_[index], bins_) : counter_of_non_finite(value, 0);
  }
  template <typename Narrow>
  int32_t counter_for(int64_t index, Narrow value, double) const {
    const float single = static_cast<float>(value);
    return bins_ > 0 ? counter_of(single, short_grids_[index], grids_[index], bins_) : counter_of_non_finite(single, 0);
  }

  const Call& call_;
  const CpuTask& task_;
  std::mutex& lock_;
  const int32_t bins_;
  int64_t *counts_, *outside_;
  std::vector<int64_t> own_;
  std::unique_lock<std::mutex> guard_;
  const ChannelGrid* grids_;
  const bool* only_;
  std::vector<ShortGrid> short_grids_;
  std::vector<Sums> sums_;
};

}  // namespace lambda_kernels
