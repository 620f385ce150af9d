// The loop over rows with AVX2: a row is two registers.
#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

#if defined(_MSC_VER) && !defined(__clang__)
#define LAMBDA_KERNELS_TARGET
#else
#define LAMBDA_KERNELS_TARGET __attribute__((target("avx2,fma,f16c")))
#endif

#include "cpu_features.h"
#include "cpu_rows.h"

#define LAMBDA_KERNELS_STEP LAMBDA_KERNELS_TARGET static LAMBDA_KERNELS_INLINE

namespace lambda_kernels {
namespace {

struct Avx2 {
  struct Row {
    __m256 half[2];
  };

  LAMBDA_KERNELS_STEP Row load(const float* row) { return {{_mm256_loadu_ps(row), _mm256_loadu_ps(row + 8)}}; }
  LAMBDA_KERNELS_STEP Row load(const HalfBits* row) {
    return {{_mm256_cvtph_ps(bits_of(row)), _mm256_cvtph_ps(bits_of(row + 8))}};
  }
  LAMBDA_KERNELS_STEP Row load(const BFloat16Bits* row) { return {{upper(bits_of(row)), upper(bits_of(row + 8))}}; }
  LAMBDA_KERNELS_STEP void store(Row x, float* values) {
    _mm256_store_ps(values, x.half[0]);
    _mm256_store_ps(values + 8, x.half[1]);
  }
  LAMBDA_KERNELS_STEP bool all_finite(Row x) {
    // x − x is 0 for finite x and NaN for the others.
    const __m256 low = _mm256_sub_ps(x.half[0], x.half[0]);
    const __m256 high = _mm256_sub_ps(x.half[1], x.half[1]);
    return _mm256_movemask_ps(_mm256_cmp_ps(low, high, _CMP_UNORD_Q)) == 0;
  }

  struct Grids {
    const LaneGrids* grids;  // more numbers than there are registers

    LAMBDA_KERNELS_TARGET LAMBDA_KERNELS_INLINE void load(const LaneGrids& from) { grids = &from; }
  };

