// CUDA half of lambda_kernels::histogram: one read of all tensors for counts, what is outside, and moments.
//
// histogram_plan.h cuts the call into launches and blocks, histogram_phases.h says what a block does between its
// barriers. Here are the kernels around the phases and what is needed to launch them on PyTorch's stream: nothing waits
// for the device, and scratch memory comes from PyTorch, so that a CUDA graph can hold all of it.

#include <map>
#include <mutex>

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "histogram.h"
#include "histogram_phases.h"

namespace lambda_kernels {
namespace {

#define LAMBDA_KERNELS_CUDA_CHECK(call)                                                                    \
  do {                                                                                                     \
    const cudaError_t status = (call);                                                                     \
    STD_TORCH_CHECK(status == cudaSuccess, "histogram: ", #call, " failed: ", cudaGetErrorString(status)); \
  } while (false)

// The stream that PyTorch launches on. libtorch_cuda is looked up among the libraries already loaded instead of being
// linked, so that this library also loads beside a CPU-only PyTorch, where no tensor can ever lead here.
cudaStream_t current_stream(int32_t device_index) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get_stream = [] {
    void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<GetStream>(torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(get_stream != nullptr,
                  "histogram: x is on a GPU, but libtorch_cuda.so, which knows the current stream, is not loaded");
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream(device_index, &stream) == AOTI_TORCH_SUCCESS,
                  "histogram: PyTorch names no current stream for device ", device_index);
  return static_cast<cudaStream_t>(stream);
}

int32_t attribute_of(cudaDeviceAttr attribute, int32_t device_index) {
  int value = 0;
  LAMBDA_KERNELS_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device_index));
  return value;
}

Device device_of(int32_t device_index) {
  static std::mutex lock;
  static std::map<int32_t, Device> known;
  const std::lock_guard<std::mutex> guard(lock);
  const auto found = known.find(device_index);
  if (found != known.end()) {
    return found->second;
  }
  const Device device{attribute_of(cudaDevAttrMultiProcessorCount, device_index),
                      attribute_of(cudaDevAttrMaxSharedMemoryPerBlockOptin, device_index),
                      attribute_of(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device_index)};
  known.emplace(device_index, device);
  return device;
}

extern __shared__ __align__(kBytesPerItem) uint32_t shared_words[];

#if defined(__CUDA_ARCH__)
__device__ inline uint32_t shared_address(int32_t bytes) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_words)) + bytes;
}
#endif

// A thread's way to memory.
struct Memory {
  LAMBDA_KERNELS_HOST_DEVICE void load(const char* from, uint32_t* words) const {
#if defined(__CUDA_ARCH__)
    const uint4 vector = __ldg(reinterpret_cast<const uint4*>(from));
    words[0] = vector.x;
    words[1] = vector.y;
    words[2] = vector.z;
    words[3] = vector.w;
#endif
  }
  template <int kWords>
  LAMBDA_KERNELS_HOST_DEVICE void load_element(const char* from, uint32_t* words) const {
#if defined(__CUDA_ARCH__)
    if constexpr (kWords == 2) {
      const uint2 vector = __ldg(reinterpret_cast<const uint2*>(from));
      words[0] = vector.x;
      words[1] = vector.y;
    } else {
      words[0] = __ldg(reinterpret_cast<const uint32_t*>(from));
    }
#endif
  }
  LAMBDA_KERNELS_HOST_DEVICE uint16_t load_short(const char* from) const {
#if defined(__CUDA_ARCH__)
    return __ldg(reinterpret_cast<const uint16_t*>(from));
#else
    return 0;
#endif
  }

  // The same value, which the compiler keeps in a register instead of working it out anew for every value or batch.
  template <typename Value>
  LAMBDA_KERNELS_HOST_DEVICE Value kept(Value value) const {
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(value));
#endif
    return value;
  }

  // Where a byte of shared memory is, whose addresses have 32 bits.
  LAMBDA_KERNELS_HOST_DEVICE uint32_t address(int32_t byte) const {
#if defined(__CUDA_ARCH__)
    return kept(shared_address(byte));
#else
    return byte;
#endif
  }

  // Has 16 bytes copied to shared memory. They go there without registers, and past the first cache, from compute
  // capability 8.0 on. `commit` ends a group of copies; `wait` returns when all but the `pending` latest groups of
  // this thread have arrived. Other lanes see them after a barrier.
  LAMBDA_KERNELS_HOST_DEVICE void copy(uint32_t to, const char* from) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#elif defined(__CUDA_ARCH__)
    const uint4 vector = __ldg(reinterpret_cast<const uint4*>(from));
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(vector.x), "r"(vector.y), "r"(vector.z),
                 "r"(vector.w) : "memory");
