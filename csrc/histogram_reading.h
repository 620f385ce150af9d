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
  int32_t items;        // of each of the threads that stand side by side
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
  using Value = typename Words<Element>::Value;

  static constexpr bool kColumns = kLayout == Layout::kColumns;
  static constexpr int kElements = kColumns ? kColumnsPerThread : kBytesPerItem / static_cast<int>(sizeof(Element));
  static constexpr int kItemBytes = kElements * static_cast<int>(sizeof(Element));
  static constexpr int kItemWords = kItemBytes / 4;
  // 32 bytes on their way for each thread; 16 of float64, whose grids take the registers.
  static constexpr int kWords = kColumns && sizeof(Value) == 8 ? 4 : 8;
  static constexpr int kItems = kWords / kItemWords;
  static constexpr int kTargets = kColumns ? kColumnsPerThread : 1;  // of a thread

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

  // The row of threads that a thread stands in.
  LAMBDA_KERNELS_HOST_DEVICE static int32_t row_of(const Task& task, int32_t thread) {
    return kColumns ? thread >> task.abreast_bits : thread;
  }

  // A thread's first column in the tile.
  LAMBDA_KERNELS_HOST_DEVICE static int32_t column_of(const Task& task, int32_t thread) {
    return kColumns ? (thread & ((1 << task.abreast_bits) - 1)) * kColumnsPerThread : thread & (task.width - 1);
  }

  // What is added to that for each of its targets.
  LAMBDA_KERNELS_HOST_DEVICE static int32_t turned(const Task& task, int32_t thread, int32_t k) {
    return kColumns ? k ^ (row_of(task, thread) & 1) : 0;
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

  // How many elements of an item there are.
  LAMBDA_KERNELS_HOST_DEVICE static int32_t elements_of(const Task& task, const Walk& walk, int32_t own_columns) {
    if (kColumns) {
      return own_columns;
    }
    const auto rest = static_cast<int32_t>(task.length % kElements);
    return walk.items_left == 1 && rest != 0 ? rest : kElements;
  }

  // Reads an item; NaN stands where there is nothing.
  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static void load(const Task& task, const char* pointer, int32_t elements, Memory& memory,
                                              uint32_t* words) {
    if (task.vector && elements == kElements) {
      memory.template load<kItemWords>(pointer, words);
      return;
    }
#pragma unroll
    for (int word = 0; word < kItemWords; ++word) {
      words[word] = 0x7fff7fffu;
    }
#pragma unroll
    for (int element = 0; element < kElements; ++element) {
      if (element >= elements) {
        continue;
      }
      const char* const address = pointer + element * task.element_stride;
      if constexpr (sizeof(Element) == 2) {
        const uint32_t bits = memory.load_short(address);
        words[element / 2] = element % 2 ? (words[element / 2] & 0xffffu) | bits << 16 : 0x7fff0000u | bits;
      } else {
        memory.template load_element<sizeof(Element) / 4>(address, words + element * (sizeof(Element) / 4));
      }
    }
  }

  // Puts the values of an item into the order of the thread's targets.
  LAMBDA_KERNELS_HOST_DEVICE static void turn(bool turned, uint32_t* words) {
    if constexpr (kItemWords == 1) {
      words[0] = chosen(turned, words[0] >> 16 | words[0] << 16, words[0]);
    } else {
#pragma unroll
      for (int word = 0; word < kItemWords / 2; ++word) {
        const uint32_t low = words[word], high = words[word + kItemWords / 2];
        words[word] = chosen(turned, high, low);
        words[word + kItemWords / 2] = chosen(turned, low, high);
      }
    }
  }
};

}  // namespace lambda_kernels
