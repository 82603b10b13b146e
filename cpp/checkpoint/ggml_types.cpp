#include "checkpoint/ggml_types.h"

#include <cstring>
#include <iterator>

#include "base/half.h"

namespace tda {
namespace {

constexpr GgmlType ggml_types[] = {
    {0, "F32", DType::f32},           {1, "F16", DType::f16},
    {2, "Q4_0", DType::q4_0},         {3, "Q4_1", DType::q4_1},
    {4, "Q4_2", DType::other},        {5, "Q4_3", DType::other},
    {6, "Q5_0", DType::q5_0},         {7, "Q5_1", DType::q5_1},
    {8, "Q8_0", DType::q8_0},         {9, "Q8_1", DType::other},
    {10, "Q2_K", DType::q2_k},        {11, "Q3_K", DType::q3_k},
    {12, "Q4_K", DType::q4_k},        {13, "Q5_K", DType::q5_k},
    {14, "Q6_K", DType::q6_k},        {15, "Q8_K", DType::other},
    {16, "IQ2_XXS", DType::other},    {17, "IQ2_XS", DType::other},
    {18, "IQ3_XXS", DType::other},    {19, "IQ1_S", DType::other},
    {20, "IQ4_NL", DType::iq4_nl},    {21, "IQ3_S", DType::other},
    {22, "IQ2_S", DType::other},      {23, "IQ4_XS", DType::iq4_xs},
    {24, "I8", DType::other},         {25, "I16", DType::other},
    {26, "I32", DType::other},        {27, "I64", DType::other},
    {28, "F64", DType::other},        {29, "IQ1_M", DType::other},
    {30, "BF16", DType::bf16},        {31, "Q4_0_4_4", DType::other},
    {32, "Q4_0_4_8", DType::other},   {33, "Q4_0_8_8", DType::other},
    {34, "TQ1_0", DType::other},      {35, "TQ2_0", DType::other},
    {36, "IQ4_NL_4_4", DType::other}, {37, "IQ4_NL_4_8", DType::other},
    {38, "IQ4_NL_8_8", DType::other}, {39, "MXFP4", DType::other},
    {40, "NVFP4", DType::other},      {41, "Q1_0", DType::other},
};

constexpr std::int64_t kSmall = 32, kLarge = 256;  // values in a block

// The 16 values of IQ4_NL and IQ4_XS, spaced as weights are distributed.
constexpr std::int8_t uneven_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                           1,    13,   25,  38,  53,  69,  89,  113};

int at(const std::byte* data, std::int64_t i) { return static_cast<int>(data[i]); }

std::uint16_t bits16(const std::byte* data) {
  std::uint16_t bits;
  std::memcpy(&bits, data, 2);
  return bits;
}
float half_at(const std::byte* data) { return f16_to_f32(bits16(data)); }

// Codes are laid out so that each of these loops reads bytes one after the other with the same
// shift, which compilers vectorise.

/// Calls body(i, code) for 2 * kBytes codes: first the lower halves of the bytes, then the upper.
template <int kBytes, class Body>
void each_nibble(const std::byte* data, const Body& body) {
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < kBytes; ++i) body(half * kBytes + i, at(data, i) >> (4 * half) & 15);
}

/// Calls body(i, code) for 256 codes of 2 bits in 2 times 32 bytes, in each from the lowest bits up.
template <class Body>
void each_pair_of_bits(const std::byte* data, const Body& body) {
  for (int part = 0; part < 8; ++part)
    for (int i = 0; i < 32; ++i)
      body(32 * part + i, at(data, part / 4 * 32 + i) >> (part % 4 * 2) & 3);
}

/// Scale and minimum, of 6 bits each, of group g of 8 in Q4_K and Q5_K.
struct ScaleAndMinimum {
  float scale, minimum;

  ScaleAndMinimum(const std::byte* block, int g) {
    const std::byte* const packed = block + 4;
    const int low = at(packed, g % 4), middle = at(packed, 4 + g % 4), high = at(packed, 8 + g % 4);
    scale = half_at(block) * static_cast<float>(g < 4 ? low & 63 : (high & 15) | (low >> 2 & 48));
    minimum = half_at(block + 2) *
              static_cast<float>(g < 4 ? middle & 63 : high >> 4 | (middle >> 2 & 48));
  }
};

// Each of these expands one block. Sums and products are those of the package gguf, in its order.
// __restrict: bytes might be parts of the floats, which would keep compilers from vectorising.

void expand_q4_0(const std::byte* block, float* out) {
  const float d = half_at(block);
  each_nibble<16>(block + 2, [&](int i, int code) { out[i] = d * static_cast<float>(code - 8); });
}

void expand_q4_1(const std::byte* block, float* out) {
  const float d = half_at(block), m = half_at(block + 2);
  each_nibble<16>(block + 4, [&](int i, int code) { out[i] = d * static_cast<float>(code) + m; });
}

