// The inner loop of the CPU half, without anything of PyTorch or the C++ library, because it is compiled for several
// instruction sets: an inline function of a standard header that was compiled for AVX-512 here could be the one copy
// that the linker keeps for everybody.
//
// Values are taken in rows of kLanes. Each lane has a table of counters of its own, so that neighbouring increments
// never wait for one another; the lanes are sixteen channels, or sixteen interleaved parts of one row of the results.
#pragma once

#include <cstdint>

#include "binning.h"

namespace lambda_kernels {

constexpr int32_t kLanes = 16;

// A lane's table holds these slots: underflow, the bins, overflow, NaN, +Inf, −Inf. What a slot counts is a 16-bit
// number, and so is the position of a slot among the tables of the lanes.
using Slot = uint16_t;
constexpr int32_t kMaxLaneBins = (1 << 16) / kLanes - kOutsideCount;
constexpr int64_t kMaxLaneRows = (1 << 16) - 1;

// A `counter_of` as a slot.
inline int32_t slot_of(int32_t counter, int32_t bins) {
  return counter < bins ? counter + 1 : counter == bins + kUnderflow ? 0 : counter;
}

// The grids of the lanes: what `ShortGrid` and `ChannelGrid` say.
struct alignas(64) LaneGrids {
  float origin[kLanes], scale[kLanes], correction[kLanes], first[kLanes], certain[kLanes];
  float closed_hi[kLanes];        // a value that equals it
  float within[kLanes];           // is taken for this one, which lies in the last bin
  int32_t offset[kLanes];         // where the lane's table begins
  double anchor[kLanes], inv_width[kLanes], first64[kLanes], closed_hi64[kLanes];
  int32_t bins;                   // 0: only what is outside is counted
  bool exact;                     // the short form can tell for every finite value
};

// The sums of the lanes since they were last collected.
struct alignas(64) LaneSums {
  double shift[kLanes], sum[kLanes], square[kLanes];
  double minimum[kLanes], maximum[kLanes];
  double folded_sum[kLanes], folded_square[kLanes];  // sums before these
};

enum class ElementType : int32_t { kFloat, kHalf, kBFloat16, kDouble, kCount };

// Counts `rows` rows of `groups` times kLanes neighbouring values, rows being `row_stride` elements apart. A table
// takes kMaxLaneRows at most.
using CountRows = void (*)(const void* values, int64_t rows, int64_t row_stride, int64_t groups,
                           const LaneGrids* grids,  // [groups]
                           Slot* tables,            // [groups, kLanes, bins + kOutsideCount]
                           LaneSums* sums);         // [groups]; null where they are not wanted, which needs bins

// The code for one instruction set.
struct Lanes {
  const char* name;
  bool (*runs_here)();
  CountRows count[static_cast<int>(ElementType::kCount)];  // by ElementType
};

extern const Lanes kPlainLanes;
#if defined(__x86_64__) || defined(_M_X64)
extern const Lanes kAvx2Lanes, kAvx512Lanes;
#endif

// The widest that runs here, or the one that LAMBDA_KERNELS_CPU_CAPABILITY names; null if that one does not run here.
const Lanes* lanes_here();

}  // namespace lambda_kernels
