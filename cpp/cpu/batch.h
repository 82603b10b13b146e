// Batches of neurons, and what they want of memory. Included by kernel sources only, like simd.h.
#pragma once

#include "cpu/simd.h"

namespace tda {
namespace {

/// Neurons worked on at a time: their down rows share what is loaded and stored of y.
constexpr int64_t kBatch = 16;

/// Per-lane sums of up to kBatch rows on their way to one float each.
struct Products {
  Floats lanes[kBatch];

  /// The first `count`, up to a whole vector of them; whatever stands behind them becomes 0.
  void store_to(float* out, int64_t count) {
    for (int64_t i = count; i % kLanes != 0; ++i) lanes[i] = Floats{};
    for (int64_t i = 0; i < count; i += kLanes) store(out + i, sums(lanes + i));
  }
};

/// Whole vectors of them.
inline void activate(Activation activation, float* values, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes)
    store(values + i, activate(activation, load_as<Floats>(values + i)));
}

// ---- memory ---------------------------------------------------------------------------------
//
// Rows that follow each other are read in order and left to the hardware, which prefetches plain
// streams best. What a selection wants is scattered: its cache lines are asked for a few at a time,
// between other work, so that memory is never idle and never overrun; into the second-level cache,
// since the first level can have only few misses under way.

/// Units of time, cycles by order of magnitude: of a group of 64 of one neuron's gate and up, and
/// of a line of a batch's down rows.
constexpr int64_t kSketchUnits = 4, kRestUnits = 6, kLineUnits = 80;

class Wanted {
 public:
  void clear() { count_ = next_ = left_ = units_ = 0; }
  void add(const std::uint8_t* row, int64_t bytes) {
    const auto at = reinterpret_cast<std::uintptr_t>(row);
    const std::uintptr_t first = at / 64, end = (at + static_cast<std::uintptr_t>(bytes) + 63) / 64;
    // What follows the last one, or shares a line with it, makes it longer.
    const bool follows = count_ > 0 && first <= rows_[count_ - 1].end &&
                         first + 1 >= rows_[count_ - 1].end && end > rows_[count_ - 1].end;
    if (!follows) rows_[count_++] = {first, first};
    Lines& lines = rows_[count_ - 1];
    left_ += static_cast<int64_t>(end - lines.end);
    lines.end = end;
  }
  /// All that is left is to be spread evenly over so many units of time.
  void spread(int64_t units) { units_ = units; }
  /// Asks for what is due in a piece of work that takes so many units.
  void ask(int64_t units) {
    int64_t lines = units < units_ ? left_ * units / units_ : left_;
    units_ -= units;
    left_ -= lines;
    while (lines > 0) {
      Lines& row = rows_[next_];
      const std::uintptr_t some = min(lines, static_cast<int64_t>(row.end - row.begin));
      for (std::uintptr_t line = row.begin; line < row.begin + some; ++line)
        __builtin_prefetch(reinterpret_cast<const void*>(line * 64), 0, 2);
      row.begin += some;
      lines -= static_cast<int64_t>(some);
      next_ += row.begin == row.end;
    }
  }
  void ask_for_rest() { ask(units_); }

 private:
  struct Lines {  // of 64 bytes, by number
    std::uintptr_t begin, end;
  };
  static constexpr int64_t kMost = 6 * kBatch;
  int64_t count_ = 0, next_ = 0, left_ = 0, units_ = 0;
  Lines rows_[kMost];
};

}  // namespace
}  // namespace tda
