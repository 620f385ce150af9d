// The element types of the histogram: how their values stand in the 32-bit words that a thread reads. And how the
// moments of a launch's blocks are put together.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "histogram_plan.h"

namespace lambda_kernels {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

LAMBDA_KERNELS_HOST_DEVICE inline float value_of_half(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) {
    return float_of(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  }
  // As the bits of a float the value is too small by 2^112; that product is exact.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
#endif
}

// `a` or `b`. Arguments are values, not places in memory, between which a compiler would choose by their addresses: an
// array that has addresses is not kept in registers.
LAMBDA_KERNELS_HOST_DEVICE inline uint32_t chosen(bool first, uint32_t a, uint32_t b) { return first ? a : b; }

LAMBDA_KERNELS_HOST_DEVICE inline bool finite(float value) { return fabsf(value) < INFINITY; }
LAMBDA_KERNELS_HOST_DEVICE inline bool finite(double value) { return fabs(value) < static_cast<double>(INFINITY); }
LAMBDA_KERNELS_HOST_DEVICE inline float smaller(float a, float b) { return fminf(a, b); }
LAMBDA_KERNELS_HOST_DEVICE inline double smaller(double a, double b) { return fmin(a, b); }
LAMBDA_KERNELS_HOST_DEVICE inline float larger(float a, float b) { return fmaxf(a, b); }
LAMBDA_KERNELS_HOST_DEVICE inline double larger(double a, double b) { return fmax(a, b); }

// How values stand in 32-bit words: those of 16 bits in pairs.
template <typename Element>
struct Words {
  using Value = float;
  static constexpr bool kPairs = sizeof(Element) == 2;
  static constexpr int kOne = 1;  // words of one value
  LAMBDA_KERNELS_HOST_DEVICE static uint16_t bits(const uint32_t* words, int element) {
    return static_cast<uint16_t>(words[element / 2] >> (16 * (element % 2)));
  }
  // Puts in a value that stands in words of its own; those of a pair in their order.
  LAMBDA_KERNELS_HOST_DEVICE static void put(const uint32_t* one, uint32_t* words, int element) {
    if constexpr (kPairs) {
      words[element / 2] = element % 2 ? words[element / 2] | one[0] << 16 : one[0] & 0xffffu;
    } else {
      words[element] = one[0];
    }
  }
  LAMBDA_KERNELS_HOST_DEVICE static float value(const uint32_t* words, int element) {
    if constexpr (sizeof(Element) == 4) {
      return float_of(words[element]);
    } else if constexpr (std::is_same_v<Element, Half>) {
      return value_of_half(bits(words, element));
    } else {
      const uint32_t word = words[element / 2];
      return float_of(element % 2 ? word & 0xffff0000u : word << 16);
    }
  }
};

template <>
struct Words<double> {
  using Value = double;
  static constexpr bool kPairs = false;
  static constexpr int kOne = 2;
  LAMBDA_KERNELS_HOST_DEVICE static void put(const uint32_t* one, uint32_t* words, int element) {
    words[2 * element] = one[0];
    words[2 * element + 1] = one[1];
  }
  LAMBDA_KERNELS_HOST_DEVICE static double value(const uint32_t* words, int element) {
    const uint64_t bits = words[2 * element] | static_cast<uint64_t>(words[2 * element + 1]) << 32;
    double result;
    memcpy(&result, &bits, sizeof result);
    return result;
  }
};

// The second kernel: a warp for each target of a launch puts the moments of its blocks together.
struct MergedMoments {
  static constexpr int32_t kThreads = 256;

  // The moments of every 32nd block that has values of the target.
  LAMBDA_KERNELS_HOST_DEVICE static Moments gather(const Launch& launch, int64_t index, int32_t lane) {
    Moments total;
    int64_t target = 0;
    const Task* const task = find(launch, index, &target);
    if (task == nullptr || (launch.only != nullptr && !launch.only[task->target + target])) {
      return total;
    }
    const int64_t tile = launch.layout == Layout::kColumns ? task->width : 1;
    const int64_t parts = task->parts();
    const Moments* const own = launch.partials + task->first_partial + target;
    for (int64_t part = lane; part < parts; part += kWarp) {
      merge(total, own[part * task->units * tile]);
    }
    return total;
  }

  LAMBDA_KERNELS_HOST_DEVICE static void write(const Launch& launch, int64_t index, const Moments& total,
                                               Moments* moments) {
    int64_t target = 0;
    const Task* const task = find(launch, index, &target);
    if (task != nullptr) {
      moments[task->target + target] = total;
    }
  }

 private:
  // The task of the launch's target with that number, null beyond the last one, and the target's number in it.
  LAMBDA_KERNELS_HOST_DEVICE static const Task* find(const Launch& launch, int64_t index, int64_t* target) {
    for (int32_t i = 0; i < launch.task_count; ++i) {
      const Task& task = launch.tasks[i];
      const int64_t targets = launch.layout == Layout::kColumns ? task.length : task.units;
      if (index < targets) {
        *target = index;
        return &task;
      }
      index -= targets;
    }
    return nullptr;
  }
};

}  // namespace lambda_kernels
