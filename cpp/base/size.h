#pragma once

#include <cstdint>
#include <limits>

namespace tda {

/// A number of elements or bytes, 0 or more, whose products and sums can't wrap around: what
/// exceeds 63 bits is held as the largest number there is. No file is so long and no memory so
/// large, so whoever checks a size against these refuses it.
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
