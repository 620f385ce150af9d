// The loop over rows with AVX-512: a row is one register.
#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#define LAMBDA_KERNELS_TARGET
#else
#define LAMBDA_KERNELS_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#endif

#include "cpu_features.h"
#include "cpu_rows.h"

#define LAMBDA_KERNELS_STEP LAMBDA_KERNELS_TARGET static LAMBDA_KERNELS_INLINE

namespace lambda_kernels {
namespace {

struct Avx512 {
  using Row = __m512;

  LAMBDA_KERNELS_STEP Row load(const float* row) { return _mm512_loadu_ps(row); }
  LAMBDA_KERNELS_STEP Row load(const HalfBits* row) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
  }
  LAMBDA_KERNELS_STEP Row load(const BFloat16Bits* row) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  LAMBDA_KERNELS_STEP void store(Row x, float* values) { _mm512_store_ps(values, x); }
  LAMBDA_KERNELS_STEP bool all_finite(Row x) {
    return _mm512_fpclass_ps_mask(x, 0x99) == 0;  // quiet and signalling NaN, both infinities
  }

  struct Grids {
    __m512 origin, scale, correction, first, certain, closed_hi, within, bins;
    __m512i offset;

    LAMBDA_KERNELS_TARGET LAMBDA_KERNELS_INLINE void load(const LaneGrids& grids) {
      origin = _mm512_load_ps(grids.origin);
      scale = _mm512_load_ps(grids.scale);
      correction = _mm512_load_ps(grids.correction);
      first = _mm512_load_ps(grids.first);
      certain = _mm512_load_ps(grids.certain);
      closed_hi = _mm512_load_ps(grids.closed_hi);
      within = _mm512_load_ps(grids.within);
      bins = _mm512_set1_ps(static_cast<float>(grids.bins));
      offset = _mm512_add_epi32(_mm512_load_si512(grids.offset), _mm512_set1_epi32(1));
    }
  };

  // Whether the slots are those of the definition. As `short_index`, with the edge case of `counter_of` taken first.
  template <bool kExact>
  LAMBDA_KERNELS_STEP bool slots(Row x, const Grids& grid, Slot* slots) {
    x = _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, grid.closed_hi, _CMP_EQ_OQ), grid.within);
    const __m512 distance = _mm512_sub_ps(x, grid.origin);
    const __m512 position = _mm512_fmadd_ps(distance, grid.scale, grid.correction);
    __m512 whole = _mm512_roundscale_ps(position, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const __mmask16 negative = _mm512_cmp_ps_mask(distance, _mm512_setzero_ps(), _CMP_LT_OQ);
    whole = _mm512_mask_min_ps(whole, negative, whole, _mm512_set1_ps(-1.0f));
    __mmask16 unsure = 0;
    if (!kExact) {
      const __m512 off_middle = _mm512_sub_ps(_mm512_sub_ps(position, whole), _mm512_set1_ps(0.5f));
      unsure = _mm512_cmp_ps_mask(_mm512_abs_ps(off_middle), grid.certain, _CMP_NLE_UQ);
    }
    __m512 index = _mm512_sub_ps(whole, grid.first);
    index = _mm512_min_ps(_mm512_max_ps(index, _mm512_set1_ps(-1.0f)), grid.bins);
    const __m512i slot = _mm512_add_epi32(_mm512_cvttps_epi32(index), grid.offset);
    _mm256_store_si256(reinterpret_cast<__m256i*>(slots), _mm512_cvtepi32_epi16(slot));
    return unsure == 0;
  }

  // floor((value − anchor) · inv_width) − first
  template <typename Value>
  LAMBDA_KERNELS_STEP void exact_indices(const Value* values, const LaneGrids& grids, double* indices) {
    for (int32_t part = 0; part < kLanes; part += 8) {
      const __m512d distance = _mm512_sub_pd(load_wide(values + part), _mm512_load_pd(grids.anchor + part));
      const __m512d position = _mm512_mul_pd(distance, _mm512_load_pd(grids.inv_width + part));
      const __m512d whole = _mm512_roundscale_pd(position, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
      _mm512_store_pd(indices + part, _mm512_sub_pd(whole, _mm512_load_pd(grids.first64 + part)));
    }
  }
  LAMBDA_KERNELS_STEP __m512d load_wide(const float* values) { return _mm512_cvtps_pd(_mm256_loadu_ps(values)); }
  LAMBDA_KERNELS_STEP __m512d load_wide(const double* values) { return _mm512_loadu_pd(values); }

  struct Sums {
    __m512d shift[2], sum[2], square[2];
    __m512 minimum, maximum;

    LAMBDA_KERNELS_TARGET LAMBDA_KERNELS_INLINE void load(const LaneSums& from) {
      for (int half = 0; half < 2; ++half) {
        shift[half] = _mm512_load_pd(from.shift + 8 * half);
        sum[half] = _mm512_load_pd(from.sum + 8 * half);
        square[half] = _mm512_load_pd(from.square + 8 * half);
      }
      minimum = narrow(from.minimum);
      maximum = narrow(from.maximum);
    }
    LAMBDA_KERNELS_TARGET LAMBDA_KERNELS_INLINE void store(LaneSums& to) const {
      for (int half = 0; half < 2; ++half) {
        _mm512_store_pd(to.sum + 8 * half, sum[half]);
        _mm512_store_pd(to.square + 8 * half, square[half]);
        _mm512_store_pd(to.minimum + 8 * half, widen(minimum, half));
        _mm512_store_pd(to.maximum + 8 * half, widen(maximum, half));
      }
    }
    LAMBDA_KERNELS_TARGET LAMBDA_KERNELS_INLINE void add(Row x) {
      for (int half = 0; half < 2; ++half) {
        const __m512d distance = _mm512_sub_pd(widen(x, half), shift[half]);
        sum[half] = _mm512_add_pd(sum[half], distance);
        square[half] = _mm512_fmadd_pd(distance, distance, square[half]);
      }
      minimum = _mm512_min_ps(minimum, x);
      maximum = _mm512_max_ps(maximum, x);
    }
    LAMBDA_KERNELS_STEP __m512d widen(Row x, int half) {
      return _mm512_cvtps_pd(half == 0 ? _mm512_castps512_ps256(x) : _mm512_extractf32x8_ps(x, 1));
    }
    LAMBDA_KERNELS_STEP Row narrow(const double* values) {
      const __m256 low = _mm512_cvtpd_ps(_mm512_load_pd(values));
      return _mm512_insertf32x8(_mm512_castps256_ps512(low), _mm512_cvtpd_ps(_mm512_load_pd(values + 8)), 1);
    }
  };
};

bool runs_here() {
  return x86_supports(X86::kAvx512);
}

}  // namespace

const Lanes kAvx512Lanes = lanes_of<Avx512>("AVX512", runs_here);

}  // namespace lambda_kernels

#endif