#endif
  }
  LAMBDA_KERNELS_HOST_DEVICE void commit() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }
  LAMBDA_KERNELS_HOST_DEVICE void wait(int32_t pending) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    static_assert(kMaxStages == 3, "the instruction takes a constant: one for each number of stages");
    if (pending >= 2) {
      asm volatile("cp.async.wait_group 2;" ::: "memory");
    } else if (pending == 1) {
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
#endif
  }
  template <int kBytes>
  LAMBDA_KERNELS_HOST_DEVICE void take(uint32_t from, uint32_t* words) const {
#if defined(__CUDA_ARCH__)
    if constexpr (kBytes == 2) {
      uint16_t bits;
      asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(from) : "memory");
      words[0] = bits;
    } else if constexpr (kBytes == 4) {
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(from) : "memory");
    } else {
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(from) : "memory");
    }
#endif
  }

  // Where a column of the table of counters begins, and how many bytes are between rows.
  LAMBDA_KERNELS_HOST_DEVICE uint32_t column(int32_t column) const { return address(4 * column); }
  LAMBDA_KERNELS_HOST_DEVICE uint32_t stride(int32_t width) const { return kept(4 * width); }
  LAMBDA_KERNELS_HOST_DEVICE void count(bool, uint32_t column, int32_t row, uint32_t stride) const {
#if defined(__CUDA_ARCH__)
    asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(column + row * stride) : "memory");
#endif
  }
  LAMBDA_KERNELS_HOST_DEVICE void count_rest(uint32_t column, int32_t row, uint32_t stride) const {
    count(true, column, row, stride);
  }
  LAMBDA_KERNELS_HOST_DEVICE void add(int64_t* counter, uint32_t count) const {
#if defined(__CUDA_ARCH__)
    // The 64-bit type that atomicAdd takes; same bits as int64 for sums of ones.
    atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(count));
#endif
  }

#if defined(__CUDA_ARCH__)
  __device__ void set_counter(int32_t cell, uint32_t value) const { shared_words[cell] = value; }
  __device__ uint32_t counter(int32_t cell) const { return shared_words[cell]; }
  __device__ void set_double(int32_t slot, double value) const {
    reinterpret_cast<double*>(shared_words)[slot] = value;
  }
  __device__ double get_double(int32_t slot) const { return reinterpret_cast<double*>(shared_words)[slot]; }
#else
  void set_counter(int32_t, uint32_t) const {}
  uint32_t counter(int32_t) const { return 0; }
  void set_double(int32_t, double) const {}
  double get_double(int32_t) const { return 0.0; }
#endif
};

// A thread's part in the phases of its block.
template <typename Kernel>
struct Block {
  typename Kernel::State state;
  Memory memory;

  template <typename Phase>
  LAMBDA_KERNELS_HOST_DEVICE void each(Phase phase) {
#if defined(__CUDA_ARCH__)
    phase(static_cast<int32_t>(threadIdx.x), memory, state);
    __syncthreads();
#endif
  }

  struct Warp {
    Block& block;

    template <typename Phase>
    LAMBDA_KERNELS_HOST_DEVICE void each(Phase phase) {
#if defined(__CUDA_ARCH__)
      phase(static_cast<int32_t>(threadIdx.x), block.memory, block.state);
      __syncwarp();
#endif
    }
  };

  template <typename Phases>
  LAMBDA_KERNELS_HOST_DEVICE void each_warp(Phases phases) {
#if defined(__CUDA_ARCH__)
    Warp warp{*this};
    phases(static_cast<int32_t>(threadIdx.x & ~(kWarp - 1u)), warp);
    __syncthreads();
#endif
  }
};

// At most 64 registers, so that 1024 threads have room.
template <typename Kernel>
__global__ void __launch_bounds__(kMaxThreads) histogram_kernel(const __grid_constant__ Launch launch) {
  Block<Kernel> block;
  run_block<Kernel>(launch, static_cast<int32_t>(blockIdx.x), block);
}

// A warp for each target: all its blocks' moments, in an order that depends on nothing but the plan.
__global__ void __launch_bounds__(MergedMoments::kThreads)
    merge_kernel(const __grid_constant__ Launch launch, Moments* __restrict__ moments) {
  __shared__ double totals[MergedMoments::kThreads][kMomentsColumns];
  const auto lane = static_cast<int32_t>(threadIdx.x % kWarp);
  const int64_t index = blockIdx.x * int64_t{MergedMoments::kThreads / kWarp} + threadIdx.x / kWarp;
  Moments total = MergedMoments::gather(launch, index, lane);
  for (int32_t half = kWarp / 2; half > 0; half /= 2) {
    memcpy(totals[threadIdx.x], &total, sizeof total);
    __syncthreads();
    if (lane < half) {
      Moments other;
      memcpy(&other, totals[threadIdx.x + half], sizeof other);
      merge(total, other);
    }
    __syncthreads();
  }
  if (lane == 0) {
    MergedMoments::write(launch, index, total, moments);
  }
}

