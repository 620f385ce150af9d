// The kernels of csrc/histogram_cuda.cu on a CPU: planned by the same function, every phase run thread after thread,
// every access to memory checked. Compiled and called by test_histogram_phases.py.

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "histogram_phases.h"

namespace lambda_kernels {
namespace {

// What the test asks about; the order is known to the test.
enum Finding : int64_t {
  kOutOfBounds,   // accesses beyond shared memory, or to global memory where no tensor is
  kMisaligned,    // loads that a GPU would refuse
  kRaces,         // shared words written by one thread and touched by another without a barrier between
  kUnset,         // shared words read before anything was written
  kConflicts,     // the most lanes of a warp that met in one bank in one step
  kLaunches,
  kBlocks,
  kWidth,         // the narrowest
  kSharedBytes,   // the most
  kBlockThreads,  // the most
  kVectorLoads,
  kInDeviceMemory,  // launches that count bins there
  kFixed,         // values placed by the fixed-point form, or without the need for it
  kRest,          // values that took the definition afterwards
  kFindings
};

struct Checks {
  std::vector<const char*> begin, end;  // of the tensors' memory
  int64_t findings[kFindings] = {};
};

// Shared memory of one block.
class Shared {
 public:
  Shared(int64_t bytes, int32_t threads, Checks& checks)
      : checks_(checks), words_(bytes / 4, 0xdeadbeef), set_(words_.size()), writer_(words_.size()),
        reader_(words_.size()), steps_(threads) {}

  // A barrier: what was written before it may be touched by all.
  void synchronize() {
    for (size_t warp = 0; warp < steps_.size(); warp += kWarp) {
      size_t steps = 0;
      for (int32_t lane = 0; lane < kWarp; ++lane) {
        steps = std::max(steps, steps_[warp + lane].size());
      }
      for (size_t step = 0; step < steps; ++step) {
        int64_t banks[32] = {};
        for (int32_t lane = 0; lane < kWarp; ++lane) {
          const std::vector<int32_t>& own = steps_[warp + lane];
          if (step < own.size()) {
            int64_t& most = checks_.findings[kConflicts];
            most = std::max(most, ++banks[own[step] % 32]);
          }
        }
      }
    }
    for (auto& own : steps_) {
      own.clear();
    }
    std::fill(writer_.begin(), writer_.end(), 0);
    std::fill(reader_.begin(), reader_.end(), 0);
  }

  bool valid(int64_t word) {
    const bool inside = word >= 0 && word < static_cast<int64_t>(words_.size());
    checks_.findings[kOutOfBounds] += !inside;
    return inside;
  }

  void write(int64_t word, int32_t thread, uint32_t value) {
    if (valid(word)) {
      touch(word, thread, writer_);
      words_[word] = value;
      set_[word] = true;
    }
  }

  uint32_t read(int64_t word, int32_t thread) {
    if (!valid(word)) {
      return 0;
    }
    touch(word, thread, reader_);
    checks_.findings[kUnset] += !set_[word];
    return words_[word];
  }

  void add(int64_t word) {
    if (valid(word)) {
      checks_.findings[kUnset] += !set_[word];
      checks_.findings[kRaces] += writer_[word] != 0 || reader_[word] != 0;
      ++words_[word];
    }
  }

  std::vector<int32_t>& steps(int32_t thread) { return steps_[thread]; }

 private:
  void touch(int64_t word, int32_t thread, std::vector<int32_t>& own) {
    const bool writes = &own == &writer_;
    const bool others = (writer_[word] != 0 && writer_[word] != thread + 1) ||
                        (writes && reader_[word] != 0 && reader_[word] != thread + 1);
    checks_.findings[kRaces] += others;
    own[word] = own[word] != 0 && own[word] != thread + 1 ? -1 : thread + 1;
  }

  Checks& checks_;
  std::vector<uint32_t> words_;
  std::vector<bool> set_;
  std::vector<int32_t> writer_, reader_;  // since the last barrier: thread + 1, −1 if several, 0 if none
  std::vector<std::vector<int32_t>> steps_;
};

// A thread's way to memory.
class Memory {
 public:
  Memory(Shared& shared, Checks& checks, int32_t thread) : shared_(shared), checks_(checks), thread_(thread) {}

  template <int kWords>
  void load(const char* from, uint32_t* words) {
    ++checks_.findings[kVectorLoads];
    load_element<kWords>(from, words);
  }
  template <int kWords>
  void load_element(const char* from, uint32_t* words) {
    if (readable(from, 4 * kWords)) {
      memcpy(words, from, 4 * kWords);
    }
  }
  uint16_t load_short(const char* from) {
    uint16_t bits = 0;
    if (readable(from, 2)) {
      memcpy(&bits, from, 2);
    }
    return bits;
  }

  using Column = int32_t;
  Column column(int32_t column) { return column; }
  Column stride(int32_t width) { return width; }
  void count(bool placed, Column column, int32_t row, Column stride) {
    checks_.findings[kFixed] += placed;
    shared_.steps(thread_).push_back(row * stride + column);
    shared_.add(row * stride + column);
  }
  void count_rest(Column column, int32_t row, Column stride) {
    ++checks_.findings[kRest];
    shared_.add(row * stride + column);
  }
  void set_counter(int32_t cell, uint32_t value) { shared_.write(cell, thread_, value); }
  uint32_t counter(int32_t cell) { return shared_.read(cell, thread_); }
  void add(int64_t* counter, int64_t count) { *counter += count; }

