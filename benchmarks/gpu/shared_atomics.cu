// How many counts a multiprocessor adds to its shared memory in a clock, with nothing else to do. For questions.py, which
// compiles this file alone and loads it: it needs the CUDA toolkit and no header of PyTorch.
//
// A thread takes kCells cells of a table of 256 counters and adds one to each of them, again and again. Which cells those
// are is what differs: see `cell`. Addresses stay in registers, so that nothing but the additions is issued.

#include <cstdint>

#include <cuda_runtime.h>

namespace {

constexpr int kBins = 256;
constexpr int kLanes = 32;
constexpr int kCells = 16;

enum Pattern : int32_t {
  kOwnColumn,    // [bin][lane]: each lane of a warp in a bank of its own; random bins
  kRandomBins,   // [bin]: lanes meet in banks, and in counters, as random bins do
  kOneCounter,   // [bin]: all lanes of all warps want one counter
};

__device__ uint32_t scattered(uint32_t value) {
  value = (value ^ (value >> 16)) * 0x7feb352du;
  value = (value ^ (value >> 15)) * 0x846ca68bu;
  return value ^ (value >> 16);
}

__device__ int32_t cell(int32_t pattern, uint32_t number) {
  const auto bin = static_cast<int32_t>(scattered(number) % kBins);
  if (pattern == kOwnColumn) return bin * kLanes + static_cast<int32_t>(threadIdx.x % kLanes);
  return pattern == kRandomBins ? bin : 0;
}

__global__ void count(int32_t pattern, int32_t rounds, unsigned long long* total, long long* clocks) {
  __shared__ uint32_t counters[kBins * kLanes];
  for (uint32_t i = threadIdx.x; i < kBins * kLanes; i += blockDim.x) counters[i] = 0;
  uint32_t address[kCells];
  for (int i = 0; i < kCells; ++i) {
    const uint32_t number = (blockIdx.x * blockDim.x + threadIdx.x) * kCells + i;
    address[i] = static_cast<uint32_t>(__cvta_generic_to_shared(counters + cell(pattern, number)));
  }
  __syncthreads();
  const long long begin = clock64();
  for (int32_t round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < kCells; ++i) asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(address[i]) : "memory");
  }
  __syncthreads();
  const long long end = clock64();
  if (threadIdx.x == 0) clocks[blockIdx.x] = end - begin;
  unsigned long long sum = 0;
  for (uint32_t i = threadIdx.x; i < kBins * kLanes; i += blockDim.x) sum += counters[i];
  atomicAdd(total, sum);
}

}  // namespace

// Launches `blocks` blocks of `threads` threads that add `rounds` times 16 counts each. `total` [1] grows by all counts;
// `clocks` [blocks] gets the clocks that each block took. Returns a CUDA error, 0 if there was none.
extern "C" int32_t count_in_shared_memory(int32_t pattern, int32_t blocks, int32_t threads, int32_t rounds, void* total,
                                          void* clocks, void* stream) {
  count<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(
      pattern, rounds, static_cast<unsigned long long*>(total), static_cast<long long*>(clocks));
  return static_cast<int32_t>(cudaGetLastError());
}

extern "C" int32_t counts_per_round() { return kCells; }
