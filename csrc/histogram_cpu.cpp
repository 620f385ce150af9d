// CPU half of lambda_kernels::histogram.
//
// The work is cut into tasks, each a part of the values of some targets. A task counts into tables of its own, small
// enough to stay in cache, and adds them to the results. Integer sums do not depend on the order of the tasks; moments
// are put down per part and merged in the order of the parts.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <mutex>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cpu_direct.h"
#include "cpu_lanes.h"
#include "cpu_subnormals.h"
#include "cpu_sums.h"
#include "cpu_walk.h"
#include "histogram.h"

namespace lambda_kernels {
namespace {

constexpr int64_t kTableBytes = 448 * 1024;   // the tables of a task: within the L2 of the CPUs of today
constexpr int64_t kBlockBytes = 128 * 1024;  // the rows that all groups of a task take before the next, likewise
constexpr int64_t kFewRows = 8;               // what a call for one group of columns is worth
constexpr int64_t kShiftValues = 64;          // whose mean is the first shift
constexpr int64_t kBufferRows = 256;          // of values that are brought together first
constexpr int64_t kTaskValues = 32 * 1024;    // less is not worth another thread

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

constexpr ElementType type_of(const float*) {
  return ElementType::kFloat;
}
constexpr ElementType type_of(const Half*) {
  return ElementType::kHalf;
}
constexpr ElementType type_of(const BFloat16*) {
  return ElementType::kBFloat16;
}
constexpr ElementType type_of(const double*) {
  return ElementType::kDouble;
}

class CpuHistogram {
 public:
  CpuHistogram(const Call& call, const Lanes& lanes)
      : call_(call),
        lanes_(lanes),
        codes_(call.bins > 0 && call.grid == nullptr),
        slots_(call.bins + kOutsideCount),
        wide_(codes_ || call.bins > kMaxLaneBins) {
    for (const Source& source : call.sources) {
      plan(source);
    }
    if (call.moments != nullptr) {
      moments_.resize(parts_ * call.targets);
    }
  }

  template <typename Element>
  void run() {
    const int64_t tasks = static_cast<int64_t>(tasks_.size());
    const int64_t worthwhile = ceil_div(values_, kTaskValues);
    const int64_t threads = std::min<int64_t>({torch::stable::get_num_threads(), tasks, worthwhile});
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      const SubnormalsKept kept;
      for (int64_t i = next++; i < tasks; i = next++) {  // whoever is free takes the next, as tasks differ in size
        count<Element>(tasks_[i]);
      }
    });
  }

  void finish() {
    if (call_.moments == nullptr) {
      return;
    }
    const SubnormalsKept kept;
    for (int64_t target = 0; target < call_.targets; ++target) {
      Moments total;
      for (int64_t part = 0; part < parts_; ++part) {
        merge(total, moments_[part * call_.targets + target]);
      }
      call_.moments[target] = total;
    }
  }

 private:
  // Whether a row of a source is one of neighbouring columns, each a target of its own.
  bool side_by_side(const Source& source) const {
    return call_.per == kPerChannel && source.columns > 1 &&
           (source.column_stride <= source.row_stride || source.outer * source.rows == 1);
  }

