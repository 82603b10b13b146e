// Where codes lie in bricks and rests.
#pragma once

#include "weights/bricks.h"

namespace tda {

inline void set_code(BrickCodes& codes, std::int64_t r, std::int64_t i, int code) {
  codes[i / 4][4 * (r % 32) + i % 4] |= static_cast<std::uint8_t>(code << (r < 32 ? 0 : 4));
}
inline int code_at(const BrickCodes& codes, std::int64_t r, std::int64_t i) {
  return codes[i / 4][4 * (r % 32) + i % 4] >> (r < 32 ? 0 : 4) & 15;
}

/// The byte of a strip's run that holds row r's rest, and the shift in it.
struct RestPlace {
  std::int64_t byte;
  int shift;
};
inline RestPlace rest_place(std::int64_t r) { return {r % 32, r < 32 ? 0 : 4}; }

}  // namespace tda
