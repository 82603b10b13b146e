// How a session's KV cache stores a head's key or value.
#pragma once

#include <tda/types.h>

#include <cstdint>

namespace tda {

/// int8: values that share a scale.
inline constexpr std::int64_t kKvGroup = 32;

/// Bytes of one head's key or value, of n numbers. int8: the numbers, then their groups' scales,
/// bf16.
constexpr std::int64_t kv_row_bytes(KvFormat format, std::int64_t n) {
  return format == KvFormat::f32    ? 4 * n
         : format == KvFormat::int8 ? n + 2 * ((n + kKvGroup - 1) / kKvGroup)
                                    : 2 * n;
}

}  // namespace tda