/// The fifth bit of value i of 32, all of which are together in 4 bytes, as part of its code.
int fifth_bit(const std::byte* bits, int i) { return (at(bits, i / 8) >> (i % 8) & 1) << 4; }

void expand_q5_0(const std::byte* block, float* out) {
  const float d = half_at(block);
  each_nibble<16>(block + 6, [&](int i, int code) {
    out[i] = d * static_cast<float>((code | fifth_bit(block + 2, i)) - 16);
  });
}

void expand_q5_1(const std::byte* block, float* out) {
  const float d = half_at(block), m = half_at(block + 2);
  each_nibble<16>(block + 8, [&](int i, int code) {
    out[i] = d * static_cast<float>(code | fifth_bit(block + 4, i)) + m;
  });
}

void expand_q8_0(const std::byte* block, float* out) {
  const float d = half_at(block);
  for (int i = 0; i < kSmall; ++i)
    out[i] = static_cast<float>(static_cast<std::int8_t>(block[2 + i])) * d;
}

void expand_q2_k(const std::byte* block, float* out) {
  const float d = half_at(block + 80), least = half_at(block + 82);
  each_pair_of_bits(block + 16, [&](int i, int code) {
    const int packed = at(block, i / 16);
    out[i] = d * static_cast<float>(packed & 15) * static_cast<float>(code) -
             least * static_cast<float>(packed >> 4);
  });
}

void expand_q3_k(const std::byte* block, float* out) {
  const float d = half_at(block + 108);
  const std::byte* const packed = block + 96;
  float scales[16];
  for (int g = 0; g < 16; ++g) {
    const int low = at(packed, g % 8) >> (g / 8 * 4) & 15;
    const int high = at(packed, 8 + g % 4) >> (g / 4 * 2) & 3;
    scales[g] = d * static_cast<float>((low | high << 4) - 32);
  }
  each_pair_of_bits(block + 32, [&](int i, int code) {
    const int high = at(block, i % 32) >> (i / 32) & 1;  // a set bit leaves the code as it is
    out[i] = scales[i / 16] * static_cast<float>(code - (high ? 0 : 4));
  });
}

void expand_q4_k(const std::byte* __restrict block, float* __restrict out) {
  for (int g = 0; g < 8; ++g, out += 32) {
    const auto [scale, minimum] = ScaleAndMinimum(block, g);
    const std::byte* const codes = block + 16 + g / 2 * 32;
    const int shift = g % 2 * 4;
    for (int i = 0; i < 32; ++i)
      out[i] = scale * static_cast<float>(at(codes, i) >> shift & 15) - minimum;
  }
}

void expand_q5_k(const std::byte* __restrict block, float* __restrict out) {
  for (int g = 0; g < 8; ++g, out += 32) {
    const auto [scale, minimum] = ScaleAndMinimum(block, g);
    const std::byte *const low = block + 48 + g / 2 * 32, *const high = block + 16;
    const int shift = g % 2 * 4;
    for (int i = 0; i < 32; ++i) {
      const int code = (at(low, i) >> shift & 15) | (at(high, i) >> g & 1) << 4;
      out[i] = scale * static_cast<float>(code) - minimum;
    }
  }
}

void expand_q6_k(const std::byte* __restrict block, float* __restrict out) {
  const float d = half_at(block + 208);
  for (int g = 0; g < 16; ++g, out += 16) {  // groups of 16 values
    const int part = g / 2 % 4;
    const std::byte* const low = block + g / 8 * 64 + g % 4 * 16;
    const std::byte* const high = block + 128 + g / 8 * 32 + g % 2 * 16;
    const float scale = d * static_cast<float>(static_cast<std::int8_t>(block[192 + g]));
    for (int i = 0; i < 16; ++i) {
      const int code = (at(low, i) >> (part / 2 * 4) & 15) | (at(high, i) >> (part * 2) & 3) << 4;
      out[i] = scale * static_cast<float>(code - 32);
    }
  }
}

void expand_iq4_nl(const std::byte* block, float* out) {
  const float d = half_at(block);
  each_nibble<16>(block + 2,
                  [&](int i, int code) { out[i] = d * static_cast<float>(uneven_values[code]); });
}

void expand_iq4_xs(const std::byte* block, float* out) {
  const float d = half_at(block);
  const int high = bits16(block + 2);
  for (int g = 0; g < 8; ++g) {
    const int low = at(block + 4, g / 2) >> (g % 2 * 4) & 15;
    const float scale = d * static_cast<float>((low | (high >> (2 * g) & 3) << 4) - 32);
    each_nibble<16>(block + 8 + 16 * g, [&](int i, int code) {
      out[32 * g + i] = scale * static_cast<float>(uneven_values[code]);
    });
  }
}

