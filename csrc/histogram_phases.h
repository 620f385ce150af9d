// What the threads of a block do between its barriers, for the GPU and, thread after thread, for the tests on a CPU.
//
//   clear │ count │ add_up │ (hand_over │ take_over) … │ write_moments
//
// In the layout of columns, where the lanes of a warp read for each other, `count` is itself made of phases, between
// barriers of the warp alone: begin │ (take │ count_and_copy) …
//
// `Memory` is how a thread reaches memory: on a GPU plainly, in the tests with every access checked. A thread takes 32
// bytes at once, turns each value into its counter and adds 1 in shared memory; values that the fixed-point form of the
// rule cannot place, NaN and infinities among them, take the definition afterwards, one by one. Counters are integers
// and moments are added up in a fixed order, so that results do not depend on which thread or block comes first.
#pragma once

#include <cmath>
#include <cstdint>

#include "histogram_reading.h"

namespace lambda_kernels {

// What turns values into counters.
enum class Rule { kGrid, kCodes, kNothing };  // kNothing: only NaN and infinities are counted

template <typename Element_, Layout kLayout, Rule kRule, bool kMoments>
struct Histogram : Reading<Element_, kLayout> {
  using Element = Element_;
  using Base = Reading<Element, kLayout>;
  using typename Base::Held;
  using typename Base::Staging;
  using typename Base::Value;
  using typename Base::Walk;
  using Base::kBatch, Base::kColumns, Base::kElements, Base::kItemWords, Base::kWords;
  using Base::advance, Base::batch_step, Base::column_of, Base::copy, Base::elements_of, Base::first_column_of,
      Base::first_item_of, Base::full_until, Base::load_item, Base::next_stage, Base::row_of, Base::shift_of,
      Base::staging_of, Base::step_of, Base::take_directly, Base::walk_from;
  static constexpr bool kHasMoments = kMoments;

  // What a thread needs to know to count.
  struct Rules {
    FixedGrid fixed;
    const ChannelGrid* definition;  // float64 reads it for every value: registers are short
    uint32_t twice_margin;
    uint32_t counters, stride;      // the thread's column of counters and what is between two of their rows
  };

  // What a thread keeps. All threads of a block have the same shift for a target.
  struct State {
    double shift;
    double sum;     // of value − shift
    double square;  // of its square
    Value minimum, maximum;
    double count;   // of finite values in the block; from `add_up` on
    bool counted;   // whether the target exists and is wanted
    Rules rules;
    // In the layout of columns: what is to be read or copied next, and the values of a batch with a bit for each that
    // there is.
    Walk walk;
    Staging staging;
    int32_t full_until;
    uint32_t words[kWords];
    uint32_t present;
  };

  LAMBDA_KERNELS_HOST_DEVICE static int32_t cells(const Launch& launch, const Place& place) {
    return (launch.table_bins + kRowsBesideBins) * place.task->width;
  }

  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static void clear(const Launch& launch, const Place& place, int32_t thread,
                                               Memory& memory) {
    const int32_t count = cells(launch, place);
    for (int32_t cell = thread; cell < count; cell += launch.threads) {
      memory.set_counter(cell, 0);
    }
  }

  // What a thread needs before it counts.
  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static void prepare(const Launch& launch, const Place& place, int32_t thread,
                                                 Memory& memory, State& state) {
    const int32_t column = column_of(*place.task, thread);
    const int32_t own = kColumns ? column : 0;  // of the block's targets
    state.shift = state.sum = state.square = state.count = 0.0;
    state.minimum = static_cast<Value>(INFINITY);
    state.maximum = static_cast<Value>(-INFINITY);
    state.counted = own < place.columns && (launch.only == nullptr || launch.only[place.target + own]);
    if constexpr (kMoments) {
      if (state.counted) {
        state.shift = shift_of(place, walk_from(place, 0, 0), own, memory);
      }
    }
    Rules& rules = state.rules;
    rules.counters = memory.column(column);
    rules.stride = memory.stride(place.task->width);
    rules.fixed = {0.0f, NAN, 0};
    rules.twice_margin = 0;
    rules.definition = nullptr;
    if constexpr (kRule == Rule::kGrid) {
      rules.definition = launch.grid + place.target + own;
      if (kShortForm && state.counted) {
        rules.fixed = fixed_grid(*rules.definition, launch.bins, launch.point);
        rules.twice_margin = 2 * rules.fixed.margin;
      }
    }
  }

