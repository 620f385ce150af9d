#include "cpu_lanes.h"

#include <cstdlib>
#include <cstring>

namespace lambda_kernels {

const Lanes* lanes_here() {
  static const Lanes* const all[] = {
#if defined(__x86_64__) || defined(_M_X64)
      &kAvx512Lanes, &kAvx2Lanes,
#endif
      &kPlainLanes};
  const char* const wanted = std::getenv("LAMBDA_KERNELS_CPU_CAPABILITY");
  for (const Lanes* lanes : all) {
    const bool allowed = wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, lanes->name) == 0;
    if (allowed && lanes->runs_here()) {
      return lanes;
    }
  }
  return nullptr;
}

}  // namespace lambda_kernels
