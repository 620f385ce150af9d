// How a call is cut into the blocks of CUDA launches. Plain C++, so that the tests can plan as the CUDA half does.
//
// All values that share a row of the results, its target, are spread over one or more blocks. There are two layouts:
//
// - columns: the targets' values are neighbours in memory (a histogram per channel of activations [N, C]). A block has
//   a tile of `width` channels and its counters in shared memory as [counter][channel];
// - lanes: a block has values of one target only. Its counters are [counter][lane], each lane adds to its own column.
//
// In both, a warp's lanes stand in `width` neighbouring columns, so that with 32 of them no two atomics of a warp meet
// in one bank. Where that many columns do not fit into shared memory there are 16, 8, 4, 2 or 1; where not even one
// does, bins are counted in device memory and only the `Outside` counters in shared memory.
//
// Threads read 16 bytes at a time. Along a line those are values of one target. Of a tile's row they belong to several
// channels, while a lane counts one: each warp copies its next rows to a stage in shared memory, 16 bytes by each lane
// and without registers, up to kMaxStages ahead of what it counts. With three stages and 1024 threads a multiprocessor
// has 64 to 96 KiB on their way; 256 bins in 32 columns leave room for that on compute capability 9.0, for two stages
// on others. Behind a table that leaves no room, in tiles of less than 16 bytes a row, and where rows are not aligned,
// lanes read their channels' values one by one.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <tuple>
#include <vector>

#include "binning_fixed.h"
#include "problem.h"

namespace lambda_kernels {

enum class Layout : int32_t { kColumns, kLanes };

constexpr int32_t kWarp = 32;
constexpr int32_t kMaxTasks = 24;                   // of a launch; they travel in the kernel's parameters
constexpr int32_t kRowsBesideBins = kOutsideCount + 1;  // of a table; the last one is for what is not to be counted
constexpr int32_t kBytesPerItem = 16;               // what a thread reads at once …
constexpr int32_t kItemsPerBatch = 2;               // … and how many of them before it counts
constexpr int32_t kMaxStages = 3;                   // batches on their way to shared memory
constexpr int64_t kMaxItems = int64_t{1} << 27;     // of a block: counters in shared memory are 32 bits wide
constexpr int64_t kBeyondBlock = kMaxItems + 4096;  // more items or lines than the walk of a thread can pass
constexpr int32_t kThreads = 512;                   // of a block
constexpr int32_t kMaxThreads = 1024;               // of a block with a large table
constexpr int32_t kMultiprocessorThreads = 1024;    // that the registers of a multiprocessor are enough for
constexpr int64_t kSharedUnasked = 48 * 1024;       // bytes of shared memory that any block can have
constexpr int64_t kReservedShared = 1024;           // bytes of it that CUDA itself takes for each block

// Bytes of shared memory that a stage of all warps of a block takes.
LAMBDA_KERNELS_HOST_DEVICE constexpr int32_t stage_bytes(int32_t threads) {
  return threads * kItemsPerBatch * kBytesPerItem;
}

// What the plan needs to know of a GPU.
struct Device {
  int32_t multiprocessors;
  int64_t shared_of_block;           // the most that a block can ask for, in bytes
  int64_t shared_of_multiprocessor;  // in bytes
};

// A tensor, as the blocks walk through it. In the layout of lanes a line is made of items of kBytesPerItem, of which a
// thread reads one at a time. In that of columns a line is a row of the tile, and an item all of it, which several
// threads side by side read: kBytesPerItem each, or one value each where the task is not `vector`. The lines of a unit
// (a tile of columns, or a target) have two dimensions, `outer` ones of `lines` each. Strides are in bytes.
struct Task {
  const char* data;
  int64_t unit_stride, outer_stride, line_stride, element_stride;
  int64_t lines;           // of each outer index
  int64_t items_per_line;  // 1 in the layout of columns
  int64_t length;          // elements of a line; in the layout of columns that is the number of channels
  int64_t items;           // of a unit
  int64_t items_per_part;  // of a block
  int64_t units, target, first_partial;
  // From an item of a thread to its next one: bytes, items of a line and lines; and what is added where the end of a
  // line or of an outer index is passed.
  int64_t pointer_step, line_jump, outer_jump;
  int32_t item_step, line_step, items_again, lines_again;
  int32_t first_block, width;
  // 2^these many threads stand side by side in a tile's row when they count and when they read; 0 in that of lanes.
  int16_t abreast_bits, reading_bits;
  bool vector;             // 16 bytes are aligned and contiguous; in the layout of columns also: there are stages
  bool flat;               // all items are evenly spaced: a single line, or lines of one item and one outer index