  // The layout of lanes.
  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static void count(const Launch& launch, const Place& place, int32_t thread,
                                               Memory& memory, State& state) {
    prepare(launch, place, thread, memory, state);
    if (!state.counted) {
      return;
    }
    const Task& task = *place.task;
    const int32_t step = step_of(launch, task);
    const bool plain = task.flat && task.vector && task.length % kElements == 0;
    Walk walk = walk_from(place, thread, 0);
    while (walk.item < place.items) {
      uint32_t words[kWords];
      uint32_t present = 0;
      if (plain && walk.item + (kItemsPerBatch - 1) * step < place.items) {
#pragma unroll
        for (int item = 0; item < kItemsPerBatch; ++item) {
          memory.load(walk.pointer + item * task.pointer_step, words + item * kItemWords);
        }
        walk.item += kItemsPerBatch * step;
        walk.pointer += kItemsPerBatch * task.pointer_step;
        present = (1u << kBatch) - 1u;
      } else {
#pragma unroll
        for (int item = 0; item < kItemsPerBatch; ++item) {
          const int32_t elements = walk.item < place.items ? elements_of(task, walk) : 0;
          load_item(task, walk.pointer, elements, memory, words + item * kItemWords);
          present |= ((1u << elements) - 1u) << (item * kElements);
          advance(task, step, walk);
        }
      }
      count_all(launch, place, words, present, thread, memory, state);
    }
  }

  // The layout of columns. The barriers of a warp are passed by all its lanes, also by those that count nothing, and
  // these copy what others count.
  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static void begin(const Launch& launch, const Place& place, int32_t thread,
                                               Memory& memory, State& state) {
    const Task& task = *place.task;
    state.walk = walk_from(place, first_item_of(task, thread), first_column_of(task, thread));
    if (task.vector) {
      state.staging = staging_of(launch, place, thread, memory);
      int32_t stage = 0;
      do {
        copy(launch, place, thread, state.staging, stage, state.walk, memory);
        stage = next_stage(launch, stage);
      } while (stage != 0);
    }
    prepare(launch, place, thread, memory, state);
    state.full_until = memory.kept(full_until(launch, place));
    if (task.vector) {
      memory.wait(launch.stages - 1);
    }
  }

  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static void take(const Launch& launch, const Place& place, int32_t item, int32_t thread,
                                              Memory& memory, State& state) {
    if (state.counted) {
      const bool full = item < state.full_until;
      state.present = place.task->vector
                          ? Base::take(launch, place, item, full, thread, state.staging, memory, state.words)
                          : take_directly(launch, place, full, state.walk, memory, state.words);
    }
  }

  // The stage is free again as soon as all lanes of the warp have taken what they count.
  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static void count_and_copy(const Launch& launch, const Place& place, int32_t thread,
                                                        Memory& memory, State& state) {
    const bool staged = place.task->vector;
    if (staged) {
      copy(launch, place, thread, state.staging, state.staging.stage, state.walk, memory);
      state.staging.stage = next_stage(launch, state.staging.stage);
    }
    if (state.counted) {
      count_all(launch, place, state.words, state.present, thread, memory, state);
    }
    if (staged) {
      memory.wait(launch.stages - 1);
    }
  }

 private:
  static constexpr bool kShortForm = kRule == Rule::kGrid && sizeof(Value) == 4;

  LAMBDA_KERNELS_HOST_DEVICE static int32_t lowest(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __ffs(static_cast<int>(bits)) - 1;
#else
    return __builtin_ctz(bits);
#endif
  }

