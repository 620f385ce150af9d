// The loop over rows for every processor: the vectors of GCC and Clang become what instructions there are, on x86-64
// without a newer set SSE2, on arm64 NEON.
#define LAMBDA_KERNELS_TARGET
#include "cpu_rows.h"

namespace lambda_kernels {
namespace {

float float_of(HalfBits half) {
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000) << 16;
  const uint32_t magnitude = half.bits & 0x7fff;
  // The exponent is moved into its place in a float32, and a product corrects its bias: exact for subnormals too.
  const uint32_t moved = magnitude << 13;
  float value;
  memcpy(&value, &moved, sizeof(value));
  value *= 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  bits = magnitude >= 0x7c00 ? 0x7f800000 | moved : bits;
  bits |= sign;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

float float_of(BFloat16Bits bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

float float_of(float value) {
  return value;
}

#if defined(__GNUC__)
constexpr int32_t kVector = 4;  // what SSE2 and NEON have
using Floats = float __attribute__((vector_size(4 * kVector)));
using Ints = int32_t __attribute__((vector_size(4 * kVector)));
using Doubles = double __attribute__((vector_size(4 * kVector)));

template <typename Vector, typename Value>
LAMBDA_KERNELS_INLINE Vector read(const Value* from) {
  Vector result;
  memcpy(&result, from, sizeof(result));
  return result;
}

template <typename Vector, typename Value>
LAMBDA_KERNELS_INLINE void write(Value* to, Vector values) {
  memcpy(to, &values, sizeof(values));
}
#endif

struct Plain {
  struct Row {
    float lane[kLanes];
  };

  template <typename Element>
  static LAMBDA_KERNELS_INLINE Row load(const Element* row) {
    Row x;
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      x.lane[lane] = float_of(row[lane]);
    }
    return x;
  }
  static LAMBDA_KERNELS_INLINE void store(const Row& x, float* values) { memcpy(values, x.lane, sizeof(x.lane)); }
  static LAMBDA_KERNELS_INLINE bool all_finite(const Row& x) {
    uint32_t non_finite = 0;
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      uint32_t bits;
      memcpy(&bits, &x.lane[lane], sizeof(bits));
      non_finite |= ((bits & 0x7f800000) + 0x00800000) & 0x80000000;  // all bits of the exponent carry into the sign
    }
    return non_finite == 0;
  }

  struct Grids {
    const LaneGrids* grids;

    void load(const LaneGrids& from) { grids = &from; }
  };

  // Whether the slots are those of the definition. As `short_index`, with the edge case of `counter_of` taken first.
  template <bool kExact>
  static LAMBDA_KERNELS_INLINE bool slots(const Row& x, const Grids& grid, Slot* slots) {
    const LaneGrids& grids = *grid.grids;
#if defined(__GNUC__)
    const float bins = static_cast<float>(grids.bins);
    Ints any{};
    for (int32_t lane = 0; lane < kLanes; lane += kVector) {
      Floats value = read<Floats>(x.lane + lane);
      value = value == read<Floats>(grids.closed_hi + lane) ? read<Floats>(grids.within + lane) : value;
      const Floats distance = value - read<Floats>(grids.origin + lane);
      Floats position = distance * read<Floats>(grids.scale + lane) + read<Floats>(grids.correction + lane);
      // The floor is made of conversions, which every vector unit has; beyond 2^30 all are far outside, and whole.
      position = position > -0x1p30f ? position : Floats{} - 0x1p30f;
      position = position < 0x1p30f ? position : Floats{} + 0x1p30f;
      const Floats towards_zero = __builtin_convertvector(__builtin_convertvector(position, Ints), Floats);
      Floats whole = towards_zero > position ? towards_zero - 1.0f : towards_zero;
      const Floats below_zero = whole < -1.0f ? whole : Floats{} - 1.0f;
      whole = distance < 0.0f ? below_zero : whole;
      const Floats off_middle = position - whole - 0.5f, certain = read<Floats>(grids.certain + lane);
      any |= ~((off_middle <= certain) & (-off_middle <= certain));
      Floats index = whole - read<Floats>(grids.first + lane);
      index = index > -1.0f ? index : Floats{} - 1.0f;
      index = index < bins ? index : Floats{} + bins;
      const Ints found = __builtin_convertvector(index, Ints) + read<Ints>(grids.offset + lane) + 1;
      for (int32_t i = 0; i < kVector; ++i) {
        slots[lane + i] = static_cast<Slot>(found[i]);
      }
    }
    return kExact || (any[0] | any[1] | any[2] | any[3]) == 0;
#else
    bool certain = true;
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      const float value = x.lane[lane] == grids.closed_hi[lane] ? grids.within[lane] : x.lane[lane];
      const ShortGrid grid{grids.origin[lane], grids.scale[lane],     grids.correction[lane],
                           grids.first[lane],  grids.closed_hi[lane], grids.certain[lane]};
      float index;
      certain &= short_index(value, grid, &index);
      index = index > -1.0f ? index : -1.0f;
      index = index < grids.bins ? index : static_cast<float>(grids.bins);
      slots[lane] = static_cast<Slot>(static_cast<int32_t>(index) + grids.offset[lane] + 1);
    }
    return kExact || certain;
#endif
  }

  // floor((value − anchor) · inv_width) − first
  template <typename Value>
  static LAMBDA_KERNELS_INLINE void exact_indices(const Value* values, const LaneGrids& grids, double* indices) {
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      const double position = (static_cast<double>(values[lane]) - grids.anchor[lane]) * grids.inv_width[lane];
      indices[lane] = floor(position) - grids.first64[lane];
    }
  }

  struct Sums {
    LaneSums sums;

    void load(const LaneSums& from) { sums = from; }
    void store(LaneSums& to) const { to = sums; }
    LAMBDA_KERNELS_INLINE void add(const Row& x) {
#if defined(__GNUC__)
      for (int32_t lane = 0; lane < kLanes; lane += kVector / 2) {
        const Doubles value{x.lane[lane], x.lane[lane + 1]};
        const Doubles distance = value - read<Doubles>(sums.shift + lane);
        write(sums.sum + lane, read<Doubles>(sums.sum + lane) + distance);
        write(sums.square + lane, read<Doubles>(sums.square + lane) + distance * distance);
        const Doubles minimum = read<Doubles>(sums.minimum + lane), maximum = read<Doubles>(sums.maximum + lane);
        write(sums.minimum + lane, value < minimum ? value : minimum);
        write(sums.maximum + lane, value > maximum ? value : maximum);
      }
#else
      sum_finite(x.lane, sums);
#endif
    }
  };
};

bool runs_here() {
  return true;
}

}  // namespace

const Lanes kPlainLanes = lanes_of<Plain>("plain", runs_here);

}  // namespace lambda_kernels
