// What the threads of a block do between its barriers, for the GPU and, thread after thread, for the tests on a CPU.
//
//   clear │ count │ add_up │ (hand_over │ take_over) … │ write_moments
//
// `Memory` is how a thread reaches memory: on a GPU plainly, in the tests with every access checked. A thread reads 32
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
  using typename Base::Value;
  using typename Base::Walk;
  using Base::kColumns, Base::kElements, Base::kItems, Base::kItemWords, Base::kTargets, Base::kWords;
  using Base::advance, Base::column_of, Base::elements_of, Base::load, Base::row_of, Base::turn, Base::turned,
      Base::walk_from;
  static constexpr bool kHasMoments = kMoments;

  // What a thread keeps of its targets. In the layout of columns the threads of every other row have them in turned
  // order, so that a warp of two rows adds to the even columns of one and to the odd columns of the other at a time.
  // All threads of a block have the same shift for a target.
  struct State {
    double shift[kTargets];
    double sum[kTargets];     // of value − shift
    double square[kTargets];  // of its square
    Value minimum[kTargets], maximum[kTargets];
    double count[kTargets];   // of finite values in the block; from `add_up` on
    bool counted[kTargets];   // whether the target exists and is wanted
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

  LAMBDA_KERNELS_HOST_DEVICE static bool finite(Value value) { return fabs(value) < static_cast<Value>(INFINITY); }

  // The shift of a target: the middle one of the block's first three values, since a single one may be an outlier, or
  // else the first finite one of up to 64. `first` is where the block's walk begins; from there, values follow down the
  // target's column or along the line.
  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static double shift_of(const Place& place, const Walk& first, int32_t column,
                                                    Memory& memory) {
    const Task& task = *place.task;
    const int64_t behind = kColumns ? 0 : (task.items_per_line - first.items_left) * kElements;
    const int64_t elements = kColumns ? first.lines_left : task.length - behind;
    const int64_t items = kColumns ? place.items : int64_t{place.items} * kElements;
    const int64_t count = elements < items ? elements : items;
    const char* pointer = first.pointer + (kColumns ? column * task.element_stride : 0);
    const int64_t stride = kColumns ? task.line_stride : task.element_stride;
    const auto value_at = [&](const char* from) {
      uint32_t words[kItemWords];
      load(task, from, 1, memory, words);
      return Words<Element>::value(words, 0);
    };
    if (count >= 3) {  // on their way at the same time
      const Value a = value_at(pointer), b = value_at(pointer + stride), c = value_at(pointer + 2 * stride);
      if (finite(a) && finite(b) && finite(c)) {
        return larger(smaller(a, b), smaller(larger(a, b), c));
      }
    }
#pragma unroll 1
    for (int32_t index = 0; index < count && index < 64; ++index) {
      const Value value = value_at(pointer);
      if (finite(value)) {
        return value;
      }
      pointer += stride;
    }
    return 0.0;
  }

  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static void count(const Launch& launch, const Place& place, int32_t thread,
                                               Memory& memory, State& state) {
    const Task& task = *place.task;
    const int32_t step = launch.threads >> task.abreast_bits;
    const int32_t column = column_of(task, thread);
    const bool other_order = turned(task, thread, 0) != 0;
    const int32_t beyond = kColumns ? place.columns - column : 1;
    const int32_t own_columns = beyond < 0 ? 0 : beyond < kTargets ? beyond : kTargets;

    uint32_t counted_elements = 0;  // a bit for each element of a batch
#pragma unroll
    for (int k = 0; k < kTargets; ++k) {
      state.shift[k] = state.sum[k] = state.square[k] = state.count[k] = 0.0;
      state.minimum[k] = static_cast<Value>(INFINITY);
      state.maximum[k] = static_cast<Value>(-INFINITY);
      const int32_t own = kColumns ? column + turned(task, thread, k) : 0;
      state.counted[k] = own < place.columns && (launch.only == nullptr || launch.only[place.target + own]);
      if (state.counted[k]) {
        counted_elements |= kEveryItem << k;
      }
    }
    if constexpr (kMoments) {
      const Walk first = walk_from(place, 0, 0);
#pragma unroll
      for (int k = 0; k < kTargets; ++k) {
        if (state.counted[k]) {
          state.shift[k] = shift_of(place, first, column + turned(task, thread, k), memory);
        }
      }
    }
    Rules<Memory> rules{};
    rules.stride = memory.stride(task.width);
#pragma unroll
    for (int k = 0; k < kTargets; ++k) {
      const int32_t own = column + turned(task, thread, k);
      rules.counters[k] = memory.column(own < task.width ? own : 0);
      rules.fixed[k] = {0.0f, NAN, 0};
      if constexpr (kRule == Rule::kGrid) {
        rules.definition[k] = launch.grid + place.target + (kColumns && state.counted[k] ? own : 0);
        if (kShortForm && state.counted[k]) {
          rules.fixed[k] = fixed_grid(*rules.definition[k], launch.bins, launch.point);
          const uint32_t twice = rules.fixed[k].margin * 2;
          rules.twice_margin = twice > rules.twice_margin ? twice : rules.twice_margin;
        }
      }
    }
    if (counted_elements == 0) {
      return;
    }

    const bool plain = task.flat && task.vector && own_columns == kTargets &&
                       (kColumns || task.length % kElements == 0);
    Walk walk = walk_from(place, row_of(task, thread), column);
    while (walk.item < place.items) {
      uint32_t words[kWords];
      uint32_t present = counted_elements;
      if (plain && walk.item + (kItems - 1) * step < place.items) {
#pragma unroll
        for (int item = 0; item < kItems; ++item) {
          memory.template load<kItemWords>(walk.pointer + item * task.pointer_step, words + item * kItemWords);
        }
        walk.item += kItems * step;
        walk.pointer += kItems * task.pointer_step;
      } else {
#pragma unroll
        for (int item = 0; item < kItems; ++item) {
          const bool there = walk.item < place.items;
          const int32_t elements = there ? elements_of(task, walk, own_columns) : 0;
          load(task, walk.pointer, elements, memory, words + item * kItemWords);
          const uint32_t missing = kColumns ? (there ? 0 : kOneItem) : kOneItem & ~((1u << elements) - 1u);
          present &= ~(missing << (item * kElements));
          advance(task, step, walk);
        }
      }
      if constexpr (kColumns) {
#pragma unroll
        for (int item = 0; item < kItems; ++item) {
          turn(other_order, words + item * kItemWords);
        }
      }
      uint32_t rest = present & count_batch(launch, words, rules, memory, state);
      while (rest != 0) {
        const int32_t element = lowest(rest);
        rest &= rest - 1;
        count_rest(launch, place, words, element, thread, memory);
      }
    }
  }

 private:
  static constexpr bool kShortForm = kRule == Rule::kGrid && sizeof(Value) == 4;
  static constexpr uint32_t kOneItem = (1u << kElements) - 1u;
  static constexpr uint32_t every_item() {
    uint32_t bits = 0;
    for (int element = 0; element < kItems * kElements; element += kTargets) {
      bits |= 1u << element;
    }
    return bits;
  }
  static constexpr uint32_t kEveryItem = every_item();  // the first target's elements in a batch

  // What a thread needs to know of its targets.
  template <typename Memory>
  struct Rules {
    FixedGrid fixed[kTargets];
    const ChannelGrid* definition[kTargets];  // float64 reads it for every value: registers are short
    uint32_t twice_margin;
    typename Memory::Column counters[kTargets];
    typename Memory::Column stride;  // of rows of counters
  };

  LAMBDA_KERNELS_HOST_DEVICE static int32_t lowest(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __ffs(static_cast<int>(bits)) - 1;
#else
    return __builtin_ctz(bits);
#endif
  }

  // Counts a batch but for the elements in the returned bits: NaN, infinities, what the fixed-point form leaves, and
  // everything where bins are counted in device memory.
  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static uint32_t count_batch(const Launch& launch, const uint32_t* words,
                                                         const Rules<Memory>& rules, Memory& memory, State& state) {
    uint32_t rest = 0;
#pragma unroll
    for (int element = 0; element < kItems * kElements; ++element) {
      const int k = element % kTargets;
      const Value value = Words<Element>::value(words, element);
      bool placed = false;
      int32_t counter = 0;
      if constexpr (kShortForm) {
        uint32_t bin;  // nothing of a target that is not counted is placed
        placed = fixed_bin(value, rules.fixed[k], launch.point, rules.twice_margin, &bin);
        counter = static_cast<int32_t>(bin);
      } else if constexpr (kRule == Rule::kNothing) {
        placed = finite(value);
      } else {
        placed = finite(value) && launch.table_bins != 0 && state.counted[k];
        counter = definite_counter(launch, words, element, value, rules.definition[k]);
      }
      if (!placed) {
        rest |= 1u << element;
      }
      if constexpr (kRule != Rule::kNothing) {
        // Into a row that nobody reads rather than not at all: a branch around the addition would cost more.
        memory.count(placed, rules.counters[k], placed ? counter : launch.table_bins + kOutsideCount, rules.stride);
      }
      if constexpr (kMoments) {
        if (finite(value)) {
          const double distance = static_cast<double>(value) - state.shift[k];
          state.sum[k] += distance;
          state.square[k] = fma(distance, distance, state.square[k]);
          state.minimum[k] = smaller(value, state.minimum[k]);
          state.maximum[k] = larger(value, state.maximum[k]);
        }
      }
    }
    return rest;
  }

  LAMBDA_KERNELS_HOST_DEVICE static int32_t definite_counter(const Launch& launch, const uint32_t* words, int element,
                                                             Value value, const ChannelGrid* definition) {
    if constexpr (kRule == Rule::kCodes) {
      return counter_of_code(Words<Element>::bits(words, element));
    } else if constexpr (kRule == Rule::kGrid) {
      return counter_of(static_cast<double>(value), *definition, launch.bins);
    } else {
      return counter_of_non_finite(value, 0);
    }
  }

  LAMBDA_KERNELS_HOST_DEVICE static float smaller(float a, float b) { return fminf(a, b); }
  LAMBDA_KERNELS_HOST_DEVICE static double smaller(double a, double b) { return fmin(a, b); }
  LAMBDA_KERNELS_HOST_DEVICE static float larger(float a, float b) { return fmaxf(a, b); }
  LAMBDA_KERNELS_HOST_DEVICE static double larger(double a, double b) { return fmax(a, b); }

  // Counts one element of a batch by the definition. Its number is not known when this is compiled: the word is chosen
  // by comparisons, since registers cannot be indexed.
  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static void count_rest(const Launch& launch, const Place& place, const uint32_t* words,
                                                    int32_t element, int32_t thread, Memory& memory) {
    constexpr int kWordsPerTwo = sizeof(Element) / 2;  // of two elements, so that halves need no case of their own
    uint32_t two[kWordsPerTwo];
#pragma unroll
    for (int word = 0; word < kWordsPerTwo; ++word) {
      two[word] = words[word];
#pragma unroll
      for (int pair = 1; pair < kWords / kWordsPerTwo; ++pair) {
        two[word] = chosen(element / 2 == pair, words[pair * kWordsPerTwo + word], two[word]);
      }
    }
    const bool odd = element % 2 != 0;
#pragma unroll
    for (int word = 0; word < (kWordsPerTwo + 1) / 2; ++word) {
      two[word] = kWordsPerTwo == 1 ? chosen(odd, two[0] >> 16, two[0])
                                    : chosen(odd, two[word + kWordsPerTwo / 2], two[word]);
    }
    const Value value = Words<Element>::value(two, 0);
    const int32_t column = column_of(*place.task, thread) + turned(*place.task, thread, odd ? 1 : 0);
    const int64_t target = place.target + (kColumns ? column : 0);
    const ChannelGrid* const definition = kRule == Rule::kGrid ? launch.grid + target : nullptr;
    const int32_t counter = definite_counter(launch, two, 0, value, definition);
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
      if (row_of(task, thread) == 0) {
#pragma unroll
        for (int k = 0; k < kTargets; ++k) {
          state.count[k] = state.counted[k] ? finite_values(launch, place, column_of(task, thread) + k, memory) : 0.0;
        }
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
#pragma unroll
      for (int k = 0; k < kTargets; ++k) {
        const int32_t slot = slot_of(thread - (half << place.task->abreast_bits), turned(*place.task, thread, k));
        const int32_t stride = launch.threads / 2 * kTargets;
        memory.set_double(slot, state.sum[k]);
        memory.set_double(slot + stride, state.square[k]);
        memory.set_double(slot + 2 * stride, static_cast<double>(state.minimum[k]));
        memory.set_double(slot + 3 * stride, static_cast<double>(state.maximum[k]));
      }
    }
  }

  template <typename Memory>
  LAMBDA_KERNELS_HOST_DEVICE static void take_over(const Launch& launch, const Place& place, int32_t thread,
                                                   int32_t half, Memory& memory, State& state) {
    if (row_of(*place.task, thread) < half) {
#pragma unroll
      for (int k = 0; k < kTargets; ++k) {
        const int32_t slot = slot_of(thread, turned(*place.task, thread, k));
        const int32_t stride = launch.threads / 2 * kTargets;
        state.sum[k] += memory.get_double(slot);
        state.square[k] += memory.get_double(slot + stride);
        state.minimum[k] = smaller(static_cast<Value>(memory.get_double(slot + 2 * stride)), state.minimum[k]);
        state.maximum[k] = larger(static_cast<Value>(memory.get_double(slot + 3 * stride)), state.maximum[k]);
      }
    }
  }

  // The first row of threads has the block's moments now.
  LAMBDA_KERNELS_HOST_DEVICE static void write_moments(const Launch& launch, const Place& place, int32_t thread,
                                                       const State& state) {
    if (row_of(*place.task, thread) != 0) {
      return;
    }
#pragma unroll
    for (int k = 0; k < kTargets; ++k) {
      if (state.counted[k]) {
        const int32_t column = kColumns ? column_of(*place.task, thread) + k : 0;
        launch.partials[place.first_partial + column] =
            moments_of(state.count[k], state.shift[k], state.sum[k], state.square[k],
                       static_cast<double>(state.minimum[k]), static_cast<double>(state.maximum[k]));
      }
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

  LAMBDA_KERNELS_HOST_DEVICE static int32_t slot_of(int32_t thread, int32_t turned) {
    return kColumns ? thread * kTargets + turned : thread;
  }
};

// All phases of a block. `block.each` has every thread do something, and a barrier after it.
template <typename Kernel, typename Block>
LAMBDA_KERNELS_HOST_DEVICE inline void run_block(const Launch& launch, int32_t index, Block& block) {
  using State = typename Kernel::State;
  const Place place = Kernel::locate(launch, index);
  if (!is_wanted(launch, place)) {
    return;
  }
  block.each([&](int32_t thread, auto& memory, State&) { Kernel::clear(launch, place, thread, memory); });
  block.each([&](int32_t thread, auto& memory, State& state) { Kernel::count(launch, place, thread, memory, state); });
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