  // Counts the elements of a batch that there are.
  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static void count_all(const Launch& launch, const Place& place, const uint32_t* words,
                                                   uint32_t present, int32_t thread, Memory& memory, State& state) {
    uint32_t rest = present & count_batch(launch, words, memory, state);
    while (rest != 0) {
      const int32_t element = lowest(rest);
      rest &= rest - 1;
      count_rest(launch, place, words, element, thread, memory);
    }
  }

  // Counts a batch but for the elements in the returned bits: NaN, infinities, what the fixed-point form leaves, and
  // everything where bins are counted in device memory.
  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static uint32_t count_batch(const Launch& launch, const uint32_t* words, Memory& memory,
                                                         State& state) {
    const Rules& rules = state.rules;
    uint32_t rest = 0;
#pragma unroll
    for (int element = 0; element < kBatch; ++element) {
      const Value value = Held::value(words, element);
      bool placed = false;
      int32_t counter = 0;
      if constexpr (kShortForm) {
        uint32_t bin;
        placed = fixed_bin(value, rules.fixed, launch.point, rules.twice_margin, &bin);
        counter = static_cast<int32_t>(bin);
      } else if constexpr (kRule == Rule::kNothing) {
        placed = finite(value);
      } else {
        placed = finite(value) && launch.table_bins != 0;
        counter = definite_counter(launch, words, element, value, rules.definition);
      }
      if (!placed) {
        rest |= 1u << element;
      }
      if constexpr (kRule != Rule::kNothing) {
        // Into a row that nobody reads rather than not at all: a branch around the addition would cost more.
        memory.count(placed, rules.counters, placed ? counter : launch.table_bins + kOutsideCount, rules.stride);
      }
      if constexpr (kMoments) {
        if (finite(value)) {
          const double distance = static_cast<double>(value) - state.shift;
          state.sum += distance;
          state.square = fma(distance, distance, state.square);
          state.minimum = smaller(value, state.minimum);
          state.maximum = larger(value, state.maximum);
        }
      }
    }
    return rest;
  }

  LAMBDA_KERNELS_HOST_DEVICE static int32_t definite_counter(const Launch& launch, const uint32_t* words, int element,
                                                             Value value, const ChannelGrid* definition) {
    if constexpr (kRule == Rule::kCodes) {
      return counter_of_code(Held::bits(words, element));
    } else if constexpr (kRule == Rule::kGrid) {
      return counter_of(static_cast<double>(value), *definition, launch.bins);
    } else {
      return counter_of_non_finite(value, 0);
    }
  }

  // Counts one element of a batch by the definition. Its number is not known when this is compiled: the words are
  // chosen by comparisons, since registers cannot be indexed.
  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static void count_rest(const Launch& launch, const Place& place, const uint32_t* words,
                                                    int32_t element, int32_t thread, Memory& memory) {
    constexpr int kOwn = Held::kOne;
    const int32_t index = Held::kPairs ? element / 2 : element;
    uint32_t own[kOwn];
#pragma unroll
    for (int word = 0; word < kOwn; ++word) {
      own[word] = words[word];
#pragma unroll
      for (int other = 1; other < kWords / kOwn; ++other) {
        own[word] = chosen(index == other, words[other * kOwn + word], own[word]);
      }
    }
    if constexpr (Held::kPairs) {
      own[0] = chosen(element % 2 != 0, own[0] >> 16, own[0]);
    }
    const int32_t column = column_of(*place.task, thread);
    const int64_t target = place.target + (kColumns ? column : 0);
    const ChannelGrid* const definition = kRule == Rule::kGrid ? launch.grid + target : nullptr;
    const int32_t counter = definite_counter(launch, own, 0, Held::value(own, 0), definition);
    if (counter < launch.bins && launch.table_bins == 0) {
      memory.add(launch.counts + target * launch.bins + counter, 1);
    } else {
      const int32_t row = counter < launch.bins ? counter : counter - launch.bins + launch.table_bins;
      memory.count_rest(memory.column(column), row, memory.stride(place.task->width));
    }
  }

