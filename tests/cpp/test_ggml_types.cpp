// The block types of GGML, against values made with the Python package gguf 0.19.
#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "checkpoint/ggml_types.h"

namespace {

using tda::DType;

constexpr std::int64_t kCount = 512;

struct Case {
  DType dtype;
  const char* name;
  std::vector<int> halves;  // where a block has its scales of 16 bits
  std::uint64_t expected;   // FNV-1a of the f32 values that gguf.quants.dequantize makes of data()
};
const Case cases[] = {
    {DType::q4_0, "Q4_0", {0}, 0x85ecd91c23e7b3fdu},
    {DType::q4_1, "Q4_1", {0, 2}, 0x47b6db13442d952du},
    {DType::q5_0, "Q5_0", {0}, 0x48b79b9aad479effu},
    {DType::q5_1, "Q5_1", {0, 2}, 0x2a088a4ee6955effu},
    {DType::q8_0, "Q8_0", {0}, 0x208469c3381bfe64u},
    {DType::q2_k, "Q2_K", {80, 82}, 0x9a4c9f735386d164u},
    {DType::q3_k, "Q3_K", {108}, 0x86700fe1130e9eadu},
    {DType::q4_k, "Q4_K", {0, 2}, 0x4507de6adca96ac4u},
    {DType::q5_k, "Q5_K", {0, 2}, 0x80e88f46d50be74eu},
    {DType::q6_k, "Q6_K", {208}, 0xb52c3946e1760df8u},
    {DType::iq4_nl, "IQ4_NL", {0}, 0x9c061138663d7a70u},
    {DType::iq4_xs, "IQ4_XS", {0}, 0xb3e0208c022d3b95u},
    {DType::f16, "F16", {0}, 0x80a6dce70b69ffb0u},
    {DType::bf16, "BF16", {0}, 0x60cbdae72868bcf0u},
};

/// Random bytes, with scales below 2.
std::vector<std::byte> data_of(const Case& c) {
  std::vector<std::byte> data(tda::stored_bytes(c.dtype, kCount));
  std::uint32_t seed = 1;
  for (std::byte& each : data) {
    seed = seed * 1664525 + 1013904223;
    each = static_cast<std::byte>(seed >> 24);
  }
  for (std::int64_t block = 0; block < std::ssize(data); block += tda::block_of(c.dtype).bytes)
    for (const int half : c.halves) data[block + half + 1] &= std::byte{0xbf};
  return data;
}

std::vector<float> values_of(const Case& c, std::int64_t offset = 0) {
  std::vector<std::byte> moved(offset);  // alignment must not matter
  const std::vector<std::byte> data = data_of(c);
  moved.insert(moved.end(), data.begin(), data.end());
  std::vector<float> values(kCount);
  tda::dequantize(c.dtype, moved.data() + offset, kCount, values.data());
  return values;
}

TEST(values_are_those_of_gguf_to_the_bit) {
  for (const Case& c : cases) {
    for (const std::int64_t offset : {0, 1}) {
      std::uint64_t hash = 0xcbf29ce484222325;
      for (const float value : values_of(c, offset)) {
        unsigned char bytes[4];
        std::memcpy(bytes, &value, 4);
        for (const unsigned char each : bytes) hash = (hash ^ each) * 0x100000001b3;
      }
      if (hash != c.expected) check::fail(__FILE__, __LINE__, c.name);
    }
  }
}

TEST(plain_numbers_are_as_they_are) {
  const float values[3] = {1.5f, -0.0f, 3e-42f};
  std::vector<std::byte> data(13);
  std::memcpy(data.data() + 1, values, 12);
  float out[3];
  tda::dequantize(DType::f32, data.data() + 1, 3, out);
  CHECK(std::memcmp(out, values, 12) == 0);
}

TEST(four_bit_groups_are_the_values) {
  int with_codes = 0;
  for (const Case& c : cases) {
    const std::vector<std::byte> data = data_of(c);
    const std::vector<float> expected = values_of(c);
    std::uint8_t codes[32] = {99};
    float scale = -7, minimum = -7;
    const bool four_bits =
        c.dtype == DType::q4_0 || c.dtype == DType::q4_1 || c.dtype == DType::q4_k;
    with_codes += four_bits;
    for (std::int64_t g = 0; g < kCount / 32; ++g) {
      CHECK(tda::four_bit_groups(c.dtype, data.data(), g, codes, scale, minimum) == four_bits);
      for (int i = 0; four_bits && i < 32; ++i) {
        CHECK(codes[i] < 16);
        CHECK(scale * codes[i] + minimum == expected[32 * g + i]);
      }
    }
    if (!four_bits) CHECK(codes[0] == 99 && scale == -7 && minimum == -7);
  }
  CHECK(with_codes == 3);
}

TEST(types_by_number) {
  CHECK(std::string(tda::find_ggml_type(12)->name) == "Q4_K");
  CHECK(tda::find_ggml_type(12)->dtype == DType::q4_k);
  CHECK(tda::find_ggml_type(39)->dtype == DType::other);
  CHECK(!tda::find_ggml_type(42) && !tda::find_ggml_type(~0u));
  for (std::uint32_t id = 0; const tda::GgmlType* type = tda::find_ggml_type(id); ++id)
    CHECK(type->id == id);
  for (const Case& c : cases) {
    CHECK(kCount % tda::block_of(c.dtype).values == 0);
    CHECK(tda::stored_bytes(c.dtype, kCount) > 0);
  }
}

}  // namespace

int main() { return run_tests(); }
