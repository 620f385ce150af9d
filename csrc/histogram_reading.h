// How the threads of a block find what they have to read, and read it.
#pragma once

#include <cmath>
#include <cstdint>

#include "histogram_values.h"

namespace lambda_kernels {

// A block's share: a part of a unit of a tensor.
struct Place {
  const Task* task;
  int64_t unit, first_item;
  int64_t target;       // of its first column
  int64_t first_partial;
  int32_t items;
  int32_t columns;      // targets of this block: 1 in the layout of lanes
};

// Whether any of the block's targets is to be counted.
LAMBDA_KERNELS_HOST_DEVICE inline bool is_wanted(const Launch& launch, const Place& place) {
  if (launch.only == nullptr) {
    return true;
  }
  bool any = false;
  for (int32_t column = 0; column < place.columns; ++column) {
    any = any || launch.only[place.target + column];
  }
  return any;
}

template <typename Element, Layout kLayout>
struct Reading {
  static constexpr bool kColumns = kLayout == Layout::kColumns;
  using Held = Words<Element>;
  using Value = typename Held::Value;

  static constexpr int kElements = kBytesPerItem / static_cast<int>(sizeof(Element));  // that a thread reads at once
  static constexpr int kItemWords = kBytesPerItem / 4;
  static constexpr int kBatch = kItemsPerBatch * kElements;  // values that a thread reads before it counts them
  static constexpr int kWords = kItemsPerBatch * kItemWords;

  static constexpr int kTogether = 4;  // values that are read at once where the shift is looked for

  // A thread's way through its items.
  struct Walk {
    const char* pointer;
    int32_t item;        // counted from the block's first
    int32_t items_left;  // of the line, this one included, …
    int32_t lines_left;  // … lines of the outer index; both capped, beyond what a block has
  };

  // Which block of which task this is.
  LAMBDA_KERNELS_HOST_DEVICE static Place locate(const Launch& launch, int32_t block) {
    int32_t index = 0;
    while (index + 1 < launch.task_count && launch.tasks[index + 1].first_block <= block) {
      ++index;
    }
    const Task& task = launch.tasks[index];
    const auto own = static_cast<uint32_t>(block - task.first_block);
    const auto units = static_cast<uint32_t>(task.units);
    // Neighbouring blocks read neighbouring tiles of the same rows.
    const uint32_t part = own / units;
    Place place;
    place.task = &task;
    place.unit = own % units;
    place.first_item = part * task.items_per_part;
    const int64_t items = task.items - place.first_item;
    place.items = static_cast<int32_t>(items < task.items_per_part ? items : task.items_per_part);
    const int64_t tile = kColumns ? task.width : 1;
    place.target = task.target + place.unit * tile;
    place.first_partial = task.first_partial + own * tile;
    const int64_t columns = kColumns ? task.length - place.unit * tile : 1;
    place.columns = static_cast<int32_t>(columns < tile ? columns : tile);
    return place;
  }

  // The row of threads that a thread stands in when it counts.
  LAMBDA_KERNELS_HOST_DEVICE static int32_t row_of(const Task& task, int32_t thread) {
    return thread >> task.abreast_bits;
  }

  // A thread's column of the table.
  LAMBDA_KERNELS_HOST_DEVICE static int32_t column_of(const Task& task, int32_t thread) {
    return thread & (task.width - 1);
  }

  // A thread's first item, and the first column that it reads of that one.
  LAMBDA_KERNELS_HOST_DEVICE static int32_t first_item_of(const Task& task, int32_t thread) {
    return thread >> task.reading_bits;
  }
  LAMBDA_KERNELS_HOST_DEVICE static int32_t first_column_of(const Task& task, int32_t thread) {
    const int32_t place = thread & ((1 << task.reading_bits) - 1);
    return kColumns ? place * (task.vector ? kElements : 1) : 0;
  }

  // From an item of a thread to its next one.
  LAMBDA_KERNELS_HOST_DEVICE static int32_t step_of(const Launch& launch, const Task& task) {
    return launch.threads >> task.reading_bits;
  }

  // Where an item of the block begins for a thread at `column` of the tile.
  LAMBDA_KERNELS_HOST_DEVICE static Walk walk_from(const Place& place, int32_t item, int32_t column) {
    const Task& task = *place.task;
    const int64_t index = place.first_item + item;
    const int64_t line = index / task.items_per_line;
    const int64_t item_of_line = index - line * task.items_per_line;
    const int64_t outer = line / task.lines;
    const int64_t line_of_outer = line - outer * task.lines;
    const int64_t items_left = task.items_per_line - item_of_line;
    const int64_t lines_left = task.lines - line_of_outer;
    const int64_t element = kColumns ? column : item_of_line * kElements;
    const int64_t offset = place.unit * task.unit_stride + outer * task.outer_stride +
                           line_of_outer * task.line_stride + element * task.element_stride;
    return {task.data + offset, item, static_cast<int32_t>(items_left < kBeyondBlock ? items_left : kBeyondBlock),
            static_cast<int32_t>(lines_left < kBeyondBlock ? lines_left : kBeyondBlock)};
  }