 public:
  // Adds the block's counters to the results.
  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static void add_up(const Launch& launch, const Place& place, int32_t thread,
                                                Memory& memory, State& state) {
    const Task& task = *place.task;
    const int32_t rows = launch.table_bins + kOutsideCount;
    if constexpr (kColumns) {
      // Neighbouring threads take four neighbouring counters of a column, 32 bytes of the results, and then the next
      // column: a compromise between sectors of device memory and banks of shared memory.
      const int32_t count = (rows + 3) / 4 * 4 * task.width;
      for (int32_t i = thread; i < count; i += launch.threads) {
        const int32_t column = i / 4 % task.width;
        const int32_t row = i / 4 / task.width * 4 + i % 4;
        if (row < rows && column < place.columns) {
          add_to_results(launch, place.target + column, row, memory.counter(row * task.width + column), memory);
        }
      }
    } else {
      for (int32_t row = thread; row < rows; row += launch.threads) {
        uint32_t count = 0;
        for (int32_t i = 0; i < task.width; ++i) {  // begun at different columns, for the banks
          count += memory.counter(row * task.width + (i + row) % task.width);
        }
        add_to_results(launch, place.target, row, count, memory);
      }
    }
    if constexpr (kMoments) {
      if (row_of(task, thread) == 0 && state.counted) {
        state.count = finite_values(launch, place, column_of(task, thread), memory);
      }
    }
  }

  // How many rows of threads there are: each hands its moments over to one in the lower half, then half of those do.
  LAMBDA_KERNELS_HOST_DEVICE static int32_t thread_rows(const Launch& launch, const Place& place) {
    return launch.threads >> place.task->abreast_bits;
  }

  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static void hand_over(const Launch& launch, const Place& place, int32_t thread,
                                                   int32_t half, Memory& memory, const State& state) {
    const int32_t row = row_of(*place.task, thread);
    if (row >= half && row < 2 * half) {
      const int32_t slot = thread - (half << place.task->abreast_bits);
      const int32_t stride = launch.threads / 2;
      memory.set_double(slot, state.sum);
      memory.set_double(slot + stride, state.square);
      memory.set_double(slot + 2 * stride, static_cast<double>(state.minimum));
      memory.set_double(slot + 3 * stride, static_cast<double>(state.maximum));
    }
  }

  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static void take_over(const Launch& launch, const Place& place, int32_t thread,
                                                   int32_t half, Memory& memory, State& state) {
    if (row_of(*place.task, thread) < half) {
      const int32_t stride = launch.threads / 2;
      state.sum += memory.get_double(thread);
      state.square += memory.get_double(thread + stride);
      state.minimum = smaller(static_cast<Value>(memory.get_double(thread + 2 * stride)), state.minimum);
      state.maximum = larger(static_cast<Value>(memory.get_double(thread + 3 * stride)), state.maximum);
    }
  }

  // The first row of threads has the block's moments now.
  LAMBDA_KERNELS_HOST_DEVICE static void write_moments(const Launch& launch, const Place& place, int32_t thread,
                                                       const State& state) {
    if (row_of(*place.task, thread) == 0 && state.counted) {
      const int32_t column = kColumns ? column_of(*place.task, thread) : 0;
      launch.partials[place.first_partial + column] =
          moments_of(state.count, state.shift, state.sum, state.square, static_cast<double>(state.minimum),
                     static_cast<double>(state.maximum));
    }
  }

 private:
  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static void add_to_results(const Launch& launch, int64_t target, int32_t row,
                                                        uint32_t count, Memory& memory) {
    if (count != 0) {
      memory.add(row < launch.table_bins ? launch.counts + target * launch.bins + row
                                         : launch.outside + target * kOutsideCount + row - launch.table_bins,
                 count);
    }
  }