float float_at(const std::byte* data) {
  float value;
  std::memcpy(&value, data, sizeof value);
  return value;
}

void expand_lines(const std::byte* block, float* out) {
  const float d = float_at(block), m = float_at(block + 4);
  each_nibble<16>(block + 8, [&](int i, int code) { out[i] = d * static_cast<float>(code) + m; });
}

}  // namespace

const GgmlType* find_ggml_type(std::uint32_t id) {
  return id < std::size(ggml_types) ? &ggml_types[id] : nullptr;
}

BlockSize block_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return {1, 4};
    case DType::f16:
    case DType::bf16:
      return {1, 2};
    case DType::q4_0:
    case DType::iq4_nl:
      return {kSmall, 18};
    case DType::q4_1:
      return {kSmall, 20};
    case DType::q5_0:
      return {kSmall, 22};
    case DType::q5_1:
    case DType::lines:
      return {kSmall, 24};
    case DType::q8_0:
      return {kSmall, 34};
    case DType::q2_k:
      return {kLarge, 84};
    case DType::q3_k:
      return {kLarge, 110};
    case DType::q4_k:
      return {kLarge, 144};
    case DType::q5_k:
      return {kLarge, 176};
    case DType::q6_k:
      return {kLarge, 210};
    case DType::iq4_xs:
      return {kLarge, 136};
    case DType::other:
      break;
  }
  return {1, 0};
}

void dequantize(DType dtype, const std::byte* data, std::int64_t count, float* out) {
  const auto blocks = [&](void (*expand)(const std::byte*, float*)) {
    const BlockSize block = block_of(dtype);
    for (std::int64_t i = 0; i < count; i += block.values, data += block.bytes)
      expand(data, out + i);
  };
  switch (dtype) {
    case DType::f32:
      std::memcpy(out, data, static_cast<std::size_t>(4 * count));
      break;
    case DType::f16:
      for (std::int64_t i = 0; i < count; ++i) out[i] = half_at(data + 2 * i);
      break;
    case DType::bf16:
      for (std::int64_t i = 0; i < count; ++i) out[i] = bf16_to_f32(bits16(data + 2 * i));
      break;
    case DType::q4_0:
      return blocks(expand_q4_0);
    case DType::q4_1:
      return blocks(expand_q4_1);
    case DType::q5_0:
      return blocks(expand_q5_0);
    case DType::q5_1:
      return blocks(expand_q5_1);
    case DType::q8_0:
      return blocks(expand_q8_0);
    case DType::q2_k:
      return blocks(expand_q2_k);
    case DType::q3_k:
      return blocks(expand_q3_k);
    case DType::q4_k:
      return blocks(expand_q4_k);
    case DType::q5_k:
      return blocks(expand_q5_k);
    case DType::q6_k:
      return blocks(expand_q6_k);
    case DType::iq4_nl:
      return blocks(expand_iq4_nl);
    case DType::iq4_xs:
      return blocks(expand_iq4_xs);
    case DType::lines:
      return blocks(expand_lines);
    case DType::other:
      break;
  }
}

bool four_bit_groups(DType dtype, const std::byte* data, std::int64_t group, std::uint8_t codes[32],
                     float& scale, float& minimum) {
  const auto take = [codes](int i, int code) { codes[i] = static_cast<std::uint8_t>(code); };
  if (dtype == DType::q4_0) {
    const std::byte* const block = data + group * 18;
    each_nibble<16>(block + 2, take);
    scale = half_at(block);
    minimum = -8 * scale;
    return true;
  }
  if (dtype == DType::q4_1) {
    const std::byte* const block = data + group * 20;
    each_nibble<16>(block + 4, take);
    scale = half_at(block);
    minimum = half_at(block + 2);
    return true;
  }
  if (dtype == DType::q4_k) {
    const std::byte* const block = data + group / 8 * 144;
    const int g = static_cast<int>(group % 8);
    for (int i = 0; i < 32; ++i) take(i, at(block + 16 + g / 2 * 32, i) >> (g % 2 * 4) & 15);
    const ScaleAndMinimum packed(block, g);
    scale = packed.scale;
    minimum = -packed.minimum;
    return true;
  }
  if (dtype == DType::lines) {
    const std::byte* const block = data + group * 24;
    each_nibble<16>(block + 8, take);
    scale = float_at(block);
    minimum = float_at(block + 4);
    return true;
  }
  return false;
}

void store_line(const std::uint8_t codes[32], float scale, float minimum, std::byte* block) {
  std::memcpy(block, &scale, 4);
  std::memcpy(block + 4, &minimum, 4);
  for (int i = 0; i < 16; ++i) block[8 + i] = static_cast<std::byte>(codes[i] | codes[16 + i] << 4);
}

}  // namespace tda
