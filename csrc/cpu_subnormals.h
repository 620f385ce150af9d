// The treatment of subnormal numbers, which PyTorch lets its users change for a thread.
#pragma once

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace lambda_kernels {

// Subnormal numbers are values like others, also where PyTorch was told to flush them.
class SubnormalsKept {
 public:
#if defined(__x86_64__) || defined(_M_X64)
  SubnormalsKept() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~0x8040u); }
  ~SubnormalsKept() { _mm_setcsr(before_); }

 private:
  const unsigned int before_;
#elif defined(__aarch64__) && defined(__GNUC__)
  SubnormalsKept() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ & ~(uint64_t{1} << 24)));
  }
  ~SubnormalsKept() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#endif
};

}  // namespace lambda_kernels
