// How the CPU half walks through a tensor: as rows of neighbouring columns, or along the values of one target.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "problem.h"

namespace lambda_kernels {

// The values that share one target, as runs of equal length.
struct Runs {
  const void* data;
  int64_t outer, inner, length;  // outer · inner runs
  int64_t outer_stride, inner_stride, stride;

  int64_t offset_of(int64_t run) const { return run / inner * outer_stride + run % inner * inner_stride; }
};

// Three dimensions of (size, stride) as runs: the smallest stride innermost, and what lies end to end joined.
inline Runs runs_of(const void* data, std::array<std::pair<int64_t, int64_t>, 3> dimensions) {
  std::sort(dimensions.begin(), dimensions.end(), [](const auto& a, const auto& b) {
    return a.first == 1 || b.first == 1 ? a.first == 1 && b.first != 1 : a.second > b.second;
  });
  auto& [outer, inner, run] = dimensions;
  if (inner.first == 1 || inner.second == run.first * run.second) {
    run.first *= inner.first;
    inner = std::exchange(outer, {1, 0});
    if (inner.first == 1 || inner.second == run.first * run.second) {
      run.first *= inner.first;
      inner = {1, 0};
    }
  } else if (outer.first == 1 || outer.second == inner.first * inner.second) {
    inner.first *= outer.first;
    outer = {1, 0};
  }
  return {data, outer.first, inner.first, run.first, outer.second, inner.second, run.second};
}

// The runs of the target `index` of a source.
template <typename Element>
Runs runs_of_target(const Source& source, Per per, int64_t index) {
  const Element* data = static_cast<const Element*>(source.data);
  std::pair<int64_t, int64_t> outer{source.outer, source.outer_stride}, rows{source.rows, source.row_stride},
      columns{source.columns, source.column_stride};
  if (per == kPerChannel) {
    data += index * source.column_stride;
    columns = {1, 0};
  } else if (per == kPerSample) {
    data += index * source.outer_stride;
    outer = {1, 0};
  }
  return runs_of(data, {outer, rows, columns});
}

// Calls `take(pointer, stride, length)` for the pieces of runs that the values [begin, end) lie in, in order.
template <typename Element, typename Take>
void for_pieces(const Runs& runs, int64_t begin, int64_t end, const Take& take) {
  for (int64_t run = begin / runs.length, at = begin % runs.length; begin < end; ++run, at = 0) {
    const int64_t length = std::min(runs.length - at, end - begin);
    take(static_cast<const Element*>(runs.data) + runs.offset_of(run) + at * runs.stride, runs.stride, length);
    begin += length;
  }
}

// Calls `take(pointer, rows)` for blocks of at most `most` of the rows [begin, end) that are `row_stride` apart; rows
// are counted through all of `outer`.
template <typename Element, typename Take>
void for_row_blocks(const Source& source, int64_t begin, int64_t end, int64_t most, const Take& take) {
  while (begin < end) {
    const int64_t row = begin % source.rows;
    const int64_t rows = std::min({source.rows - row, end - begin, most});
    take(static_cast<const Element*>(source.data) + begin / source.rows * source.outer_stride + row * source.row_stride,
         rows);
    begin += rows;
  }
}

}  // namespace lambda_kernels
