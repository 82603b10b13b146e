// The loops of rounding give the same bits with every instruction set.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/hash.h"
#include "brick_tests.h"
#include "check.h"
#include "kernel_tests.h"
#include "weights/brick_loops.h"

using namespace tda;

namespace {

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

/// A rounded row.
struct Rounded {
  std::vector<float> row, rest_step;
  std::vector<std::int8_t> scales;
  std::vector<std::uint8_t> codes, rests;

  Rounded(const BrickLoops& loops, const std::vector<float>& values, bool with_rests, float unit,
          float step)
      : row(values), scales(values.size() / 16 * 64), codes(row.size()), rests(row.size()) {
    rest_step.push_back(
        loops.round_centred(row.data(), std::ssize(row) / 32, unit, step,
                            {scales.data(), codes.data(), with_rests ? rests.data() : nullptr}));
  }
  bool operator==(const Rounded& other) const {
    return same_bits(row, other.row) && same_bits(rest_step, other.rest_step) &&
           same_bits(scales, other.scales) && same_bits(codes, other.codes) &&
           same_bits(rests, other.rests);
  }
};

/// Rows of one size, of many, of few values, and of the smallest and largest floats.
std::vector<std::vector<float>> rows_of(std::int64_t n) {
  std::vector<std::vector<float>> rows = {random_floats(n), random_floats(n), random_floats(n)};
  for (std::int64_t i = 0; i < n; ++i) {
    rows[1][i] = std::ldexp(rows[1][i], static_cast<int>(i / 16 * 7 % 40) - 20);
    rows[2][i] = std::round(rows[2][i] * 2) / 2;
  }
  constexpr float kLargest = std::numeric_limits<float>::max();
  for (const float value : {0.0f, -0.0f, 1.0f, -7.5f, kLargest, 1e-45f, -1e-38f})
    rows.emplace_back(n, value);
  rows.push_back(rows[0]);
  for (std::int64_t i = 0; i < n; i += 3) rows.back()[i] = i % 2 == 0 ? kLargest : 1e-45f;
  return rows;
}

const BrickLoops& portable() { return *available_brick_loops().front(); }

}  // namespace

TEST(rounded_rows_are_the_same) {
  for (const BrickLoops* loops : available_brick_loops())
    for (const std::int64_t blocks : {1, 2, 3, 4, 5, 33, 70})
      for (const std::vector<float>& row : rows_of(32 * blocks))
        for (const float unit : {0x1p-126f, 0x1p-3f, 0x1p127f})
          for (const bool with_rests : {false, true})
            CHECK(Rounded(*loops, row, with_rests, unit, unit / 500) ==
                  Rounded(portable(), row, with_rests, unit, unit / 500));
}

TEST(codes_and_rests_lie_in_the_same_places) {
  for (const BrickLoops* loops : available_brick_loops()) {
    constexpr std::int64_t kStride = 96, kBlock = 2, kStrip = 1;
    const StoredBricks found(128, kStride, BrickKind::graded);
    std::vector<std::uint8_t> codes(64 * kStride);
    for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = i * i * 7 % 31 % 16;
    CentredBrick brick;
    loops->store_codes(codes.data() + 32 * kBlock, kStride, brick.codes);
    loops->store_rests(codes.data() + 32 * kBlock, kStride, found.w, kStrip, kBlock);
    for (std::int64_t r = 0; r < 64; ++r)
      for (std::int64_t i = 0; i < 32; ++i) {
        const int shift = r < 32 ? 0 : 4, code = codes[r * kStride + 32 * kBlock + i];
        CHECK((brick.codes[i / 4][4 * (r % 32) + i % 4] >> shift & 15) == code);
        CHECK((found.w.rest(32 * kBlock + i)[32 * kStrip + r % 32] >> shift & 15) == code);
      }
  }
}

TEST(squares_of_columns_are_those_of_the_values) {
  for (const BrickKind kind : {BrickKind::graded, BrickKind::int4, BrickKind::lines}) {
    std::vector<float> values = random_floats(100 * 70);
    values[3 * 70 + 40] = 50;  // an outlier
    const StoredBricks stored(100, values, kind, true);
    std::vector<double> expected(96), rests(96);
    for (std::int64_t r = 0; r < 100; ++r) {
      std::vector<float> row(70);
      dequantize_bricks(stored.w, r, 0, 70, row.data());
      for (std::int64_t i = 0; i < 70; ++i) expected[i] += double{row[i]} * row[i];
    }
    for (const BrickLoops* loops : available_brick_loops())
      for (std::int64_t b = 0; b < 3; ++b) {
        double found[32] = {}, of_rests[2][32] = {};
        loops->add_squares(stored.w, b, found);
        for (std::int64_t i = 0; i < std::min<std::int64_t>(32, 70 - 32 * b); ++i)
          CHECK(found[i] == expected[32 * b + i]);
        if (kind != BrickKind::graded) continue;
        loops->add_rest_squares(stored.w, b, 0.01f, of_rests[0]);
        portable().add_rest_squares(stored.w, b, 0.01f, of_rests[1]);
        CHECK(std::equal(of_rests[0], of_rests[0] + 32, of_rests[1]));
      }
  }
}

TEST(rounding_gives_the_bits_that_it_gave) {
  std::vector<float> values(70 * 200);
  for (std::uint32_t i = 0; i < values.size(); ++i) {
    const auto random = static_cast<std::int32_t>(i * 2654435761u >> 8);
    values[i] =
        std::ldexp(static_cast<float>(random % 20001 - 10000), static_cast<int>(i / 32 % 5) - 14);
  }
  const auto hash = [&](BrickKind kind) {
    const StoredBricks stored(70, values, kind);
    Hash found;
    found.add(stored.memory.data(), stored.w.bytes());
    return found.hex();
  };
  CHECK(hash(BrickKind::graded) == "e1ac239fc96b3b30");
  CHECK(hash(BrickKind::int4) == "d261a493f39ba9a0");
  CHECK(hash(BrickKind::lines) == "cfae26bce095ee3e");
}

int main() { return run_tests(); }