  LAMBDA_KERNELS_HOST_DEVICE int64_t parts() const { return (items + items_per_part - 1) / items_per_part; }
};

// The parameters of one launch.
struct Launch {
  const ChannelGrid* grid;
  const bool* only;
  int64_t* counts;
  int64_t* outside;
  Moments* partials;  // [targets of a unit] for each block: null if no moments are wanted
  FixedPoint point;
  int32_t bins, table_bins;  // table_bins: 0 where bins are counted in device memory
  int32_t task_count, blocks, threads;
  int32_t stages, first_stage;  // how many each warp has, and where in shared memory the first one begins, in bytes
  Layout layout;
  int64_t shared_bytes, partial_count, targets;
  Task tasks[kMaxTasks];
};
static_assert(sizeof(Launch) + sizeof(Moments*) <= 4096, "kernel parameters take at most 4 KiB on all architectures");

// What is to be planned, apart from the tensors.
struct Wanted {
  Per per;
  int32_t bins;
  bool moments;
  int32_t element_bytes;
};

namespace planning {

// Bytes of shared memory through which the moments of a block's threads are added up: half of them hand theirs over.
inline int64_t moments_bytes(int32_t threads) {
  return threads / 2 * 4 * int64_t{sizeof(double)};
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// A dimension of a unit; stride in bytes.
struct Dimension {
  int64_t size, stride;
};

// The dimensions from the largest stride to the smallest, those that are one in memory put together.
inline std::vector<Dimension> collapsed(std::vector<Dimension> dimensions) {
  std::stable_sort(dimensions.begin(), dimensions.end(),
                   [](const Dimension& a, const Dimension& b) { return a.stride > b.stride; });
  std::vector<Dimension> result;
  for (const Dimension& dimension : dimensions) {
    if (dimension.size == 1) {
      continue;
    }
    if (!result.empty() && result.back().stride == dimension.size * dimension.stride) {
      result.back() = {result.back().size * dimension.size, dimension.stride};
    } else {
      result.push_back(dimension);
    }
  }
  return result;
}

inline bool divides(int64_t bytes, std::initializer_list<int64_t> numbers) {
  return std::all_of(numbers.begin(), numbers.end(), [bytes](int64_t number) { return number % bytes == 0; });
}

inline Layout layout_of(const Source& x, Per per) {
  const bool neighbours = x.columns > 1 && (x.column_stride <= x.row_stride || x.rows == 1);
  return per == kPerChannel && neighbours ? Layout::kColumns : Layout::kLanes;
}

// The task without its parts; `width` columns in shared memory.
inline Task task_of(const Source& x, const Wanted& wanted, int32_t width) {
  const int64_t bytes = wanted.element_bytes;
  const Dimension outer{x.outer, x.outer_stride * bytes};
  const Dimension rows{x.rows, x.row_stride * bytes};
  const Dimension columns{x.columns, x.column_stride * bytes};
  const auto address = static_cast<int64_t>(reinterpret_cast<intptr_t>(x.data));
  Task task{};
  task.data = static_cast<const char*>(x.data);
  task.target = x.target;
  task.width = width;
  std::vector<Dimension> dimensions;
  if (layout_of(x, wanted.per) == Layout::kColumns) {
    dimensions = collapsed({outer, rows});
    dimensions.insert(dimensions.begin(), 2 - dimensions.size(), Dimension{1, 0});
    task.units = ceil_div(x.columns, width);
    task.unit_stride = width * columns.stride;
    task.element_stride = columns.stride;
    task.length = x.columns;
    task.items_per_line = 1;
  } else {
    switch (wanted.per) {
      case kPerChannel:
        dimensions = collapsed({outer, rows});
        task.units = columns.size;
        task.unit_stride = columns.stride;
        break;
      case kPerSample:
        dimensions = collapsed({rows, columns});
        task.units = outer.size;
        task.unit_stride = outer.stride;
        break;
      default:
        dimensions = collapsed({outer, rows, columns});
        task.units = 1;
    }
    dimensions.insert(dimensions.begin(), 3 - dimensions.size(), Dimension{1, 0});
    task.length = dimensions[2].size;
    task.element_stride = dimensions[2].stride;
    task.items_per_line = ceil_div(task.length, kBytesPerItem / bytes);
  }
  task.outer_stride = dimensions[0].stride;
  task.lines = dimensions[1].size;
  task.line_stride = dimensions[1].stride;
  task.items = dimensions[0].size * task.lines * task.items_per_line;
  task.vector = task.element_stride == bytes &&
                divides(kBytesPerItem, {address, task.outer_stride, task.line_stride}) &&
                (task.units == 1 || divides(kBytesPerItem, {task.unit_stride}));
  if (layout_of(x, wanted.per) == Layout::kColumns) {
    task.vector = task.vector && divides(kBytesPerItem, {width * bytes, task.length * bytes});
  }
  task.flat = dimensions[0].size == 1 && (task.lines == 1 || task.items_per_line == 1);
  return task;
}

// The widest table that fits, and that is not much larger than what is counted in it. 0: none.
inline int32_t width_of(const std::vector<Source>& sources, const Wanted& wanted, Layout layout, int64_t shared) {
  const int64_t column_bytes = (wanted.bins + kRowsBesideBins) * int64_t{sizeof(uint32_t)};
  int64_t columns = 1, values = 0;
  for (const Source& x : sources) {
    columns = std::max(columns, layout == Layout::kColumns ? x.columns : int64_t{kWarp});
    values = std::max(values, x.values_per_target(wanted.per));
  }
  int32_t width = kWarp;
  while (width > 1 && (width * column_bytes > shared || width / 2 >= columns)) {
    width /= 2;
  }
  if (width * column_bytes > shared) {
    return 0;
  }
  // Per lane: clearing and adding up columns that stay almost empty takes longer than their collisions.
  while (layout == Layout::kLanes && width > 4 && width * column_bytes > values * int64_t{sizeof(uint32_t)}) {
    width /= 2;
  }
  return width;
}

// Whether the threads of a tile read 16 bytes each, and how many stand side by side in its rows.
inline void place_threads(Task& task, const Launch& launch, int32_t element_bytes) {
  if (launch.layout == Layout::kLanes) {
    return;
  }
  const auto bits_of = [](int32_t count) {
    int16_t bits = 0;
    while (2 << bits <= count) {
      ++bits;
    }
    return bits;
  };
  task.vector = task.vector && launch.stages > 0;
  task.abreast_bits = bits_of(task.width);
  task.reading_bits = task.vector ? bits_of(task.width * element_bytes / kBytesPerItem) : task.abreast_bits;
}

// Values in one item.
inline int64_t values_per_item(const Task& task, const Wanted& wanted, Layout layout) {
  return layout == Layout::kColumns ? std::min<int64_t>(task.width, task.length)
                                    : kBytesPerItem / wanted.element_bytes;
}

// Into how many parts each unit goes, so that few multiprocessors wait for the last blocks and few tables are cleared
// and added up: of up to sixteen sizes of a block, the one with the earliest end.
inline void divide(Launch& launch, const Wanted& wanted, int64_t resident) {
  const int64_t cleared = std::max<int64_t>(launch.first_stage, wanted.moments ? moments_bytes(launch.threads) : 0);
  const int64_t overhead = 3 * cleared / int64_t{sizeof(uint32_t)};  // in values that are read
  int64_t total = 0;
  for (int32_t i = 0; i < launch.task_count; ++i) {
    const Task& task = launch.tasks[i];
    total += task.units * task.items * values_per_item(task, wanted, launch.layout);
  }
  int64_t best_cost = INT64_MAX, best_size = 0;
  const auto parts_of = [&](const Task& task, int64_t size) {
    const int64_t values = values_per_item(task, wanted, launch.layout);
    const int64_t parts = std::max(ceil_div(task.items * values, size), ceil_div(task.items, kMaxItems));
    return std::min(parts, task.items);
  };
  for (int64_t waves = 1; waves <= 16; ++waves) {
    const int64_t size = std::max(ceil_div(total, resident * waves), overhead);
    int64_t blocks = 0, largest = 0;
    for (int32_t i = 0; i < launch.task_count; ++i) {
      const Task& task = launch.tasks[i];
      const int64_t parts = parts_of(task, size);
      blocks += task.units * parts;
      largest = std::max(largest, ceil_div(task.items, parts) * values_per_item(task, wanted, launch.layout));
    }
    const int64_t cost = ceil_div(blocks, resident) * (largest + overhead);
    if (cost < best_cost) {
      best_cost = cost;
      best_size = size;
    }
  }
  int64_t blocks = 0;
  for (int32_t i = 0; i < launch.task_count; ++i) {
    Task& task = launch.tasks[i];
    const int64_t step = launch.threads >> task.reading_bits;
    task.items_per_part = ceil_div(task.items, parts_of(task, best_size));
    const int64_t line_step = step / task.items_per_line;
    task.item_step = static_cast<int32_t>(step % task.items_per_line);
    task.line_step = static_cast<int32_t>(line_step % task.lines);
    const int64_t item_bytes = task.element_stride * (kBytesPerItem / wanted.element_bytes);
    task.pointer_step = task.item_step * item_bytes + task.line_step * task.line_stride +
                        line_step / task.lines * task.outer_stride;
    task.line_jump = task.line_stride - task.items_per_line * item_bytes;
    task.outer_jump = task.outer_stride - task.lines * task.line_stride;
    task.items_again = static_cast<int32_t>(std::min(task.items_per_line, kBeyondBlock));
    task.lines_again = static_cast<int32_t>(std::min(task.lines, kBeyondBlock));
    task.first_block = static_cast<int32_t>(std::min<int64_t>(blocks, INT32_MAX));
    task.first_partial = launch.partial_count;
    const int64_t part_blocks = task.units * task.parts();
    blocks += part_blocks;
    launch.partial_count += part_blocks * (launch.layout == Layout::kColumns ? task.width : 1);
    launch.targets += launch.layout == Layout::kColumns ? task.length : task.units;
  }
  launch.blocks = static_cast<int32_t>(std::min<int64_t>(blocks, INT32_MAX));  // that many are refused by CUDA
}

// Chooses the threads of a block and their stages: as many threads on a multiprocessor as there can be, then two
// stages, then small blocks, then a third stage. More threads share a table where few tables fit beside each other.
// Returns how many blocks a multiprocessor has at a time.
inline int64_t size_blocks(Launch& launch, const Wanted& wanted, const Device& device, int64_t table_bytes,
                           int32_t most_stages, int32_t multiprocessor_threads) {
  using Worth = std::tuple<int64_t, int32_t, int32_t, int32_t>;
  Worth most{};
  int64_t blocks = 1;
  launch.first_stage = static_cast<int32_t>(ceil_div(table_bytes, kBytesPerItem) * kBytesPerItem);
  for (const int32_t threads : {kThreads, kMaxThreads}) {
    for (int32_t stages = 0; stages <= most_stages; ++stages) {
      const int64_t staged = stages == 0 ? 0 : launch.first_stage + stages * stage_bytes(threads);
      const int64_t bytes = std::max({table_bytes, staged, wanted.moments ? moments_bytes(threads) : 0});
      const int64_t fit = std::min(device.shared_of_multiprocessor / (bytes + kReservedShared),
                                   int64_t{multiprocessor_threads / threads});
      const int64_t resident = std::max<int64_t>(fit, 1);
      const Worth worth{resident * threads, std::min(stages, 2), -threads, stages};
      if (bytes <= device.shared_of_block && worth > most) {
        most = worth;
        blocks = resident;
        launch.threads = threads;
        launch.stages = stages;
        launch.shared_bytes = bytes;
      }
    }
  }
  return blocks;
}

}  // namespace planning

// The launches for all tensors. `multiprocessor_threads`: how many threads of the kernels a multiprocessor can hold.
inline std::vector<Launch> plan(const std::vector<Source>& sources, const Wanted& wanted, const Device& device,
                                int32_t multiprocessor_threads) {
  std::vector<Launch> launches;
  for (const Layout layout : {Layout::kColumns, Layout::kLanes}) {
    std::vector<Source> all;
    std::copy_if(sources.begin(), sources.end(), std::back_inserter(all),
                 [&](const Source& x) { return planning::layout_of(x, wanted.per) == layout; });
    for (size_t begin = 0; begin < all.size(); begin += kMaxTasks) {
      const std::vector<Source> some(all.begin() + begin, all.begin() + std::min(begin + kMaxTasks, all.size()));
      Launch launch{};
      launch.layout = layout;
      launch.bins = launch.table_bins = wanted.bins;
      launch.point = fixed_point(wanted.bins);
      int32_t width = planning::width_of(some, wanted, layout, device.shared_of_block);
      if (width == 0) {
        launch.table_bins = 0;
        launch.point.limit = 0;
        Wanted outside_only = wanted;
        outside_only.bins = 0;
        width = planning::width_of(some, outside_only, layout, device.shared_of_block);
      }
      const int64_t table_bytes = (launch.table_bins + kRowsBesideBins) * width * int64_t{sizeof(uint32_t)};
      bool vector = false;
      for (const Source& x : some) {
        const Task task = planning::task_of(x, wanted, width);
        vector = vector || task.vector;
        launch.tasks[launch.task_count++] = task;
      }
      const int64_t resident =
          planning::size_blocks(launch, wanted, device, table_bytes,
                                layout == Layout::kColumns && vector ? kMaxStages : 0, multiprocessor_threads);
      for (int32_t i = 0; i < launch.task_count; ++i) {
        planning::place_threads(launch.tasks[i], launch, wanted.element_bytes);
      }
      planning::divide(launch, wanted, device.multiprocessors * resident);
      launches.push_back(launch);
    }
  }
  return launches;
}

}  // namespace lambda_kernels