  void set_double(int32_t slot, double value) {
    uint32_t words[2];
    memcpy(words, &value, sizeof words);
    shared_.write(2 * int64_t{slot}, thread_, words[0]);
    shared_.write(2 * int64_t{slot} + 1, thread_, words[1]);
  }
  double get_double(int32_t slot) {
    const uint32_t words[2] = {shared_.read(2 * int64_t{slot}, thread_), shared_.read(2 * int64_t{slot} + 1, thread_)};
    double value;
    memcpy(&value, words, sizeof value);
    return value;
  }

 private:
  bool readable(const char* from, int64_t bytes) {
    checks_.findings[kMisaligned] += reinterpret_cast<intptr_t>(from) % bytes != 0;
    for (size_t i = 0; i < checks_.begin.size(); ++i) {
      if (from >= checks_.begin[i] && from + bytes <= checks_.end[i]) {
        return true;
      }
    }
    ++checks_.findings[kOutOfBounds];
    return false;
  }

  Shared& shared_;
  Checks& checks_;
  int32_t thread_;
};

template <typename Kernel>
class Block {
 public:
  Block(const Launch& launch, Checks& checks)
      : shared_(launch.shared_bytes, launch.threads, checks), checks_(checks), states_(launch.threads) {}

  template <typename Phase>
  void each(Phase phase) {
    for (size_t thread = 0; thread < states_.size(); ++thread) {
      Memory memory(shared_, checks_, static_cast<int32_t>(thread));
      phase(static_cast<int32_t>(thread), memory, states_[thread]);
    }
    shared_.synchronize();
  }

 private:
  Shared shared_;
  Checks& checks_;
  std::vector<typename Kernel::State> states_;
};

template <typename Kernel>
void run_kernel(const Launch& launch, Checks& checks) {
  for (int32_t index = launch.blocks; index-- > 0;) {  // any order will do
    Block<Kernel> block(launch, checks);
    run_block<Kernel>(launch, index, block);
  }
}

template <typename Element>
void run(const Launch& launch, Moments* moments, Checks& checks) {
  with_kernel<Element>(launch, [&](auto kernel) { run_kernel<decltype(kernel)>(launch, checks); });
  if (launch.partials == nullptr) {
    return;
  }
  for (int64_t index = 0; index < launch.targets; ++index) {
    Moments lanes[kWarp];
    for (int32_t lane = 0; lane < kWarp; ++lane) {
      lanes[lane] = MergedMoments::gather(launch, index, lane);
    }
    for (int32_t half = kWarp / 2; half > 0; half /= 2) {
      for (int32_t lane = 0; lane < half; ++lane) {
        merge(lanes[lane], lanes[lane + half]);
      }
    }
    MergedMoments::write(launch, index, lanes[0], moments);
  }
}

}  // namespace

// `tensors` has for each tensor its address, its sizes and strides as in Source, its first target, and the bounds of
// the memory that may be read; `gpu` has the multiprocessors, bytes of shared memory of a block and of a
// multiprocessor, and threads of a multiprocessor. `element`: 0 float32, 1 bfloat16, 2 float16, 3 float64.
extern "C" void emulate(int64_t element, int64_t count, const int64_t* tensors, int64_t per, int64_t bins,
                        const double* grid, const bool* only, int64_t* counts, int64_t* outside, double* moments,
                        const int64_t* gpu, int64_t* findings) {
  Checks checks;
  std::vector<Source> sources;
  for (int64_t i = 0; i < count; ++i, tensors += 10) {
    sources.push_back({reinterpret_cast<const void*>(tensors[0]), tensors[1], tensors[2], tensors[3], tensors[4],
                       tensors[5], tensors[6], tensors[7]});
    checks.begin.push_back(reinterpret_cast<const char*>(tensors[8]));
    checks.end.push_back(reinterpret_cast<const char*>(tensors[9]));
  }
  const int32_t bytes[] = {4, 2, 2, 8};
  const Wanted wanted{static_cast<Per>(per), static_cast<int32_t>(bins), moments != nullptr, bytes[element]};
  const Device device{static_cast<int32_t>(gpu[0]), gpu[1], gpu[2]};
  checks.findings[kWidth] = kWarp;
  for (Launch& launch : plan(sources, wanted, device, static_cast<int32_t>(gpu[3]))) {
    std::vector<Moments> partials(moments != nullptr ? launch.partial_count : 0, Moments{NAN, NAN, NAN, NAN, NAN, NAN, NAN});
    launch.grid = reinterpret_cast<const ChannelGrid*>(grid);
    launch.only = only;
    launch.counts = counts;
    launch.outside = outside;
    launch.partials = partials.empty() ? nullptr : partials.data();
    auto* const results = reinterpret_cast<Moments*>(moments);
    element == 0   ? run<float>(launch, results, checks)
    : element == 1 ? run<BFloat16>(launch, results, checks)
    : element == 2 ? run<Half>(launch, results, checks)
                   : run<double>(launch, results, checks);
    ++checks.findings[kLaunches];
    checks.findings[kBlocks] += launch.blocks;
    checks.findings[kInDeviceMemory] += launch.table_bins != launch.bins;
    checks.findings[kWidth] = std::min<int64_t>(checks.findings[kWidth], launch.tasks[0].width);
    checks.findings[kSharedBytes] = std::max(checks.findings[kSharedBytes], launch.shared_bytes);
    checks.findings[kBlockThreads] = std::max<int64_t>(checks.findings[kBlockThreads], launch.threads);
  }
  std::copy(checks.findings, checks.findings + kFindings, findings);
}

}  // namespace lambda_kernels
