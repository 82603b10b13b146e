// Where codes lie in bricks and rests.
#pragma once

#include <cstring>

#include "weights/bricks.h"

namespace tda {

/// Puts the codes of row r, 0 to 15 each, into a brick whose codes of that row are 0.
inline void set_codes(BrickCodes& codes, std::int64_t r, const std::uint8_t row[kBlockInputs]) {
  for (std::int64_t q = 0; q < kBlockInputs / 4; ++q) {  // four codes at a time
    std::uint32_t four, both;
    std::memcpy(&four, row + 4 * q, 4);
    std::memcpy(&both, &codes[q][4 * (r % 32)], 4);
    both |= four << (r < 32 ? 0 : 4);
    std::memcpy(&codes[q][4 * (r % 32)], &both, 4);
  }
}
inline void get_codes(const BrickCodes& codes, std::int64_t r, std::uint8_t row[kBlockInputs]) {
  for (std::int64_t q = 0; q < kBlockInputs / 4; ++q) {
    std::uint32_t both;
    std::memcpy(&both, &codes[q][4 * (r % 32)], 4);
    both = both >> (r < 32 ? 0 : 4) & 0x0f0f0f0f;
    std::memcpy(row + 4 * q, &both, 4);
  }
}

/// The byte of a strip's run that holds row r's rest, and the shift in it.
struct RestPlace {
  std::int64_t byte;
  int shift;
};
inline RestPlace rest_place(std::int64_t r) { return {r % 32, r < 32 ? 0 : 4}; }

}  // namespace tda
