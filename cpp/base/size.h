#pragma once

#include <cstdint>
#include <limits>

namespace tda {

/// A non-negative number of elements or bytes with saturating products and sums: a result beyond 63
/// bits becomes the largest value. No file or memory is that large, so checks against the actual
/// size reject it.
class Size {
 public:
  constexpr Size(std::int64_t value = 0) : value_(value) {}
  constexpr std::int64_t value() const { return value_; }
  constexpr bool too_large() const { return value_ == kMost; }

  friend constexpr Size operator*(Size a, Size b) {
    std::int64_t product = 0;
    return __builtin_mul_overflow(a.value_, b.value_, &product) ? kMost : product;
  }
  friend constexpr Size operator+(Size a, Size b) {
    std::int64_t sum = 0;
    return __builtin_add_overflow(a.value_, b.value_, &sum) ? kMost : sum;
  }
  /// The next multiple of `unit`.
  constexpr Size rounded_up(std::int64_t unit) const {
    const Size padded = *this + Size(unit - 1);
    return padded.too_large() ? padded : Size(padded.value_ / unit * unit);
  }

 private:
  static constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  std::int64_t value_;
};

}  // namespace tda
