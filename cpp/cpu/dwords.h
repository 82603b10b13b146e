// Products of weights and panels that are packed along k: a dword holds several neighbours of a
// row, or of a token, and one instruction multiplies and adds them up. A row's dword is broadcast
// to the lanes, which hold the dwords of 16 tokens each.
#pragma once

#include "cpu/simd.h"

#if defined(__AVX512VNNI__)

namespace tda {
namespace {

constexpr int64_t kPanel = 2 * kLanes;

/// Some dwords of each of a panel's tokens.
template <int kDwords>
using PanelDwords = std::int32_t[kDwords][kPanel];

/// sums[m] += row m times b for m < kRows; at(m) is where the row's first dword lies, the next ones
/// follow kStep bytes apart.
///
/// Add is one piece of assembly for a dword and both halves of b: from intrinsics, or in a loop,
/// compilers (GCC 12) copy the sums about, many of them to memory, though there are registers for
/// all.
template <class Add, int kRows, int kStep, int kDwords, class At>
inline void add_products(const At& at, const PanelDwords<kDwords>& b, __m512i sums[kRows][2]) {
#pragma GCC unroll 16
  for (int k = 0; k < kDwords; ++k) {
    const __m512i b0 = _mm512_loadu_si512(b[k]), b1 = _mm512_loadu_si512(b[k] + kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m) Add::add(sums[m], at(m) + k * kStep, b0, b1);
  }
}

}  // namespace
}  // namespace tda

#endif
