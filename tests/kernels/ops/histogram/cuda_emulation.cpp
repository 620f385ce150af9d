// The kernels of csrc/histogram_cuda.cu on a CPU: planned by the same function, every phase run thread after thread,
// every access to memory checked. Compiled and called by test_histogram_phases.py.

#include <algorithm>
#include <cstdlib>
#include <utility>
#include <vector>

#include "histogram_phases.h"

namespace lambda_kernels {
namespace {

// What the test asks about; the order is known to the test.
enum Finding : int64_t {
  kOutOfBounds,   // accesses beyond shared memory, or to global memory where no tensor is
  kMisaligned,    // loads that a GPU would refuse
  kRaces,         // shared words written by one thread and touched by another without a barrier between
  kUnset,         // shared words read before anything was written, or while a copy to them is on its way
  kConflicts,     // the most lanes of a warp that met in one bank in one step
  kTakeConflicts,  // the same of values taken from stages, where lanes may share a word
  kLaunches,
  kBlocks,
  kWidth,         // the narrowest
  kSharedBytes,   // the most
  kBlockThreads,  // the most
  kVectorLoads,
  kCopies,        // those of them that go to shared memory
  kStages,        // the most
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
      : checks_(checks), words_(bytes / 4), groups_(threads), steps_(threads), takes_(threads),
        warp_barriers_(threads / kWarp) {}

  // A barrier: what was written before it may be touched by all. Nothing is on its way then.
  void synchronize() {
    for (size_t warp = 0; warp < steps_.size(); warp += kWarp) {
      judge(steps_, warp, checks_.findings[kConflicts]);
    }
    for (Word& word : words_) {
      checks_.findings[kRaces] += word.on_its_way;
      word.writer = word.reader = kNobody;
    }
  }

  // A barrier of a warp: what its lanes wrote may be touched by the others of them.
  void synchronize_warp(int32_t first_thread) {
    judge(takes_, first_thread, checks_.findings[kTakeConflicts]);
    ++warp_barriers_[first_thread / kWarp];
  }

  bool valid(int64_t word) {
    const bool inside = word >= 0 && word < static_cast<int64_t>(words_.size());
    checks_.findings[kOutOfBounds] += !inside;
    return inside;
  }

  void write(int64_t word, int32_t thread, uint32_t value) {
    if (valid(word)) {
      touch_to_write(word, thread);
      words_[word].value = value;
      words_[word].set = true;
    }
  }

  uint32_t read(int64_t word, int32_t thread) {
    if (!valid(word)) {
      return 0;
    }
    Word& own = words_[word];
    checks_.findings[kRaces] += is_race(own.writer, own.written, thread);
    checks_.findings[kUnset] += !own.set || own.on_its_way;
    const bool other_warp = own.reader == kSeveral || (own.reader >= 0 && own.reader / kWarp != thread / kWarp);
    // Of a warp's lanes that read since its last barrier, any two stand for all.
    const bool again = own.reader >= 0 && own.reader != thread && own.read == warp_barriers_[thread / kWarp];
    own.several_lanes = again || (own.several_lanes && own.read == warp_barriers_[thread / kWarp]);
    own.reader = other_warp ? kSeveral : thread;
    own.read = warp_barriers_[thread / kWarp];
    return own.value;
  }

  void add(int64_t word) {
    if (valid(word)) {
      Word& own = words_[word];
      checks_.findings[kUnset] += !own.set;
      checks_.findings[kRaces] += own.writer != kNobody || own.reader != kNobody;
      ++own.value;
    }
  }

  // A copy of 16 bytes: its words are written at any time from now to the end of the thread's wait for it.
  void copy(int64_t to, const char* from, int32_t thread) {
    for (int64_t word = to / 4; word < to / 4 + 4; ++word) {
      if (!valid(word)) {
        return;
      }
      touch_to_write(word, thread);
      checks_.findings[kRaces] += words_[word].on_its_way;
      words_[word].on_its_way = true;
    }
    groups_[thread].open.push_back({to / 4, from});
  }

  void commit(int32_t thread) {
    groups_[thread].closed.push_back(std::move(groups_[thread].open));
    groups_[thread].open.clear();
  }

  void wait(size_t pending, int32_t thread) {
    auto& closed = groups_[thread].closed;
    for (; closed.size() > pending; closed.erase(closed.begin())) {
      for (const auto& [to, from] : closed.front()) {
        for (int64_t word = 0; word < 4; ++word) {
          uint32_t value;
          memcpy(&value, from + 4 * word, 4);
          words_[to + word].on_its_way = false;
          write(to + word, thread, value);
        }
      }
    }
  }

  std::vector<int32_t>& steps(int32_t thread) { return steps_[thread]; }
  std::vector<int32_t>& takes(int32_t thread) { return takes_[thread]; }

 private:
  static constexpr int32_t kNobody = -1, kSeveral = -2;

  // A word, and who touched it since the last barrier of the block: the last thread, and after how many barriers of its
  // warp it did.
  struct Word {
    uint32_t value = 0xdeadbeef;
    bool set = false, on_its_way = false, several_lanes = false;
    int32_t writer = kNobody, reader = kNobody;  // kSeveral: of different warps
    int64_t written = 0, read = 0;
  };