// The moments of no values, for the targets of tensors without any.
__global__ void empty_moments_kernel(Moments* moments, int64_t targets) {
  const int64_t target = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (target < targets) {
    moments[target] = Moments{};
  }
}

unsigned int blocks_for(int64_t items, int64_t of_a_block) {
  const int64_t blocks = (items + of_a_block - 1) / of_a_block;
  STD_TORCH_CHECK(blocks < INT32_MAX, "histogram: x has more rows of results than one launch can fill; split it");
  return static_cast<unsigned int>(blocks);
}

template <typename Kernel>
void start(const Launch& launch, const Device& device, cudaStream_t stream) {
  if (launch.shared_bytes > kSharedUnasked) {
    // Always the same limit, since another thread may be between this line and its launch.
    LAMBDA_KERNELS_CUDA_CHECK(cudaFuncSetAttribute(histogram_kernel<Kernel>,
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(device.shared_of_block)));
  }
  histogram_kernel<Kernel><<<launch.blocks, launch.threads, launch.shared_bytes, stream>>>(launch);
  LAMBDA_KERNELS_CUDA_CHECK(cudaGetLastError());
}

template <typename Element>
void run(const Call& call, const Tensor& x, int32_t device_index, cudaStream_t stream) {
  const Wanted wanted{call.per, call.bins, call.moments != nullptr, static_cast<int32_t>(sizeof(Element))};
  const Device device = device_of(device_index);
  std::vector<Launch> launches = plan(call.sources, wanted, device, kMultiprocessorThreads);
  int64_t filled = 0;
  for (const Launch& launch : launches) {
    filled += launch.targets;
  }
  if (wanted.moments && filled < call.targets) {
    empty_moments_kernel<<<blocks_for(call.targets, 256), 256, 0, stream>>>(call.moments, call.targets);
    LAMBDA_KERNELS_CUDA_CHECK(cudaGetLastError());
  }
  for (Launch& launch : launches) {
    STD_TORCH_CHECK(launch.blocks < INT32_MAX,
                    "histogram: x needs more thread blocks than one launch can have; split it");
    launch.grid = call.grid;
    launch.only = call.only;
    launch.counts = call.counts;
    launch.outside = call.outside;
    // Scratch may be handed on when this function returns: whoever gets it uses it later on the same stream.
    const Tensor scratch = torch::stable::new_empty(
        x, {wanted.moments ? launch.partial_count : 0, kMomentsColumns}, ScalarType::Double);
    launch.partials = wanted.moments ? static_cast<Moments*>(scratch.data_ptr()) : nullptr;
    with_kernel<Element>(launch, [&](auto kernel) { start<decltype(kernel)>(launch, device, stream); });
    if (wanted.moments) {
      constexpr int kTargets = MergedMoments::kThreads / kWarp;
      merge_kernel<<<blocks_for(launch.targets, kTargets), MergedMoments::kThreads, 0, stream>>>(launch, call.moments);
      LAMBDA_KERNELS_CUDA_CHECK(cudaGetLastError());
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> histogram_cuda(std::vector<Tensor> x, std::optional<Tensor> grid, int64_t bins,
                                                  int64_t per, bool statistics, std::optional<Tensor> only) {
  STD_TORCH_CHECK(!x.empty(), "histogram: x must hold at least one tensor");
  const int32_t device_index = x[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard device_guard(device_index);
  Call call = prepare(x, grid, bins, per, statistics, only);
  if (call.targets > 0) {
    // The CUDA runtime linked into this library keeps a current device of its own beside PyTorch's.
    LAMBDA_KERNELS_CUDA_CHECK(cudaSetDevice(device_index));
    const cudaStream_t stream = current_stream(device_index);
    switch (call.dtype) {
      case ScalarType::Float:
        run<float>(call, x[0], device_index, stream);
        break;
      case ScalarType::BFloat16:
        run<BFloat16>(call, x[0], device_index, stream);
        break;
      case ScalarType::Half:
        run<Half>(call, x[0], device_index, stream);
        break;
      default:
        run<double>(call, x[0], device_index, stream);
    }
  }
  return std::move(call.results);
}

}  // namespace
}  // namespace lambda_kernels

STABLE_TORCH_LIBRARY_IMPL(lambda_kernels, CUDA, library) {
  library.impl("histogram", TORCH_BOX(&lambda_kernels::histogram_cuda));
}
