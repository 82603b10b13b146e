// A matrix that is quantised to bricks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <vector>

#include "aligned.h"
#include "weights/bricks.h"

struct StoredBricks {
  std::int64_t rows, cols;
  AlignedBytes memory;
  tda::Bricks w;

  /// All zeros, to be filled.
  StoredBricks(std::int64_t row_count, std::int64_t col_count, tda::BrickKind kind,
               bool by_block = false)
      : rows(row_count),
        cols(col_count),
        memory(tda::Bricks(nullptr, rows, cols, kind, by_block).bytes()),
        w(memory.data(), rows, cols, kind, by_block) {}
  /// values: [rows, cols]. inputs: see quantize_bricks
  StoredBricks(std::int64_t row_count, const std::vector<float>& values, tda::BrickKind kind,
               bool by_block = false, const tda::InputFactor* inputs = nullptr)
      : StoredBricks(row_count, std::ssize(values) / row_count, kind, by_block) {
    const std::int64_t stride = 32 * w.blocks;
    for (std::int64_t s = 0; s < w.strips; ++s) {
      std::vector<float> strip(64 * stride);
      for (std::int64_t r = 64 * s; r < std::min(rows, 64 * s + 64); ++r)
        std::copy_n(values.data() + r * cols, cols, strip.data() + (r - 64 * s) * stride);
      tda::quantize_bricks(w, s, strip.data(), inputs);
    }
    if (w.has_rests()) tda::measure_rests(w, 0, w.blocks);
  }
};
