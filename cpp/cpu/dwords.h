// Products of weights and panels packed along k: a dword holds consecutive values of a row or of a
// token, two of bf16 or four bytes, and one instruction gives their dot product. The row's dword is
// broadcast to all lanes; a vector holds the dwords of 16 tokens.
#pragma once

#include <cstddef>

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "weights/quantize.h"

#if defined(__AVX512VNNI__)

namespace tda {
namespace {

constexpr int64_t kPanel = 2 * kLanes;

/// kDwords dwords of each token of a panel.
template <int kDwords>
using PanelDwords = std::int32_t[kDwords][kPanel];

/// sums[m] += row m times b for m < kRows. at(m) is the address of the row's first dword, the next
/// ones are kStep bytes apart.
///
/// Add is inline assembly for one dword and both halves of b: from intrinsics, or in a loop, GCC 12
/// spills many of the sums to memory, though there are registers for all.
template <class Add, int kRows, int kStep, int kDwords, class At>
inline void add_products(const At& at, const PanelDwords<kDwords>& b, __m512i sums[kRows][2]) {
#pragma GCC unroll 16
  for (int k = 0; k < kDwords; ++k) {
    const __m512i b0 = _mm512_loadu_si512(b[k]), b1 = _mm512_loadu_si512(b[k] + kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m) Add::add(sums[m], at(m) + k * kStep, b0, b1);
  }
}

/// Prefetches the rows that are likely to be multiplied next, spread over the steps of the current
/// work. Without it, waiting for memory takes up to a quarter of the time of short prompts.
class NextRows {
 public:
  /// bytes: of each row; steps: the number of calls of prefetch()
  NextRows(const void* first, int64_t stride, int64_t bytes, int64_t rows, int64_t steps)
      : next_(static_cast<const std::byte*>(first)),
        stride_(stride),
        bytes_(bytes),
        rows_(rows),
        steps_(steps) {}

  void prefetch() {
    for (due_ += rows_; due_ >= steps_; due_ -= steps_, next_ += stride_)
      for (int64_t i = 0; i < bytes_; i += kLineBytes) prefetch_l2(next_ + i);
  }

 private:
  const std::byte* next_;
  int64_t stride_, bytes_, rows_, steps_;
  int64_t due_ = 0;  // in units of 1 / steps_ row
};

/// NextRows of a format: whole rows, or one group of their columns.
template <class Row>
class NextRowsOf {
 public:
  NextRowsOf(const Rows& w, int64_t first, int64_t rows, int64_t steps)
      : codes_(Row(w, first).group(0), Row::stride(w), Row::bytes(w.n), rows, steps),
        scales_(nullptr, 0, 0, 0, steps) {}
  NextRowsOf(const Rows& w, int64_t first, int64_t rows, int64_t steps, int64_t group)
      : codes_(Row(w, first).group(group), Row::stride(w), Row::kGroupBytes, rows, steps),
        scales_(Row(w, first).scales_at(group), Row::stride(w), Row::kScales, rows, steps) {}
  void prefetch() {
    codes_.prefetch();
    if (Row::kScales > 0) scales_.prefetch();
  }

 private:
  NextRows codes_, scales_;
};

}  // namespace
}  // namespace tda

#endif