  // The thread's next item.
  LAMBDA_KERNELS_HOST_DEVICE static void advance(const Task& task, int32_t step, Walk& walk) {
    walk.item += step;
    walk.pointer += task.pointer_step;
    if (!kColumns) {
      walk.items_left -= task.item_step;
    }
    if (task.flat) {
      return;
    }
    walk.lines_left -= task.line_step;
    if (!kColumns && walk.items_left <= 0) {
      walk.items_left += task.items_again;
      walk.pointer += task.line_jump;
      --walk.lines_left;
    }
    if (walk.lines_left <= 0) {
      walk.lines_left += task.lines_again;
      walk.pointer += task.outer_jump;
    }
  }

  // How many elements of an item of a line there are.
  LAMBDA_KERNELS_HOST_DEVICE static int32_t elements_of(const Task& task, const Walk& walk) {
    const auto rest = static_cast<int32_t>(task.length % kElements);
    return walk.items_left == 1 && rest != 0 ? rest : kElements;
  }

  // Reads a value into words of its own.
  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static void load_value(const char* from, Memory& memory, uint32_t* words) {
    if constexpr (sizeof(Element) == 2) {
      words[0] = memory.load_short(from);
    } else {
      memory.template load_element<sizeof(Element) / 4>(from, words);
    }
  }

  // Puts a NaN where there is no value.
  LAMBDA_KERNELS_HOST_DEVICE static void no_value(uint32_t* words) {
#pragma unroll
    for (int word = 0; word < Held::kOne; ++word) {
      words[word] = 0x7fff7fffu;
    }
  }

