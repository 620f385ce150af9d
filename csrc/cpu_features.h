// Which vector instructions this x86-64 processor has and its operating system saves.
#pragma once

#include <cstdint>

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#endif

namespace lambda_kernels {

enum class X86 { kAvx2, kAvx512 };

#if defined(_MSC_VER) && !defined(__clang__)
inline bool x86_supports(X86 level) {
  int leaf1[4], leaf7[4];
  __cpuid(leaf1, 1);
  __cpuidex(leaf7, 7, 0);
  const bool fma = leaf1[2] & (1 << 12), saves = leaf1[2] & (1 << 27), f16c = leaf1[2] & (1 << 29);
  const uint64_t saved = saves ? _xgetbv(0) : 0;
  const bool avx2 = fma && f16c && (leaf7[1] & (1 << 5)) && (saved & 0x06) == 0x06;
  if (level == X86::kAvx2) {
    return avx2;
  }
  const int bits = (1 << 16) | (1 << 17) | (1 << 30) | static_cast<int>(1u << 31);  // F, DQ, BW, VL
  return avx2 && (leaf7[1] & bits) == bits && (saved & 0xe6) == 0xe6;
}
#else
inline bool x86_supports(X86 level) {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return level == X86::kAvx2 ? avx2
                             : avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace lambda_kernels
