// CUDA half of lambda_kernels::histogram.
//
// A block counts some rows of a tile of columns. Where the columns are neighbours in memory (activations [N, C]) the
// tile is one warp wide and its counters stand in shared memory as [counter][lane]: a lane touches its own bank only,
// so no two atomics of a warp collide. Where the rows are neighbours the tile is one column. Tables too large for
// shared memory count in device memory. All counters are integers, so the result does not depend on the order.

#include <algorithm>

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "histogram.h"

namespace lambda_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kSharedBytes = 48 * 1024;         // what every architecture gives a block unasked
constexpr int64_t kTargetBlocks = 1024;             // all that the largest devices run at once
constexpr int64_t kMinRowsPerThread = 16;           // fewer would not repay clearing and adding up the table
constexpr int64_t kMaxRowsPerBlock = int64_t{1} << 30;  // a shared counter is 32 bits wide

using Counter = unsigned long long;  // the 64-bit type that atomicAdd takes; same bits as int64 for sums of ones

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

// Grid: (row blocks) × (column tiles), flattened with the row blocks innermost. Block: kThreads threads, of which
// `tile_columns` (1 or kWarp) stand side by side in a row.
template <typename scalar_t, bool in_shared>
__global__ void __launch_bounds__(kThreads) count_kernel(
    Matrix<scalar_t> x,                          // [N, C]
    const ChannelGrid* __restrict__ grid,        // [C]
    Counter* __restrict__ counts,                // [C, bins]
    Counter* __restrict__ outside,               // [C, 5]
    int32_t bins, int32_t tile_columns, int64_t row_blocks, int64_t rows_per_block) {
  extern __shared__ unsigned int table[];  // [bins + 5, tile_columns]
  const int32_t counters = bins + kOutsideCount;
  const int32_t lane = threadIdx.x % tile_columns;
  const int64_t first_column = blockIdx.x / row_blocks * tile_columns;
  const int64_t row_begin = blockIdx.x % row_blocks * rows_per_block;
  const int64_t row_end = min(row_begin + rows_per_block, x.rows);
  const int64_t column = first_column + lane;

  if constexpr (in_shared) {
    for (int32_t i = threadIdx.x; i < counters * tile_columns; i += kThreads) {
      table[i] = 0;
    }
    __syncthreads();
  }
  if (column < x.columns) {
    const ChannelGrid channel = grid[column];
    const scalar_t* const values = x.data + column * x.column_stride;
    for (int64_t row = row_begin + threadIdx.x / tile_columns; row < row_end; row += kThreads / tile_columns) {
      const int32_t counter = counter_of(to_double(values[row * x.row_stride]), channel, bins);
      if constexpr (in_shared) {
        atomicAdd(&table[counter * tile_columns + lane], 1u);
      } else if (counter < bins) {
        atomicAdd(&counts[column * bins + counter], Counter{1});
      } else {
        atomicAdd(&outside[column * kOutsideCount + counter - bins], Counter{1});
      }
    }
  }
  if constexpr (in_shared) {
    __syncthreads();
    // Neighbouring threads add neighbouring bins of one column, which are neighbours in `counts`.
    for (int32_t i = threadIdx.x; i < counters * tile_columns; i += kThreads) {
      const int32_t counter = i % counters;
      const int32_t tile_column = i / counters;
      const unsigned int count = table[counter * tile_columns + tile_column];
      if (count == 0) {
        continue;
      }
      const int64_t target = first_column + tile_column;
      if (counter < bins) {
        atomicAdd(&counts[target * bins + counter], Counter{count});
      } else {
        atomicAdd(&outside[target * kOutsideCount + counter - bins], Counter{count});
      }
    }
  }
}

template <typename scalar_t>
void launch(const Matrix<scalar_t>& x, const ChannelGrid* grid, int32_t bins, Counter* counts, Counter* outside,
            cudaStream_t stream) {
  const int64_t column_bytes = (bins + kOutsideCount) * static_cast<int64_t>(sizeof(unsigned int));
  const bool columns_are_neighbours = x.columns > 1 && x.column_stride <= x.row_stride;
  const int32_t tile_columns = columns_are_neighbours ? kWarp : 1;
  const int64_t table_bytes = column_bytes * tile_columns;
  const bool in_shared = table_bytes <= kSharedBytes;

  const int64_t column_tiles = (x.columns + tile_columns - 1) / tile_columns;
  const int64_t min_rows = kMinRowsPerThread * kThreads / tile_columns;
  int64_t row_blocks = std::clamp<int64_t>(kTargetBlocks / column_tiles, 1, (x.rows + min_rows - 1) / min_rows);
  row_blocks = std::max(row_blocks, (x.rows + kMaxRowsPerBlock - 1) / kMaxRowsPerBlock);
  const int64_t rows_per_block = (x.rows + row_blocks - 1) / row_blocks;
  const int64_t blocks = column_tiles * row_blocks;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "histogram: x of shape [", x.rows, ", ", x.columns,
                  "] needs more thread blocks than one launch can have; split its columns");

  const auto kernel = in_shared ? count_kernel<scalar_t, true> : count_kernel<scalar_t, false>;
  kernel<<<static_cast<unsigned int>(blocks), kThreads, in_shared ? table_bytes : 0, stream>>>(
      x, grid, counts, outside, bins, tile_columns, row_blocks, rows_per_block);
  LAMBDA_KERNELS_CUDA_CHECK(cudaGetLastError());
}

std::tuple<Tensor, Tensor> histogram_cuda(const Tensor& x, const Tensor& grid, int64_t bins) {
  check_histogram_arguments(x, grid, bins);
  const int32_t device_index = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard device_guard(device_index);
  auto [counts, outside] = new_counters(x, bins);
  auto* const counts_data = static_cast<Counter*>(counts.data_ptr());
  auto* const outside_data = static_cast<Counter*>(outside.data_ptr());
  const auto* const channels = static_cast<const ChannelGrid*>(grid.data_ptr());
  with_scalar_type(x, [&](auto* type) {
    using scalar_t = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    if (x.numel() > 0) {
      // The CUDA runtime linked into this library keeps a current device of its own beside PyTorch's.
      LAMBDA_KERNELS_CUDA_CHECK(cudaSetDevice(device_index));
      launch(matrix_of<scalar_t>(x), channels, static_cast<int32_t>(bins), counts_data, outside_data,
             current_stream(device_index));
    }
  });
  return {counts, outside};
}

}  // namespace
}  // namespace lambda_kernels

STABLE_TORCH_LIBRARY_IMPL(lambda_kernels, CUDA, library) {
  library.impl("histogram", TORCH_BOX(&lambda_kernels::histogram_cuda));
}