  // The shift of a target: the median of three finite values of the block, so that an outlier among them does no harm;
  // of two the larger one, and 0 where there is none among 256. They are a quarter of the block apart: outliers come
  // together, as special tokens do at the beginning of an image. `first` is where the block's walk begins; from there,
  // values follow down the target's column or along the line.
  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static double shift_of(const Place& place, const Walk& first, int32_t column,
                                                    Memory& memory) {
    const Task& task = *place.task;
    const int64_t behind = kColumns ? 0 : (task.items_per_line - first.items_left) * kElements;
    const int64_t elements = kColumns ? first.lines_left : task.length - behind;
    const int64_t items = kColumns ? place.items : int64_t{place.items} * kElements;
    const int64_t count = elements < items ? elements : items;
    const int64_t stride = kColumns ? task.line_stride : task.element_stride;
    const int64_t apart = count < kTogether ? 1 : count / kTogether;
    const char* pointer = first.pointer + (kColumns ? column * task.element_stride : 0);
    Value low = 0, high = 0, median = 0;
    int32_t found = 0;
#pragma unroll 1
    for (int32_t index = 0; index < apart && index < 256 / kTogether && found < 3; ++index) {
      uint32_t ones[kTogether][Held::kOne];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {  // all before the first is looked at: one latency
        no_value(ones[i]);
        if (index + i * apart < count) {
          load_value(pointer + i * apart * stride, memory, ones[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const Value value = Held::value(ones[i], 0);
        if (finite(value) && found < 3) {
          median = found == 0 ? value : larger(low, smaller(high, value));
          low = found == 0 ? value : smaller(low, value);
          high = found == 0 ? value : larger(high, value);
          median = found == 1 ? high : median;
          ++found;
        }
      }
      pointer += stride;
    }
    return median;
  }

  // Reads an item of a line; NaN stands where there is nothing.
  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static void load_item(const Task& task, const char* pointer, int32_t elements,
                                                   Memory& memory, uint32_t* words) {
    if (task.vector && elements == kElements) {
      memory.load(pointer, words);
      return;
    }
#pragma unroll
    for (int element = 0; element < kElements; ++element) {
      uint32_t one[Held::kOne];
      no_value(one);
      if (element < elements) {
        load_value(pointer + element * task.element_stride, memory, one);
      }
      Held::put(one, words, element);
    }
  }

  // In the layout of columns each warp has stages of its own, one behind the other, of kItemsPerBatch times 512 bytes.
  // In 512 bytes rows of the tile follow each other as the lanes that read them do: 16 bytes by each. A lane takes
  // every 32nd value, which is always one of its own channel, and in a bank of its own.
  static constexpr int32_t kWarpItem = kWarp * kBytesPerItem;
  static constexpr int32_t kWarpStage = kItemsPerBatch * kWarpItem;

  // A thread's way through the stages of its warp.
  struct Staging {
    uint32_t copies_to, takes_from;  // in the first stage
    int32_t stage;                   // bytes from there to the oldest batch
    bool plain;                      // the thread copies something, and from evenly spaced places
  };

  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static Staging staging_of(const Launch& launch, const Place& place, int32_t thread,
                                                       Memory& memory) {
    const int32_t lane = thread % kWarp;
    const int32_t first = launch.first_stage + thread / kWarp * launch.stages * kWarpStage;
    return {memory.address(first + lane * kBytesPerItem),
            memory.address(first + lane * static_cast<int32_t>(sizeof(Element))), 0,
            place.task->flat && first_column_of(*place.task, thread) < place.columns};
  }

  // The stage behind the one at `stage`, after the last one the first.
  LAMBDA_KERNELS_HOST_DEVICE static int32_t next_stage(const Launch& launch, int32_t stage) {
    const int32_t next = stage + kWarpStage;
    return next < launch.stages * kWarpStage ? next : 0;
  }

  // How many items further the next batch is.
  LAMBDA_KERNELS_HOST_DEVICE static int32_t batch_step(const Launch& launch, const Task& task) {
    return (task.vector ? kItemsPerBatch : kBatch) * step_of(launch, task);
  }

  // A warp's batches are full, with a value for each lane at each time, where their first item is under this.
  LAMBDA_KERNELS_HOST_DEVICE static int32_t full_until(const Launch& launch, const Place& place) {
    const Task& task = *place.task;
    return place.items - (batch_step(launch, task) - step_of(launch, task) + ((kWarp - 1) >> task.reading_bits));
  }

  // Has the thread's part of the next batch copied to a stage.
  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static void copy(const Launch& launch, const Place& place, int32_t thread,
                                              const Staging& staging, int32_t stage, Walk& walk, Memory& memory) {
    const Task& task = *place.task;
    const int32_t step = step_of(launch, task);
    const uint32_t to = staging.copies_to + stage;
    if (staging.plain && walk.item + (kItemsPerBatch - 1) * step < place.items) {
#pragma unroll
      for (int item = 0; item < kItemsPerBatch; ++item) {
        memory.copy(to + item * kWarpItem, walk.pointer);
        walk.pointer += task.pointer_step;
      }
      walk.item += kItemsPerBatch * step;
    } else {
#pragma unroll 1
      for (int item = 0; item < kItemsPerBatch; ++item) {
        if (walk.item < place.items && first_column_of(task, thread) < place.columns) {
          memory.copy(to + item * kWarpItem, walk.pointer);
        }
        advance(task, step, walk);
      }
    }
    memory.commit();
  }

  // Reads the thread's values of a batch from the oldest stage. Returns a bit for each that there is.
  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static uint32_t take(const Launch& launch, const Place& place, int32_t item, bool full,
                                                  int32_t thread, const Staging& staging, Memory& memory,
                                                  uint32_t* words) {
    const uint32_t from = staging.takes_from + staging.stage;
    constexpr auto kStride = kWarp * static_cast<int32_t>(sizeof(Element));
    if (full) {
#pragma unroll
      for (int element = 0; element < kBatch; ++element) {
        uint32_t one[Held::kOne];
        memory.template take<sizeof(Element)>(from + element * kStride, one);
        Held::put(one, words, element);
      }
      return (1u << kBatch) - 1u;
    }
    const Task& task = *place.task;
    uint32_t present = 0;
#pragma unroll
    for (int element = 0; element < kBatch; ++element) {
      uint32_t one[Held::kOne];
      const int32_t row = (thread % kWarp + element % kElements * kWarp) >> task.abreast_bits;  // in the 512 bytes
      no_value(one);
      if (item + element / kElements * step_of(launch, task) + row < place.items) {
        memory.template take<sizeof(Element)>(from + element * kStride, one);
        present |= 1u << element;
      }
      Held::put(one, words, element);
    }
    return present;
  }

  // The same from where the thread's walk is.
  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static uint32_t take_directly(const Launch& launch, const Place& place, bool full,
                                                           Walk& walk, Memory& memory, uint32_t* words) {
    const Task& task = *place.task;
    const int32_t step = step_of(launch, task);
    if (task.flat && full) {
#pragma unroll
      for (int element = 0; element < kBatch; ++element) {
        uint32_t one[Held::kOne];
        load_value(walk.pointer + element * task.pointer_step, memory, one);
        Held::put(one, words, element);
      }
      walk.item += kBatch * step;
      walk.pointer += kBatch * task.pointer_step;
      return (1u << kBatch) - 1u;
    }
    uint32_t present = 0;
#pragma unroll
    for (int element = 0; element < kBatch; ++element) {
      uint32_t one[Held::kOne];
      no_value(one);
      if (walk.item < place.items) {
        load_value(walk.pointer, memory, one);
        present |= 1u << element;
      }
      Held::put(one, words, element);
      advance(task, step, walk);
    }
    return present;
  }
};

}  // namespace lambda_kernels
