// How the values of a tensor are stored: as numbers, or in blocks of GGML and our own, whose values
// share scales. Everything that needs f32 values of a tensor gets them from dequantize().
#pragma once

#include <cstddef>
#include <cstdint>

namespace tda {

enum class DType {
  f32,
  f16,
  bf16,
  q4_0,
  q4_1,
  q5_0,
  q5_1,
  q8_0,
  q2_k,
  q3_k,
  q4_k,
  q5_k,
  q6_k,
  iq4_nl,
  iq4_xs,
  lines,  // as store_line() writes them
  other,  // none that dequantize() knows
};

/// A type in the numbering of GGUF files.
struct GgmlType {
  std::uint32_t id;
  const char* name;
  DType dtype;
};
/// Null for an id that no version of GGML has used.
const GgmlType* find_ggml_type(std::uint32_t id);

struct BlockSize {
  std::int64_t values, bytes;
};
/// Plain numbers are blocks of one value. {1, 0} for `other`.
BlockSize block_of(DType dtype);
/// Bytes of `values` values, a multiple of the block's.
inline std::int64_t stored_bytes(DType dtype, std::int64_t values) {
  const BlockSize block = block_of(dtype);
  return values / block.values * block.bytes;
}

/// data: `count` values, whole blocks, of any alignment. Every operation rounds as in the package
/// `gguf`, so that the results are the same to the bit.
void dequantize(DType dtype, const std::byte* data, std::int64_t count, float* out);

/// Whether values are 4-bit codes with a scale and a minimum, as four_bit_groups() gives them.
constexpr bool has_four_bits(DType dtype) {
  return dtype == DType::q4_0 || dtype == DType::q4_1 || dtype == DType::q4_k ||
         dtype == DType::lines;
}

/// The 4-bit codes of values [32 * group, 32 * group + 32) of `data`: value i is
/// scale * codes[i] + minimum, exactly what dequantize() gives. False for a type whose values are
/// not of this form with 4-bit codes; then nothing is written.
bool four_bit_groups(DType dtype, const std::byte* data, std::int64_t group, std::uint8_t codes[32],
                     float& scale, float& minimum);

/// Writes a block of 32 values scale * code + minimum as DType::lines, which are f32 scale, f32
/// minimum and the codes as in Q4_1.
void store_line(const std::uint8_t codes[32], float scale, float minimum, std::byte* block);

}  // namespace tda