  void plan(const Source& source) {
    const bool columns = side_by_side(source);
    const int64_t targets = source.targets(call_.per), values = source.values_per_target(call_.per);
    int64_t width = 1;
    if (columns) {
      const int64_t groups = ceil_div(targets, kLanes);
      const int64_t table_bytes = kLanes * slots_ * static_cast<int64_t>(wide_ ? sizeof(int64_t) : sizeof(Slot));
      const int64_t tiles = ceil_div(groups, std::max<int64_t>(1, kTableBytes / table_bytes));
      width = ceil_div(groups, tiles) * kLanes;
    }
    const int64_t tiles = ceil_div(targets, width);
    const int64_t threads = torch::stable::get_num_threads();
    int64_t worthwhile = ceil_div(values * width, kTaskValues);
    if (wide_) {  // adding up tables of this size must not take longer than filling them
      worthwhile = std::min(worthwhile, std::max<int64_t>(1, values / slots_));
    }
    const int64_t length = ceil_div(values, std::min({ceil_div(threads, tiles), worthwhile, values}));
    const int64_t parts = ceil_div(values, length);
    parts_ = std::max(parts_, parts);
    values_ += values * targets;
    for (int64_t target = 0; target < targets; target += width) {
      const int64_t those = std::min(width, targets - target);
      if (!wanted(source, target, those)) {
        continue;
      }
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = part * length;
        tasks_.push_back({&source, target, those, begin, std::min(begin + length, values), part, parts == 1});
      }
    }
  }

  bool wanted(const Source& source, int64_t target, int64_t targets) const {
    const bool* const only = call_.only == nullptr ? nullptr : call_.only + source.target + target;
    return only == nullptr || std::any_of(only, only + targets, [](bool one) { return one; });
  }

  template <typename Element>
  void count(const CpuTask& task) {
    const bool few = (task.end - task.begin) * kLanes < slots_;  // clearing a table would take longer than counting
    if (wide_ || few) {
      count_directly<Element>(task);
    } else if (side_by_side(*task.source)) {
      count_columns<Element>(task);
    } else {
      count_along<Element>(task);
    }
  }

  // Tables and sums for some groups of kLanes lanes, and what was collected of them.
  struct Tables {
    std::vector<LaneGrids> grids;
    std::vector<LaneSums> sums;
    std::vector<Slot> slots;
    std::vector<int64_t> outside_finite;  // NaN and infinities per lane when the sums were last collected
    std::vector<Moments> moments;         // per lane
  };

  // `one_target`: all lanes belong to the first one.
  Tables make_tables(const CpuTask& task, int64_t groups, bool one_target) const {
    Tables tables;
    tables.grids.resize(groups);
    tables.sums.resize(groups);
    tables.slots.resize(groups * kLanes * slots_);
    tables.outside_finite.resize(groups * kLanes);
    tables.moments.resize(groups * kLanes);
    for (int64_t group = 0; group < groups; ++group) {
      LaneGrids& lanes = tables.grids[group];
      lanes.bins = call_.bins;
      lanes.exact = true;
      for (int32_t lane = 0; lane < kLanes; ++lane) {
        const int64_t index = group * kLanes + lane;
        const int64_t target = task.source->target + task.target + (one_target || index >= task.targets ? 0 : index);
        const ChannelGrid grid = call_.bins > 0 ? call_.grid[target] : ChannelGrid{};
        const ShortGrid short_grid = shorten(grid, call_.bins);
        lanes.origin[lane] = short_grid.origin;
        lanes.scale[lane] = short_grid.scale;
        lanes.correction[lane] = short_grid.correction;
        lanes.first[lane] = short_grid.first;
        lanes.closed_hi[lane] = short_grid.closed_hi;
        lanes.within[lane] = std::nextafter(short_grid.closed_hi, -INFINITY);
        // Where float32 is coarser than the bins, the number before a closed edge is not in the last one.
        const bool coarse = short_grid.closed_hi == short_grid.closed_hi &&
                            counter_of(static_cast<double>(lanes.within[lane]), grid, call_.bins) != call_.bins - 1;
        lanes.certain[lane] = coarse ? -1.0f : short_grid.certain;
        lanes.exact = lanes.exact && lanes.certain[lane] == 0.5f;
        lanes.offset[lane] = static_cast<int32_t>(lane * slots_);
        lanes.anchor[lane] = grid.anchor;
        lanes.inv_width[lane] = grid.inv_width;
        lanes.first64[lane] = grid.first;
        lanes.closed_hi64[lane] = grid.closed_hi;
      }
      for (int32_t lane = 0; lane < kLanes; ++lane) {
        restart(tables.sums[group], lane, 0.0);
      }
    }
    return tables;
  }

  // Moves the sums of `rows` rows into the moments of the lanes, and the shift to the mean so far.
  void collect_sums(Tables& tables, int64_t rows, bool one_target) const {
    if (call_.moments == nullptr) {
      return;
    }
    fold(tables.sums);
    for (size_t index = 0; index < tables.moments.size(); ++index) {
      LaneSums& sums = tables.sums[index / kLanes];
      const int32_t lane = static_cast<int32_t>(index % kLanes);
      const Slot* const slots = tables.slots.data() + index * slots_;
      const int64_t outside = slots[slot_of(call_.bins + kNan, call_.bins)] +
                              slots[slot_of(call_.bins + kPositiveInfinity, call_.bins)] +
                              slots[slot_of(call_.bins + kNegativeInfinity, call_.bins)];
      const double finite = static_cast<double>(rows - (outside - tables.outside_finite[index]));
      tables.outside_finite[index] = outside;
      Moments& total = tables.moments[one_target ? 0 : index];
      merge(total, moments_of(finite, sums.shift[lane], sums.folded_sum[lane], sums.folded_square[lane],
                              sums.minimum[lane], sums.maximum[lane]));
      restart(sums, lane, total.count > 0.0 ? total.mean : sums.shift[lane]);
    }
  }

  // Adds the tables to the results and clears them.
  void collect_tables(const CpuTask& task, Tables& tables, bool one_target) {
    const auto guard = task.only_part ? std::unique_lock<std::mutex>() : std::unique_lock<std::mutex>(results_lock_);
    const int64_t lanes = one_target ? kLanes : task.targets;
    for (int64_t index = 0; index < lanes; ++index) {
      const int64_t target = task.source->target + task.target + (one_target ? 0 : index);
      if (call_.only != nullptr && !call_.only[target]) {
        continue;
      }
      const Slot* const slots = tables.slots.data() + index * slots_;
      int64_t* const counts = call_.counts + target * call_.bins;
      for (int32_t bin = 0; bin < call_.bins; ++bin) {
        counts[bin] += slots[bin + 1];
      }
      for (int32_t kind = 0; kind < kOutsideCount; ++kind) {
        call_.outside[target * kOutsideCount + kind] += slots[slot_of(call_.bins + kind, call_.bins)];
      }
    }
    std::fill(tables.slots.begin(), tables.slots.end(), Slot{0});
    std::fill(tables.outside_finite.begin(), tables.outside_finite.end(), 0);
  }

  void store_moments(const CpuTask& task, const Moments* moments) {
    for (int64_t index = 0; index < task.targets && call_.moments != nullptr; ++index) {
      const int64_t target = task.source->target + task.target + index;
      if (call_.only == nullptr || call_.only[target]) {
        moments_[task.part * call_.targets + target] = moments[index];
      }
    }
  }

  LaneSums* wanted_sums(Tables& tables, int64_t group) const {
    return call_.moments == nullptr && call_.bins > 0 ? nullptr : &tables.sums[group];
  }

  // Lanes are columns.
  template <typename Element>
  void count_columns(const CpuTask& task) {
    const Source& source = *task.source;
    const int64_t groups = ceil_div(task.targets, kLanes);
    const CountRows count_rows = lanes_.count[static_cast<int>(type_of(static_cast<const Element*>(nullptr)))];
    Tables tables = make_tables(task, groups, false);
    if (call_.moments != nullptr) {
      set_shifts<Element>(task, tables);
    }
    const int64_t most = std::clamp<int64_t>(
        kBlockBytes / (groups * kLanes * static_cast<int64_t>(sizeof(Element))), kFewRows, kBufferRows);
    alignas(64) Element buffer[kBufferRows * kLanes];
    int64_t table_rows = 0, sum_rows = 0, fold_rows = 0, most_sum_rows = kFirstSumRows;
    for_row_blocks<Element>(source, task.begin, task.end, most, [&](const Element* block, int64_t rows) {
      if (table_rows + rows > kMaxLaneRows || sum_rows + rows > most_sum_rows) {
        collect_sums(tables, sum_rows, false);
        sum_rows = 0;
        most_sum_rows = std::min(8 * most_sum_rows, kSumRows);
      }
      if (table_rows + rows > kMaxLaneRows) {
        collect_tables(task, tables, false);
        table_rows = 0;
      }
      const Element* const values = block + task.target * source.column_stride;
      const int64_t straight = source.column_stride == 1 ? task.targets / kLanes : 0;  // groups that need no copy
      if (straight > 0) {
        count_rows(values, rows, source.row_stride, straight, tables.grids.data(), tables.slots.data(),
                   wanted_sums(tables, 0));
      }
      for (int64_t group = straight; group < groups; ++group) {
        const Element* const from = values + group * kLanes * source.column_stride;
        const int64_t columns = std::min<int64_t>(kLanes, task.targets - group * kLanes);
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t column = 0; column < kLanes; ++column) {
            buffer[row * kLanes + column] =
                column < columns ? from[row * source.row_stride + column * source.column_stride] : Element(0.0f);
          }
        }
        count_rows(buffer, rows, kLanes, 1, &tables.grids[group], tables.slots.data() + group * kLanes * slots_,
                   wanted_sums(tables, group));
      }
      table_rows += rows;
      sum_rows += rows;
      fold_rows += rows;
      if (fold_rows >= kFoldRows) {
        fold(tables.sums);
        fold_rows = 0;
      }
    });
    collect_sums(tables, sum_rows, false);
    collect_tables(task, tables, false);
    store_moments(task, tables.moments.data());
  }

  // Lanes take turns with the values of one target.
  template <typename Element>
  void count_along(const CpuTask& task) {
    const Runs runs = runs_of_target<Element>(*task.source, call_.per, task.target);
    const CountRows count_rows = lanes_.count[static_cast<int>(type_of(static_cast<const Element*>(nullptr)))];
    Tables tables = make_tables(task, 1, true);
    if (call_.moments != nullptr) {
      Mean mean;
      for (int64_t begin = task.begin; begin < task.end && mean.empty(); begin += kShiftValues) {
        for_pieces<Element>(runs, begin, std::min(begin + kShiftValues, task.end),
                            [&](const Element* values, int64_t stride, int64_t length) {
                              for (int64_t i = 0; i < length; ++i) {
                                mean.add(to_double(values[i * stride]));
                              }
                            });
      }
      std::fill_n(tables.sums[0].shift, kLanes, mean.value());
    }
    int64_t table_rows = 0, sum_rows = 0, most_sum_rows = kFirstSumRows;
    const auto take_rows = [&](const Element* values, int64_t rows) {
      while (rows > 0) {
        const int64_t taken = std::min({rows, kMaxLaneRows - table_rows, most_sum_rows - sum_rows, kFoldRows});
        count_rows(values, taken, kLanes, 1, tables.grids.data(), tables.slots.data(), wanted_sums(tables, 0));
        fold(tables.sums);
        values += taken * kLanes;
        rows -= taken;
        table_rows += taken;
        sum_rows += taken;
        if (table_rows == kMaxLaneRows || sum_rows == most_sum_rows) {
          collect_sums(tables, sum_rows, true);
          sum_rows = 0;
          most_sum_rows = std::min(8 * most_sum_rows, kSumRows);
        }
        if (table_rows == kMaxLaneRows) {
          collect_tables(task, tables, true);
          table_rows = 0;
        }
      }
    };
    alignas(64) Element buffer[kBufferRows * kLanes];
    int64_t held = 0;
    for_pieces<Element>(runs, task.begin, task.end, [&](const Element* values, int64_t stride, int64_t length) {
      while (length > 0) {
        if (held == 0 && stride == 1 && length >= kLanes) {
          take_rows(values, length / kLanes);
          values += length / kLanes * kLanes;
          length %= kLanes;
          continue;
        }
        const int64_t copied = std::min(length, kBufferRows * kLanes - held);
        for (int64_t i = 0; i < copied; ++i) {
          buffer[held + i] = values[i * stride];
        }
        values += copied * stride;
        length -= copied;
        held += copied;
        if (held == kBufferRows * kLanes || (stride == 1 && length >= kBufferRows * kLanes && held % kLanes == 0)) {
          take_rows(buffer, held / kLanes);
          held = 0;
        }
      }
    });
    take_rows(buffer, held / kLanes);
    collect_sums(tables, sum_rows, true);
    collect_tables(task, tables, true);
    const Element* const rest = buffer + held / kLanes * kLanes;
    ScalarCounter direct(call_, task, results_lock_);
    for (int64_t i = 0; i < held % kLanes; ++i) {
      direct.take(0, rest[i]);
    }
    direct.collect();
    merge(tables.moments[0], direct.moments(0));
    store_moments(task, tables.moments.data());
  }

  template <typename Element>
  void count_directly(const CpuTask& task) {
    const Source& source = *task.source;
    ScalarCounter direct(call_, task, results_lock_);
    if (side_by_side(source)) {
      for_row_blocks<Element>(source, task.begin, task.end, 1, [&](const Element* row, int64_t) {
        for (int64_t index = 0; index < task.targets; ++index) {
          direct.take(index, row[(task.target + index) * source.column_stride]);
        }
      });
    } else {
      const Runs runs = runs_of_target<Element>(source, call_.per, task.target);
      if (codes_ && task.end - task.begin >= kTaskValues) {
        direct.take_codes(runs);
      } else {
        for_pieces<Element>(runs, task.begin, task.end, [&](const Element* values, int64_t stride, int64_t length) {
          for (int64_t i = 0; i < length; ++i) {
            direct.take(0, values[i * stride]);
          }
        });
      }
    }
    direct.collect();
    std::vector<Moments> moments(task.targets);
    for (int64_t index = 0; index < task.targets; ++index) {
      moments[index] = direct.moments(index);
    }
    store_moments(task, moments.data());
  }

  // Columns are shifted by the mean of their first values, or by the first finite one where there is none among them.
  template <typename Element>
  void set_shifts(const CpuTask& task, Tables& tables) const {
    std::vector<Mean> means(task.targets);
    bool any_empty = true;
    for (int64_t at = task.begin; at < task.end && (any_empty || at < task.begin + kFewRows); ++at) {
      any_empty = false;
      for_row_blocks<Element>(*task.source, at, at + 1, 1, [&](const Element* row, int64_t) {
        for (int64_t index = 0; index < task.targets; ++index) {
          if (at < task.begin + kFewRows || means[index].empty()) {
            means[index].add(to_double(row[(task.target + index) * task.source->column_stride]));
          }
          any_empty = any_empty || means[index].empty();
        }
      });
    }
    for (int64_t index = 0; index < task.targets; ++index) {
      tables.sums[index / kLanes].shift[index % kLanes] = means[index].value();
    }
  }

  const Call& call_;
  const Lanes& lanes_;
  const bool codes_;
  const int64_t slots_;  // per lane
  const bool wide_;      // more bins than the lanes' tables take
  std::vector<CpuTask> tasks_;
  int64_t values_ = 0, parts_ = 0;
  std::vector<Moments> moments_;  // [parts, K]
  std::mutex results_lock_;
};

std::tuple<Tensor, Tensor, Tensor> histogram_cpu(std::vector<Tensor> x, std::optional<Tensor> grid, int64_t bins,
                                                 int64_t per, bool statistics, std::optional<Tensor> only) {
  const Call call = prepare(x, grid, bins, per, statistics, only);
  const Lanes* const lanes = lanes_here();
  STD_TORCH_CHECK(lanes != nullptr, "histogram: LAMBDA_KERNELS_CPU_CAPABILITY must be AVX512, AVX2 or plain, and one "
                  "that this processor has; got ", std::getenv("LAMBDA_KERNELS_CPU_CAPABILITY"));
  CpuHistogram counting(call, *lanes);
  switch (call.dtype) {
    case ScalarType::Float:
      counting.run<float>();
      break;
    case ScalarType::Half:
      counting.run<Half>();
      break;
    case ScalarType::BFloat16:
      counting.run<BFloat16>();
      break;
    default:
      counting.run<double>();
  }
  counting.finish();
  return call.results;
}

}  // namespace
}  // namespace lambda_kernels

STABLE_TORCH_LIBRARY_IMPL(lambda_kernels, CPU, library) {
  library.impl("histogram", TORCH_BOX(&lambda_kernels::histogram_cpu));
}
