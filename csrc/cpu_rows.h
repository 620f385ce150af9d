// The loop over rows, for an instruction set that is described by a class V. Included by one source file for each.
//
// LAMBDA_KERNELS_TARGET must be the attribute that lets a function use the instructions; every function that may end up
// inlined among them carries it.
#pragma once

#include <cstring>

#include "cpu_lanes.h"

#if defined(_MSC_VER) && !defined(__clang__)
#define LAMBDA_KERNELS_INLINE __forceinline
#define LAMBDA_KERNELS_NOINLINE __declspec(noinline)
#define LAMBDA_KERNELS_PREFETCH(address) (void)(address)
#define LAMBDA_KERNELS_UNLIKELY(condition) (condition)
#else
#define LAMBDA_KERNELS_INLINE inline __attribute__((always_inline))
#define LAMBDA_KERNELS_NOINLINE __attribute__((noinline))
#define LAMBDA_KERNELS_PREFETCH(address) __builtin_prefetch(address, 0, 2)  // the tables need all of the L1
#define LAMBDA_KERNELS_UNLIKELY(condition) __builtin_expect(condition, 0)
#endif

namespace lambda_kernels {
namespace {

// Bits of the two 16-bit types, which this file must not take from PyTorch's headers.
struct HalfBits {
  uint16_t bits;
};
struct BFloat16Bits {
  uint16_t bits;
};

// The definition of the bin, for all lanes.
template <typename V, typename Value>
LAMBDA_KERNELS_TARGET LAMBDA_KERNELS_NOINLINE void exact_slots(const Value* values, const LaneGrids& grids,
                                                               Slot* slots) {
  alignas(64) double indices[kLanes];
  V::exact_indices(values, grids, indices);
  const double bins = grids.bins;
  bool finite = true;
  for (int32_t lane = 0; lane < kLanes; ++lane) {
    const double index = indices[lane] >= 0.0 ? indices[lane] : -1.0;  // NaN, from a malformed grid, included
    const double beyond = static_cast<double>(values[lane]) <= grids.closed_hi64[lane] ? bins - 1.0 : bins;
    slots[lane] = static_cast<Slot>(static_cast<int32_t>(index >= bins ? beyond : index) + 1 + grids.offset[lane]);
    finite &= values[lane] - values[lane] == 0;
  }
  if (!finite) {
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      if (values[lane] - values[lane] != 0) {
        const int32_t slot = slot_of(counter_of_non_finite(values[lane], grids.bins), grids.bins);
        slots[lane] = static_cast<Slot>(slot + grids.offset[lane]);
      }
    }
  }
}

template <typename Value>
LAMBDA_KERNELS_TARGET LAMBDA_KERNELS_NOINLINE void count_non_finite(const Value* values, const LaneGrids& grids,
                                                                    Slot* table) {
  for (int32_t lane = 0; lane < kLanes; ++lane) {
    if (values[lane] - values[lane] != 0) {
      ++table[slot_of(counter_of_non_finite(values[lane], grids.bins), grids.bins) + grids.offset[lane]];
    }
  }
}

// Adds the finite ones of a row.
template <typename Value>
LAMBDA_KERNELS_TARGET LAMBDA_KERNELS_NOINLINE void sum_finite(const Value* values, LaneSums& sums) {
  for (int32_t lane = 0; lane < kLanes; ++lane) {
    const double value = static_cast<double>(values[lane]);
    if (value - value == 0.0) {
      const double distance = value - sums.shift[lane];
      sums.sum[lane] += distance;
      sums.square[lane] += distance * distance;
      sums.minimum[lane] = value < sums.minimum[lane] ? value : sums.minimum[lane];
      sums.maximum[lane] = value > sums.maximum[lane] ? value : sums.maximum[lane];
    }
  }
}

// Values of up to 32 bits.
template <typename V, typename Element, bool kBins, bool kExact, bool kSums>
class RowCounter {
 public:
  // Rows are taken two at a time, and while their slots are computed the counters of the two before are increased, so
  // that vector and scalar units both have work; this goes on from group to group.
  LAMBDA_KERNELS_TARGET LAMBDA_KERNELS_INLINE void count(const Element* values, int64_t rows, int64_t row_stride,
                                                         int64_t groups, const LaneGrids* grids, Slot* tables,
                                                         LaneSums* sums) {
    alignas(64) Slot slots[2][2 * kLanes];
    int32_t turn = 0;
    Slot* waiting = nullptr;  // the table of the two rows before
    // Rows of many groups are no stream to the hardware, so the next block of rows is asked for.
    const int64_t ahead = row_stride == kLanes ? 0 : rows * row_stride;
    for (int64_t group = 0; group < groups; ++group) {
      definition_ = grids + group;
      table_ = tables + group * kLanes * (grids->bins + kOutsideCount);
      grid_.load(*definition_);
      if (kSums) {
        sums_ = sums + group;
        accumulated_.load(*sums_);
      }
      const Element* row = values + group * kLanes;
      for (int64_t i = 0; i + 1 < rows; i += 2, row += 2 * row_stride) {
        LAMBDA_KERNELS_PREFETCH(row + ahead);
        take(row, slots[turn]);
        LAMBDA_KERNELS_PREFETCH(row + row_stride + ahead);
        take(row + row_stride, slots[turn] + kLanes);
        turn ^= 1;
        if (kBins && waiting != nullptr) {
          increase(waiting, slots[turn], 2);
        }
        waiting = table_;
      }
      if (rows % 2 != 0) {
        alignas(64) Slot last[kLanes];
        take(row, last);
        if (kBins) {
          increase(table_, last, 1);
        }
      }
      if (kSums) {
        accumulated_.store(*sums_);
      }
    }
    if (kBins && waiting != nullptr) {
      increase(waiting, slots[turn ^ 1], 2);
    }
  }