  // Elements of a unit in its first `items` items.
  LAMBDA_KERNELS_HOST_DEVICE static int64_t elements_before(const Task& task, int64_t items) {
    return kColumns ? items : items / task.items_per_line * task.length + items % task.items_per_line * kElements;
  }

  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static double finite_values(const Launch& launch, const Place& place, int32_t column,
                                                         Memory& memory) {
    const int32_t width = place.task->width;
    int64_t count = elements_before(*place.task, place.first_item + place.items) -
                    elements_before(*place.task, place.first_item);
    for (int32_t kind = kNan; kind < kOutsideCount; ++kind) {
      for (int32_t i = 0; i < (kColumns ? 1 : width); ++i) {
        count -= memory.counter((launch.table_bins + kind) * width + (kColumns ? column : i));
      }
    }
    return static_cast<double>(count);
  }
};

// All phases of a block. `block.each` has every thread do something, and a barrier after it. So does `block.each_warp`
// with every warp, named by its first thread, and `warp.each` with its lanes, the barrier being one of the warp.
template <typename Kernel, typename Block>
LAMBDA_KERNELS_HOST_DEVICE inline void run_block(const Launch& launch, int32_t index, Block& block) {
  using State = typename Kernel::State;
  const Place place = Kernel::locate(launch, index);
  if (!is_wanted(launch, place)) {
    return;
  }
  block.each([&](int32_t thread, auto& memory, State&) { Kernel::clear(launch, place, thread, memory); });
  if constexpr (Kernel::kColumns) {
    block.each_warp([&](int32_t first_thread, auto& warp) {
      warp.each([&](int32_t thread, auto& memory, State& state) {
        Kernel::begin(launch, place, thread, memory, state);
      });
      const int32_t step = Kernel::batch_step(launch, *place.task);
      for (int32_t item = Kernel::first_item_of(*place.task, first_thread); item < place.items; item += step) {
        warp.each([&](int32_t thread, auto& memory, State& state) {
          Kernel::take(launch, place, item, thread, memory, state);
        });
        warp.each([&](int32_t thread, auto& memory, State& state) {
          Kernel::count_and_copy(launch, place, thread, memory, state);
        });
      }
    });
  } else {
    block.each([&](int32_t thread, auto& memory, State& state) {
      Kernel::count(launch, place, thread, memory, state);
    });
  }
  block.each([&](int32_t thread, auto& memory, State& state) { Kernel::add_up(launch, place, thread, memory, state); });
  if constexpr (Kernel::kHasMoments) {
    if (launch.partials == nullptr) {
      return;
    }
    for (int32_t half = Kernel::thread_rows(launch, place) / 2; half > 0; half /= 2) {
      block.each([&](int32_t thread, auto& memory, State& state) {
        Kernel::hand_over(launch, place, thread, half, memory, state);
      });
      block.each([&](int32_t thread, auto& memory, State& state) {
        Kernel::take_over(launch, place, thread, half, memory, state);
      });
    }
    block.each([&](int32_t thread, auto&, State& state) { Kernel::write_moments(launch, place, thread, state); });
  }
}

// Calls `use` with an object of the type of the kernel that a launch needs; without a grid, codes are counted.
template <typename Element, typename Use>
void with_kernel(const Launch& launch, Use use) {
  const auto in_layout = [&](auto layout) {
    constexpr Layout kLayout = decltype(layout)::value;
    if (launch.bins == 0) {
      return use(Histogram<Element, kLayout, Rule::kNothing, true>{});
    }
    if constexpr (std::is_same_v<Element, BFloat16>) {
      if (launch.grid == nullptr) {
        return use(Histogram<Element, kLayout, Rule::kCodes, true>{});
      }
    }
    if constexpr (!std::is_same_v<Element, double>) {  // float64 is rare: one kernel does
      if (launch.partials == nullptr) {
        return use(Histogram<Element, kLayout, Rule::kGrid, false>{});
      }
    }
    return use(Histogram<Element, kLayout, Rule::kGrid, true>{});
  };
  if (launch.layout == Layout::kColumns) {
    in_layout(std::integral_constant<Layout, Layout::kColumns>{});
  } else {
    in_layout(std::integral_constant<Layout, Layout::kLanes>{});
  }
}

}  // namespace lambda_kernels