  struct Groups {
    std::vector<std::pair<int64_t, const char*>> open;
    std::vector<std::vector<std::pair<int64_t, const char*>>> closed;
  };

  // Whether a thread touches what another one touched after the same barrier of their warp, or one of another warp.
  bool is_race(int32_t other, int64_t when, int32_t thread) const {
    if (other == kNobody || other == thread) {
      return false;
    }
    return other == kSeveral || other / kWarp != thread / kWarp || when == warp_barriers_[thread / kWarp];
  }

  void touch_to_write(int64_t word, int32_t thread) {
    Word& own = words_[word];
    const bool several = own.several_lanes && own.reader >= 0 && own.read == warp_barriers_[thread / kWarp];
    checks_.findings[kRaces] +=
        is_race(own.writer, own.written, thread) || is_race(own.reader, own.read, thread) || several;
    own.writer = thread;
    own.written = warp_barriers_[thread / kWarp];
  }

  // In each step, how many words lanes of the warp want of a bank; a word that several read is one.
  void judge(std::vector<std::vector<int32_t>>& of_threads, size_t warp, int64_t& most) {
    size_t steps = 0;
    for (int32_t lane = 0; lane < kWarp; ++lane) {
      steps = std::max(steps, of_threads[warp + lane].size());
    }
    for (size_t step = 0; step < steps; ++step) {
      std::vector<int32_t> banks[32];
      for (int32_t lane = 0; lane < kWarp; ++lane) {
        const std::vector<int32_t>& own = of_threads[warp + lane];
        if (step < own.size()) {
          std::vector<int32_t>& bank = banks[own[step] % 32];
          if (&of_threads == &steps_ || std::find(bank.begin(), bank.end(), own[step]) == bank.end()) {
            bank.push_back(own[step]);
          }
          most = std::max<int64_t>(most, bank.size());
        }
      }
    }
    for (int32_t lane = 0; lane < kWarp; ++lane) {
      of_threads[warp + lane].clear();
    }
  }

  Checks& checks_;
  std::vector<Word> words_;
  std::vector<Groups> groups_;  // of copies, for each thread
  std::vector<std::vector<int32_t>> steps_, takes_;
  std::vector<int64_t> warp_barriers_;
};

// A thread's way to memory.
class Memory {
 public:
  Memory(Shared& shared, Checks& checks, int32_t thread) : shared_(shared), checks_(checks), thread_(thread) {}

  void load(const char* from, uint32_t* words) {
    ++checks_.findings[kVectorLoads];
    load_element<4>(from, words);
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

  int32_t kept(int32_t value) { return value; }
  uint32_t address(int32_t byte) { return byte; }
  void copy(uint32_t to, const char* from) {
    ++checks_.findings[kVectorLoads];
    ++checks_.findings[kCopies];
    checks_.findings[kMisaligned] += to % 16 != 0;
    if (readable(from, 16)) {
      shared_.copy(to, from, thread_);
    }
  }
  void commit() { shared_.commit(thread_); }
  void wait(int32_t pending) { shared_.wait(pending, thread_); }
  template <int kBytes>
  void take(uint32_t from, uint32_t* words) {
    checks_.findings[kMisaligned] += from % kBytes != 0;
    const uint32_t word = shared_.read(from / 4, thread_);
    words[0] = kBytes == 2 ? word >> (8 * (from % 4)) & 0xffff : word;
    if (kBytes == 8) {
      words[1] = shared_.read(from / 4 + 1, thread_);
    }
    shared_.takes(thread_).push_back(from / 4);
  }

  uint32_t column(int32_t column) { return column; }
  uint32_t stride(int32_t width) { return width; }
  void count(bool placed, uint32_t column, int32_t row, uint32_t stride) {
    checks_.findings[kFixed] += placed;
    shared_.steps(thread_).push_back(row * stride + column);
    shared_.add(row * stride + column);
  }
  void count_rest(uint32_t column, int32_t row, uint32_t stride) {
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

  struct Warp {
    Block& block;
    int32_t first_thread;

    template <typename Phase>
    void each(Phase phase) {
      for (int32_t thread = first_thread; thread < first_thread + kWarp; ++thread) {
        Memory memory(block.shared_, block.checks_, thread);
        phase(thread, memory, block.states_[thread]);
      }
      block.shared_.synchronize_warp(first_thread);
    }
  };

  template <typename Phases>
  void each_warp(Phases phases) {
    for (size_t thread = 0; thread < states_.size(); thread += kWarp) {
      Warp warp{*this, static_cast<int32_t>(thread)};
      phases(static_cast<int32_t>(thread), warp);
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
    const Moments unset{NAN, NAN, NAN, NAN, NAN, NAN, NAN};
    std::vector<Moments> partials(moments != nullptr ? launch.partial_count : 0, unset);
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
    checks.findings[kStages] = std::max<int64_t>(checks.findings[kStages], launch.stages);
    checks.findings[kBlockThreads] = std::max<int64_t>(checks.findings[kBlockThreads], launch.threads);
  }
  std::copy(checks.findings, checks.findings + kFindings, findings);
}

}  // namespace lambda_kernels