  // Whether the slots are those of the definition. As `short_index`, with the edge case of `counter_of` taken first.
  template <bool kExact>
  LAMBDA_KERNELS_STEP bool slots(Row x, const Grids& grid, Slot* slots) {
    __m256 unsure[2];
    __m256i slot[2];
    for (int half = 0; half < 2; ++half) {
      slot[half] = half_slots(x.half[half], *grid.grids, 8 * half, &unsure[half]);
    }
    // Packing takes 128 bits of each by turns, which the permutation puts in order.
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(slot[0], slot[1]), 0xd8);
    _mm256_store_si256(reinterpret_cast<__m256i*>(slots), packed);
    return kExact || _mm256_movemask_ps(_mm256_or_ps(unsure[0], unsure[1])) == 0;
  }
  LAMBDA_KERNELS_STEP __m256i half_slots(__m256 x, const LaneGrids& grids, int lane, __m256* unsure) {
    const __m256 on_edge = _mm256_cmp_ps(x, _mm256_load_ps(grids.closed_hi + lane), _CMP_EQ_OQ);
    x = _mm256_blendv_ps(x, _mm256_load_ps(grids.within + lane), on_edge);
    const __m256 distance = _mm256_sub_ps(x, _mm256_load_ps(grids.origin + lane));
    const __m256 position =
        _mm256_fmadd_ps(distance, _mm256_load_ps(grids.scale + lane), _mm256_load_ps(grids.correction + lane));
    __m256 whole = _mm256_floor_ps(position);
    const __m256 negative = _mm256_cmp_ps(distance, _mm256_setzero_ps(), _CMP_LT_OQ);
    whole = _mm256_blendv_ps(whole, _mm256_min_ps(whole, _mm256_set1_ps(-1.0f)), negative);
    const __m256 off_middle = _mm256_sub_ps(_mm256_sub_ps(position, whole), _mm256_set1_ps(0.5f));
    const __m256 far = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), off_middle);
    *unsure = _mm256_cmp_ps(far, _mm256_load_ps(grids.certain + lane), _CMP_NLE_UQ);
    __m256 index = _mm256_sub_ps(whole, _mm256_load_ps(grids.first + lane));
    index = _mm256_max_ps(index, _mm256_set1_ps(-1.0f));
    index = _mm256_min_ps(index, _mm256_set1_ps(static_cast<float>(grids.bins)));
    const __m256i offset = _mm256_load_si256(reinterpret_cast<const __m256i*>(grids.offset + lane));
    return _mm256_add_epi32(_mm256_add_epi32(_mm256_cvttps_epi32(index), offset), _mm256_set1_epi32(1));
  }

  // floor((value − anchor) · inv_width) − first
  template <typename Value>
  LAMBDA_KERNELS_STEP void exact_indices(const Value* values, const LaneGrids& grids, double* indices) {
    for (int32_t part = 0; part < kLanes; part += 4) {
      const __m256d distance = _mm256_sub_pd(load_wide(values + part), _mm256_load_pd(grids.anchor + part));
      const __m256d whole = _mm256_floor_pd(_mm256_mul_pd(distance, _mm256_load_pd(grids.inv_width + part)));
      _mm256_store_pd(indices + part, _mm256_sub_pd(whole, _mm256_load_pd(grids.first64 + part)));
    }
  }

  struct Sums {
    __m256d shift[4], sum[4], square[4];
    Row minimum, maximum;

    LAMBDA_KERNELS_TARGET LAMBDA_KERNELS_INLINE void load(const LaneSums& from) {
      for (int part = 0; part < 4; ++part) {
        shift[part] = _mm256_load_pd(from.shift + 4 * part);
        sum[part] = _mm256_load_pd(from.sum + 4 * part);
        square[part] = _mm256_load_pd(from.square + 4 * part);
      }
      for (int half = 0; half < 2; ++half) {
        minimum.half[half] = narrow(from.minimum + 8 * half);
        maximum.half[half] = narrow(from.maximum + 8 * half);
      }
    }
    LAMBDA_KERNELS_TARGET LAMBDA_KERNELS_INLINE void store(LaneSums& to) const {
      for (int part = 0; part < 4; ++part) {
        _mm256_store_pd(to.sum + 4 * part, sum[part]);
        _mm256_store_pd(to.square + 4 * part, square[part]);
        _mm256_store_pd(to.minimum + 4 * part, widen(minimum, part));
        _mm256_store_pd(to.maximum + 4 * part, widen(maximum, part));
      }
    }
    LAMBDA_KERNELS_TARGET LAMBDA_KERNELS_INLINE void add(Row x) {
      for (int part = 0; part < 4; ++part) {
        const __m256d distance = _mm256_sub_pd(widen(x, part), shift[part]);
        sum[part] = _mm256_add_pd(sum[part], distance);
        square[part] = _mm256_fmadd_pd(distance, distance, square[part]);
      }
      for (int half = 0; half < 2; ++half) {
        minimum.half[half] = _mm256_min_ps(minimum.half[half], x.half[half]);
        maximum.half[half] = _mm256_max_ps(maximum.half[half], x.half[half]);
      }
    }
    LAMBDA_KERNELS_STEP __m256d widen(const Row& x, int part) {
      const __m256 half = x.half[part / 2];
      return _mm256_cvtps_pd(part % 2 == 0 ? _mm256_castps256_ps128(half) : _mm256_extractf128_ps(half, 1));
    }
    LAMBDA_KERNELS_STEP __m256 narrow(const double* values) {
      const __m128 low = _mm256_cvtpd_ps(_mm256_load_pd(values));
      return _mm256_insertf128_ps(_mm256_castps128_ps256(low), _mm256_cvtpd_ps(_mm256_load_pd(values + 4)), 1);
    }
  };

 private:
  LAMBDA_KERNELS_STEP __m256d load_wide(const float* values) { return _mm256_cvtps_pd(_mm_loadu_ps(values)); }
  LAMBDA_KERNELS_STEP __m256d load_wide(const double* values) { return _mm256_loadu_pd(values); }
  template <typename Bits>
  LAMBDA_KERNELS_STEP __m128i bits_of(const Bits* row) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
  }
  LAMBDA_KERNELS_STEP __m256 upper(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
};

bool runs_here() {
  return x86_supports(X86::kAvx2);
}

}  // namespace

const Lanes kAvx2Lanes = lanes_of<Avx2>("AVX2", runs_here);

}  // namespace lambda_kernels

#endif
