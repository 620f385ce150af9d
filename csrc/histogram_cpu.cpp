// CPU half of lambda_kernels::histogram.
//
// A task counts some rows of a tile of columns into a table of its own, small enough to stay in cache, and then adds
// the table to the result. With many columns a task takes all rows of its tile; with few, the rows are shared out, so
// that one long column keeps every thread busy. Integer sums do not depend on the order of the tasks.

#include <algorithm>
#include <mutex>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "histogram.h"

namespace lambda_kernels {
namespace {

constexpr int64_t kMaxTileColumns = 64;
constexpr int64_t kMinTileColumns = 16;          // a cache line of fp32
constexpr int64_t kTileCounters = 16 * 1024;     // 128 KiB of counters: fits the L2 of the CPUs of today
constexpr int64_t kElementsPerTask = 32 * 1024;  // less is not worth another thread

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// A rectangle of the input: rows [row_begin, row_end) of columns [column_begin, column_end).
struct Tile {
  int64_t row_begin, row_end;
  int64_t column_begin, column_end;
};

// Counts one tile into `table` [columns of the tile, bins + kOutsideCount].
template <typename scalar_t>
void count_tile(const Matrix<scalar_t>& x, const ChannelGrid* grid, int32_t bins, const Tile& tile, int64_t* table) {
  const int64_t counters = bins + kOutsideCount;
  const int64_t columns = tile.column_end - tile.column_begin;
  const scalar_t* const corner = x.data + tile.row_begin * x.row_stride + tile.column_begin * x.column_stride;
  const int64_t rows = tile.row_end - tile.row_begin;
  grid += tile.column_begin;
  // The inner loop runs along the smaller stride.
  if (columns > 1 && x.column_stride <= x.row_stride) {
    for (int64_t row = 0; row < rows; ++row) {
      const scalar_t* const values = corner + row * x.row_stride;
      for (int64_t column = 0; column < columns; ++column) {
        ++table[column * counters + counter_of(to_double(values[column * x.column_stride]), grid[column], bins)];
      }
    }
  } else {
    for (int64_t column = 0; column < columns; ++column) {
      const scalar_t* const values = corner + column * x.column_stride;
      const ChannelGrid channel = grid[column];
      int64_t* const counts = table + column * counters;
      for (int64_t row = 0; row < rows; ++row) {
        ++counts[counter_of(to_double(values[row * x.row_stride]), channel, bins)];
      }
    }
  }
}

template <typename scalar_t>
void count_all(const Matrix<scalar_t>& x, const ChannelGrid* grid, int32_t bins, int64_t* counts, int64_t* outside) {
  const int64_t counters = bins + kOutsideCount;
  const int64_t width =
      std::min(x.columns, std::clamp(kTileCounters / counters, kMinTileColumns, kMaxTileColumns));
  const int64_t column_tiles = ceil_div(x.columns, width);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t worthwhile_parts = ceil_div(x.rows * width, kElementsPerTask);
  const int64_t rows_per_part = ceil_div(x.rows, std::min({ceil_div(threads, column_tiles), worthwhile_parts, x.rows}));
  const int64_t row_parts = ceil_div(x.rows, rows_per_part);
  const int64_t tasks_per_thread = ceil_div(kElementsPerTask, rows_per_part * width);
  std::mutex result_lock;

  torch::stable::parallel_for(0, column_tiles * row_parts, tasks_per_thread, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> table(width * counters);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row_begin = task % row_parts * rows_per_part;
      const int64_t column_begin = task / row_parts * width;
      const Tile tile{row_begin, std::min(row_begin + rows_per_part, x.rows), column_begin,
                      std::min(column_begin + width, x.columns)};
      std::fill(table.begin(), table.end(), 0);
      count_tile(x, grid, bins, tile, table.data());

      const std::lock_guard<std::mutex> guard(result_lock);
      for (int64_t column = tile.column_begin; column < tile.column_end; ++column) {
        const int64_t* const source = table.data() + (column - tile.column_begin) * counters;
        for (int64_t bin = 0; bin < bins; ++bin) {
          counts[column * bins + bin] += source[bin];
        }
        for (int64_t kind = 0; kind < kOutsideCount; ++kind) {
          outside[column * kOutsideCount + kind] += source[bins + kind];
        }
      }
    }
  });
}

std::tuple<Tensor, Tensor> histogram_cpu(const Tensor& x, const Tensor& grid, int64_t bins) {
  check_histogram_arguments(x, grid, bins);
  auto [counts, outside] = new_counters(x, bins);
  auto* const counts_data = static_cast<int64_t*>(counts.data_ptr());
  auto* const outside_data = static_cast<int64_t*>(outside.data_ptr());
  const auto* const channels = static_cast<const ChannelGrid*>(grid.data_ptr());
  with_scalar_type(x, [&](auto* type) {
    using scalar_t = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    if (x.numel() > 0) {
      count_all(matrix_of<scalar_t>(x), channels, static_cast<int32_t>(bins), counts_data, outside_data);
    }
  });
  return {counts, outside};
}

}  // namespace
}  // namespace lambda_kernels

STABLE_TORCH_LIBRARY_IMPL(lambda_kernels, CPU, library) {
  library.impl("histogram", TORCH_BOX(&lambda_kernels::histogram_cpu));
}
