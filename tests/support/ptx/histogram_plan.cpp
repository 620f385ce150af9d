// The launches of csrc/histogram_cuda.cu for a test: planned by its own function, with the addresses that the test gives.

#include <cstring>

#include "histogram_plan.h"

using namespace lambda_kernels;

// Of each launch its parameters, one behind the other in `launches`, and in `facts` blocks, threads, bytes of shared memory,
// layout and targets. `tensors` has for each tensor its address, sizes and strides as in Source, and its first target; `results`
// the addresses of grid, only, counts, outside and partial moments. Returns how many launches there are, and in `partials` the
// rows of partial moments; nothing else is written where `launches` is null.
extern "C" int64_t plan_launches(int64_t element_bytes, int64_t count, const int64_t* tensors, int64_t per, int64_t bins,
                                 const int64_t* results, const int64_t* gpu, char* launches, int64_t* facts,
                                 int64_t* partials) {
  std::vector<Source> sources;
  for (int64_t i = 0; i < count; ++i, tensors += 8) {
    sources.push_back({reinterpret_cast<const void*>(tensors[0]), tensors[1], tensors[2], tensors[3], tensors[4],
                       tensors[5], tensors[6], tensors[7]});
  }
  const bool moments = results[4] != 0;
  const Wanted wanted{static_cast<Per>(per), static_cast<int32_t>(bins), moments, static_cast<int32_t>(element_bytes)};
  const Device device{static_cast<int32_t>(gpu[0]), gpu[1], gpu[2]};
  std::vector<Launch> made = plan(sources, wanted, device, static_cast<int32_t>(gpu[3]));
  *partials = 0;
  for (Launch& launch : made) {
    launch.grid = reinterpret_cast<const ChannelGrid*>(results[0]);
    launch.only = reinterpret_cast<const bool*>(results[1]);
    launch.counts = reinterpret_cast<int64_t*>(results[2]);
    launch.outside = reinterpret_cast<int64_t*>(results[3]);
    launch.partials = moments ? reinterpret_cast<Moments*>(results[4]) + *partials : nullptr;
    *partials += launch.partial_count;
    if (launches != nullptr) {
      memcpy(launches, &launch, sizeof launch);
      launches += sizeof launch;
      const int64_t own[] = {launch.blocks, launch.threads, launch.shared_bytes, static_cast<int64_t>(launch.layout),
                             launch.targets};
      facts = std::copy(std::begin(own), std::end(own), facts);
    }
  }
  return static_cast<int64_t>(made.size());
}

extern "C" int64_t launch_bytes() { return sizeof(Launch); }