 private:
  LAMBDA_KERNELS_TARGET LAMBDA_KERNELS_INLINE void take(const Element* row, Slot* slots) {
    const typename V::Row x = V::load(row);
    const bool finite = V::all_finite(x);
    alignas(64) float values[kLanes];
    if (kBins) {
      if (LAMBDA_KERNELS_UNLIKELY(!V::template slots<kExact>(x, grid_, slots) || !finite)) {
        V::store(x, values);
        exact_slots<V>(values, *definition_, slots);
      }
    } else if (LAMBDA_KERNELS_UNLIKELY(!finite)) {
      V::store(x, values);
      count_non_finite(values, *definition_, table_);
    }
    if (kSums) {
      if (LAMBDA_KERNELS_UNLIKELY(!finite)) {
        V::store(x, values);
        accumulated_.store(*sums_);
        sum_finite(values, *sums_);
        accumulated_.load(*sums_);
      } else {
        accumulated_.add(x);
      }
    }
  }

  LAMBDA_KERNELS_TARGET static LAMBDA_KERNELS_INLINE void increase(Slot* table, const Slot* slots, int64_t rows) {
    for (int64_t part = 0; part < rows * kLanes; part += 4) {
      uint64_t four;
      memcpy(&four, slots + part, sizeof(four));
      ++table[static_cast<Slot>(four)];
      ++table[static_cast<Slot>(four >> 16)];
      ++table[static_cast<Slot>(four >> 32)];
      ++table[four >> 48];
    }
  }

  const LaneGrids* definition_;
  Slot* table_;
  LaneSums* sums_;
  typename V::Grids grid_;
  typename V::Sums accumulated_;
};

template <typename V, typename Element>
LAMBDA_KERNELS_TARGET void count_rows(const void* values, int64_t rows, int64_t row_stride, int64_t groups,
                                      const LaneGrids* grids, Slot* tables, LaneSums* sums) {
  const Element* const first = static_cast<const Element*>(values);
  bool exact = true;
  for (int64_t group = 0; group < groups; ++group) {
    exact = exact && grids[group].exact;
  }
  if (grids->bins == 0) {
    RowCounter<V, Element, false, false, true>().count(first, rows, row_stride, groups, grids, tables, sums);
  } else if (sums == nullptr && exact) {
    RowCounter<V, Element, true, true, false>().count(first, rows, row_stride, groups, grids, tables, sums);
  } else if (sums == nullptr) {
    RowCounter<V, Element, true, false, false>().count(first, rows, row_stride, groups, grids, tables, sums);
  } else if (exact) {
    RowCounter<V, Element, true, true, true>().count(first, rows, row_stride, groups, grids, tables, sums);
  } else {
    RowCounter<V, Element, true, false, true>().count(first, rows, row_stride, groups, grids, tables, sums);
  }
}

template <typename V>
LAMBDA_KERNELS_TARGET void count_double_rows(const void* values, int64_t rows, int64_t row_stride, int64_t groups,
                                             const LaneGrids* grids, Slot* tables, LaneSums* sums) {
  alignas(64) Slot slots[kLanes];
  for (int64_t group = 0; group < groups; ++group) {
    const double* row = static_cast<const double*>(values) + group * kLanes;
    Slot* const table = tables + group * kLanes * (grids->bins + kOutsideCount);
    for (int64_t i = 0; i < rows; ++i, row += row_stride) {
      if (grids->bins > 0) {
        exact_slots<V>(row, grids[group], slots);
        for (int32_t lane = 0; lane < kLanes; ++lane) {
          ++table[slots[lane]];
        }
      } else {
        count_non_finite(row, grids[group], table);
      }
      if (sums != nullptr) {
        sum_finite(row, sums[group]);
      }
    }
  }
}

template <typename V>
constexpr Lanes lanes_of(const char* name, bool (*runs_here)()) {
  return {name,
          runs_here,
          {count_rows<V, float>, count_rows<V, HalfBits>, count_rows<V, BFloat16Bits>, count_double_rows<V>}};
}

}  // namespace
}  // namespace lambda_kernels
