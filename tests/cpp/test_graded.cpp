// Weights in bricks: the layout, and the kernels of all instruction sets against doubles.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

#include "check.h"
#include "cpu/bricks.h"
#include "cpu/isa.h"
#include "kernel_tests.h"
#include "weights/bricks.h"

using namespace tda;

namespace {

struct Shape {
  std::int64_t rows, cols;
};
constexpr Shape kShapes[] = {{1, 1},    {1, 160},  {63, 31},   {64, 32},  {64, 70},  {100, 31},
                             {100, 70}, {200, 32}, {200, 160}, {70, 300}, {2500, 70}};
constexpr BrickKind kKinds[] = {BrickKind::graded, BrickKind::int4, BrickKind::lines};
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int random_int(int least, int most) {
  static std::mt19937 random(2);
  return std::uniform_int_distribution(least, most)(random);
}

/// A matrix of chosen codes, put into memory by the words of weights/bricks.h alone.
struct Encoded {
  std::int64_t rows, cols, strips, blocks, inputs, rest_stride;
  bool by_block;
  BrickKind kind;
  std::vector<int> codes, rests;     // of all rows, padding included
  std::vector<int> scales, offsets;  // for 16 inputs; of lines, the first of two and minima
  std::vector<float> steps, rest_steps, lengths;
  std::vector<StripOutlier> outliers;
  AlignedBytes memory;

  Encoded(Shape shape, bool in_blocks, BrickKind of_bricks = BrickKind::graded)
      : rows(shape.rows),
        cols(shape.cols),
        strips((rows + 63) / 64),
        blocks((cols + 31) / 32),
        inputs(32 * blocks),
        rest_stride(64 * ((strips + 1) / 2 | 1)),
        by_block(in_blocks),
        kind(of_bricks),
        codes(64 * strips * inputs),
        rests(64 * strips * inputs),
        scales(64 * strips * 2 * blocks),
        offsets(64 * strips * 2 * blocks),
        steps(64 * strips),
        rest_steps(64 * strips),
        lengths(random_floats(inputs)),
        outliers(4 * strips) {
    for (int& code : codes) code = random_int(0, 15);
    for (int& rest : rests) rest = has_rests() ? random_int(0, 15) : 8;
    for (int& scale : scales) scale = random_int(-127, 127);
    for (int& offset : offsets) offset = random_int(-127, 127);
    for (float& length : lengths) length = std::abs(length);
    for (std::int64_t r = 0; r < rows; ++r) {  // of few bits, so that weights are exact in f32
      steps[r] = static_cast<float>(random_int(1, 100)) / 8192;
      rest_steps[r] = static_cast<float>(random_int(1, 100)) / 1024;
    }
    for (std::int64_t s = 0; s < strips; ++s)
      outliers[4 * s + s % 4] = {static_cast<std::int32_t>(std::min(rows - 1, 64 * s + 61)),
                                 static_cast<std::int32_t>((37 * s + 69) % cols),
                                 s % 2 == 0 ? 50.0f : -70.0f};
    write();
  }

  void write() {
    const auto padded = [](std::int64_t bytes) { return (bytes + 63) / 64 * 64; };
    std::vector<std::byte> bytes;
    const auto append = [&](const void* data, std::int64_t size) {
      const auto* const first = static_cast<const std::byte*>(data);
      bytes.insert(bytes.end(), first, first + size);
      bytes.resize(padded(std::ssize(bytes)));
    };
    const std::int64_t size = lines() ? 1280 : 1152;
    std::vector<std::uint8_t> bricks(size * strips * blocks), columns(inputs * rest_stride);
    for (std::int64_t row = 0; row < 64 * strips; ++row)
      for (std::int64_t i = 0; i < inputs; ++i) {
        const std::int64_t s = row / 64, r = row % 64, b = i / 32, k = i % 32;
        std::uint8_t* const brick =
            bricks.data() + size * (by_block ? b * strips + s : s * blocks + b);
        const std::int64_t group = row * 2 * blocks + 2 * b;
        if (lines()) {
          const _Float16 both[2] = {static_cast<_Float16>(scales[group]),
                                    static_cast<_Float16>(offsets[group])};
          std::memcpy(brick + 2 * r, &both[0], 2);
          std::memcpy(brick + 128 + 2 * r, &both[1], 2);
        } else {
          brick[r] = static_cast<std::uint8_t>(scales[group]);
          brick[64 + r] = static_cast<std::uint8_t>(scales[group + 1]);
        }
        brick[size - 1024 + 128 * (k / 4) + 4 * (r % 32) + k % 4] |=
            static_cast<std::uint8_t>(codes[row * inputs + i] << (r < 32 ? 0 : 4));
        columns[i * rest_stride + 32 * s + r % 32] |=
            static_cast<std::uint8_t>(rests[row * inputs + i] << (r < 32 ? 0 : 4));
      }
    append(bricks.data(), std::ssize(bricks));
    append(steps.data(), 4 * 64 * strips);
    if (has_rests()) append(rest_steps.data(), 4 * 64 * strips);
    append(outliers.data(), 12 * 4 * strips);
    if (has_rests()) append(lengths.data(), 4 * inputs);
    if (has_rests()) append(columns.data(), std::ssize(columns));
    memory.assign(bytes.begin(), bytes.end());
  }

  bool lines() const { return kind == BrickKind::lines; }
  bool has_rests() const { return kind == BrickKind::graded; }
  Bricks bricks() const { return {memory.data(), rows, cols, kind, by_block}; }
  /// A weight's high part as a multiple of its row's step, and its rest as one of rest_step.
  int high(std::int64_t r, std::int64_t i) const {
    const std::int64_t at = 2 * (r * blocks + i / 32);
    const int code = codes[r * inputs + i];
    return lines() ? scales[at] * code + offsets[at] : scales[at + i / 16 % 2] * (code - 8);
  }
  int rest(std::int64_t r, std::int64_t i) const { return rests[r * inputs + i] - 8; }
  double outlier(std::int64_t r, std::int64_t i) const {
    const StripOutlier& o = outliers[4 * (r / 64) + r / 64 % 4];
    return o.row == r && o.input == i ? o.value : 0.0f;
  }
  double value(std::int64_t r, std::int64_t i) const {
    return double{steps[r]} * high(r, i) + double{rest_steps[r]} * rest(r, i) + outlier(r, i);
  }
};

/// body(kernels, matrix) for all instruction sets, shapes, orders and kinds of bricks.
template <class Body>
void for_all_matrices(const Body& body) {
  std::vector<Encoded> all;
  for (const Shape shape : kShapes)
    for (const bool by_block : {false, true})
      for (const BrickKind kind : kKinds) all.emplace_back(shape, by_block, kind);
  for_all_kernels([&](const Kernels& kernels) {
    for (const Encoded& w : all) {
      const int before = check::failures;
      body(kernels, w);
      if (check::failures > before)
        std::printf("  rows %d, cols %d, by_block %d, kind %d\n", int(w.rows), int(w.cols),
                    w.by_block, int(w.kind));
    }
  });
}

/// x with zeros where inputs pad, some of them large beside their neighbours.
std::vector<float> random_inputs(const Encoded& w) {
  std::vector<float> x = random_floats(w.inputs);
  for (std::int64_t i = 5; i < w.cols; i += 45) x[i] *= 30;
  if (w.cols > 128) std::fill_n(x.begin() + 64, 32, 0.0f);
  std::fill(x.begin() + w.cols, x.end(), 0.0f);
  return x;
}

struct Prepared {
  std::vector<HighInputs> blocks;
  std::vector<double> x;  // as rounded

  Prepared(const BrickKernels& kernels, const std::vector<float>& in)
      : blocks(in.size() / 32), x(in.size()) {
    kernels.prepare(in.data(), std::ssize(blocks), blocks.data());
    for (std::size_t i = 0; i < x.size(); ++i) {
      const HighInputs& block = blocks[i / 32];
      x[i] = double{block.scale} * block.q[i % 32];
      if (block.excess_quad == static_cast<std::int32_t>(i % 32 / 4))
        x[i] += double{block.excess_scale} * block.excess[i % 4];
    }
  }
};

struct Chosen {
  std::vector<RestInputs> blocks;
  std::int64_t count;
  std::vector<double> x;  // as rounded; 0 for all that were not chosen

  Chosen(const BrickKernels& kernels, const Encoded& w, const std::vector<float>& in,
         float threshold)
      : blocks(w.blocks), x(in.size()) {
    count = kernels.choose(in.data(), w.lengths.data(), {0, w.cols}, threshold, blocks.data());
    for (std::int64_t k = 0; k < count; ++k)
      x[blocks[k / 32].ids[k % 32]] += double{blocks[k / 32].scale} * blocks[k / 32].q[k % 32];
  }
};

/// Whether sums are those of `term(row, i) * x[i]`, rounded to floats. start: what they began at
template <class Term>
void check_sums(const Encoded& w, const std::vector<float>& sums, float start,
                const std::vector<double>& x, const Term& term) {
  for (std::int64_t r = 0; r < w.rows; ++r) {
    double sum = start, size = std::abs(start);
    for (std::int64_t i = 0; i < w.inputs; ++i) {
      const auto [value, magnitude] = term(r, i);
      sum += value * x[i];
      size += magnitude * std::abs(x[i]);
    }
    CHECK_NEAR(sums[r], sum, 1e-6 * size);
  }
}
struct Term {
  double value, magnitude;
};
auto high_term(const Encoded& w) {  // a code and the centre are multiplied apart
  return [&w](std::int64_t r, std::int64_t i) -> Term {
    const std::int64_t at = 2 * (r * w.blocks + i / 32);
    const int scale = w.lines() ? w.scales[at] : w.scales[at + i / 16 % 2];
    return {double(w.high(r, i)), 16.0 * std::abs(scale) + std::abs(w.offsets[at])};
  };
}
auto rest_term(const Encoded& w) {
  return [&w](std::int64_t r, std::int64_t i) -> Term { return {double(w.rest(r, i)), 8}; };
}

std::vector<float> add_high(const BrickKernels& kernels, const Encoded& w, const HighInputs* x) {
  std::vector<float> sums(64 * w.strips, 3);
  float* const out = sums.data();
  kernels.add_high(w.bricks(), {0, w.strips}, {0, w.blocks}, {1, &x, &out});
  return sums;
}
std::vector<float> add_rests(const BrickKernels& kernels, const Encoded& w, const Chosen& x) {
  std::vector<float> sums(64 * w.strips, 3);
  kernels.add_rests(w.bricks(), {0, w.strips}, x.blocks.data(), x.count, sums.data());
  return sums;
}

}  // namespace

TEST(bricks_layout_is_what_its_header_says) {
  for (const Shape shape : kShapes)
    for (const BrickKind kind : kKinds) {
      const Encoded w(shape, shape.cols % 2 == 0, kind);
      const Bricks found = w.bricks();
      CHECK(found.bytes() == std::ssize(w.memory));
      CHECK(found.strips == w.strips && found.blocks == w.blocks);
      if (!w.has_rests()) {
        CHECK(found.high_bytes() == found.bytes() && found.rest_bytes() == 0);
      } else {
        CHECK(found.high_bytes() == found.bytes() - w.inputs * w.rest_stride);
        CHECK(found.rest_bytes() == 32 * w.strips);
        CHECK(found.rest_stride == w.rest_stride);
        CHECK(found.rest(0) ==
              reinterpret_cast<const std::uint8_t*>(w.memory.data()) + found.high_bytes());
        CHECK(std::equal(w.lengths.begin(), w.lengths.end(), found.rest_lengths));
      }
      std::vector<float> all(w.cols), high(w.cols), part(w.cols);
      for (std::int64_t r = 0; r < w.rows; ++r) {
        dequantize_bricks(found, r, 0, w.cols, all.data());
        dequantize_bricks(found, r, 0, w.cols, high.data(), true);
        const std::int64_t first = r % w.cols, count = (w.cols - first + 1) / 2;
        dequantize_bricks(found, r, first, count, part.data());
        CHECK(std::equal(part.begin(), part.begin() + count, all.begin() + first));
        for (std::int64_t i = 0; i < w.cols; ++i) {
          CHECK_NEAR(all[i], w.value(r, i), 1e-5);
          CHECK_NEAR(high[i], double{w.steps[r]} * w.high(r, i) + w.outlier(r, i), 1e-5);
        }
      }
    }
}

TEST(brick_inputs_are_rounded_to_half_a_step) {
  const Encoded w({1, 160}, false);
  for_all_kernels([&](const Kernels& kernels) {
    for (const float size : {1e-38f, 1e-20f, 1.0f, 1e30f}) {
      std::vector<float> x = random_inputs(w);
      for (float& v : x) v *= size;
      const Prepared p(*kernels.bricks, x);
      for (std::int64_t b = 0; b < 5; ++b) {
        std::vector<float> sizes;
        double sums[2] = {};
        for (std::int64_t i = 32 * b; i < 32 * b + 32; ++i) {
          sizes.push_back(std::abs(x[i]));
          sums[i / 16 % 2] += p.x[i];
        }
        std::nth_element(sizes.begin(), sizes.begin() + 1, sizes.end(), std::greater());
        const double limit = sizes[0] > 2 * sizes[1] ? sizes[1] : sizes[0];
        for (std::int64_t i = 32 * b; i < 32 * b + 32; ++i)
          CHECK_NEAR(p.x[i], x[i], limit / 254 * 1.001 + 1e-6 * std::abs(x[i]) + 1e-36);
        for (int half = 0; half < 2; ++half)
          CHECK_NEAR(p.blocks[b].sums[half], sums[half], 1e-6 * 32 * sizes[0] + 1e-36);
      }
    }
  });
}

TEST(brick_high_parts_match_doubles) {
  for_all_matrices([](const Kernels& kernels, const Encoded& w) {
    const Prepared p(*kernels.bricks, random_inputs(w));
    const std::vector<float> sums = add_high(*kernels.bricks, w, p.blocks.data());
    check_sums(w, sums, 3, p.x, high_term(w));
    // In other portions, to the bit.
    std::vector<float> again(64 * w.strips, 3);
    const std::int64_t strip = w.strips / 2, block = w.blocks / 3;
    for (const Span strips : {Span{0, strip}, Span{strip, w.strips}})
      for (const Span blocks : {Span{0, block}, Span{block, w.blocks}})
        if (strips.count() > 0 && blocks.count() > 0) {
          const HighInputs* const x = p.blocks.data() + blocks.first;
          float* const out = again.data() + 64 * strips.first;
          kernels.bricks->add_high(w.bricks(), strips, blocks, {1, &x, &out});
        }
    CHECK(again == sums);
  });
}

TEST(graded_rests_of_chosen_inputs_match_doubles) {
  for_all_matrices([](const Kernels& kernels, const Encoded& w) {
    if (!w.has_rests()) return;
    const std::vector<float> x = random_inputs(w);
    for (const float threshold : {0.0f, 0.1f, 0.5f, 1.5f, kInfinity}) {
      const Chosen chosen(*kernels.bricks, w, x, threshold);
      std::vector<std::int32_t> expected, found;
      for (std::int32_t i = 0; i < w.cols; ++i)
        if (std::abs(x[i]) * w.lengths[i] >= threshold) expected.push_back(i);
      for (std::int64_t k = 0; k < chosen.count; ++k) {
        const RestInputs& block = chosen.blocks[k / 32];
        found.push_back(block.ids[k % 32]);
        CHECK_NEAR(chosen.x[found.back()], x[found.back()], block.scale / 2 * 1.001);
        CHECK(block.count == std::min<std::int64_t>(32, chosen.count - k / 32 * 32));
      }
      CHECK(found == expected);
      CHECK(threshold > 0 || chosen.count == w.cols);
      CHECK(threshold < kInfinity || chosen.count == 0);
      const std::vector<float> sums = add_rests(*kernels.bricks, w, chosen);
      check_sums(w, sums, 3, chosen.x, rest_term(w));
      std::vector<float> again(64 * w.strips, 3);
      for (Span strips = {0, w.strips / 3}; strips.first < w.strips;
           strips = {strips.end, w.strips})
        if (strips.count() > 0)
          kernels.bricks->add_rests(w.bricks(), strips, chosen.blocks.data(), chosen.count,
                                    again.data() + 64 * strips.first);
      CHECK(again == sums);
    }
  });
}

TEST(graded_choice_may_begin_anywhere) {
  const Encoded w({1, 160}, false);
  const std::vector<float> x = random_inputs(w);
  for_all_kernels([&](const Kernels& kernels) {
    RestInputs chosen[3];
    const std::int64_t count =
        kernels.bricks->choose(x.data(), w.lengths.data(), {64, 150}, 0.0f, chosen);
    CHECK(count == 150 - 64);
    for (std::int64_t k = 0; k < count; ++k) CHECK(chosen[k / 32].ids[k % 32] == 64 + k);
  });
}

TEST(brick_sums_of_the_largest_numbers_do_not_overflow) {
  std::vector<Encoded> all;
  for (const int code : {0, 15})
    for (const int offset : {-127, 127}) {
      for (const BrickKind kind : kKinds) {
        Encoded w({100, 160}, code == 0, kind);
        std::fill(w.codes.begin(), w.codes.end(), code);
        if (w.has_rests()) std::fill(w.rests.begin(), w.rests.end(), code);
        std::fill(w.scales.begin(), w.scales.end(), offset);
        std::fill(w.offsets.begin(), w.offsets.end(), offset);
        w.write();
        all.push_back(w);
      }
    }
  for_all_kernels([&](const Kernels& kernels) {
    for (const Encoded& w : all)
      for (const int period : {1, 2, 3, 1000})  // of the signs
        for (const int size : {1, 15, 32, 33, 160}) {
          std::vector<float> x(w.inputs);
          for (int i = 0; i < size; ++i) x[i] = i / period % 2 == 0 ? -127.0f : 127.0f;
          const Prepared p(*kernels.bricks, x);
          CHECK(size != 160 || std::abs(p.blocks[4].q[31]) == 127);
          check_sums(w, add_high(*kernels.bricks, w, p.blocks.data()), 3, p.x, high_term(w));
          if (!w.has_rests()) continue;
          const Chosen chosen(*kernels.bricks, w, x, 1e-30f);
          CHECK(chosen.count == size && std::abs(chosen.blocks[0].q[0]) == 127);
          check_sums(w, add_rests(*kernels.bricks, w, chosen), 3, chosen.x, rest_term(w));
        }
  });
}

TEST(brick_products_of_what_is_not_finite_are_not_finite) {
  for_all_matrices([](const Kernels& kernels, const Encoded& w) {
    for (const float bad : {NAN, kInfinity, -kInfinity}) {
      std::vector<float> x = random_inputs(w);
      x[w.cols / 2] = bad;
      const Prepared p(*kernels.bricks, x);
      const auto finite = [](float v) { return std::isfinite(v); };
      CHECK(std::ranges::none_of(add_high(*kernels.bricks, w, p.blocks.data()), finite));
      if (!w.has_rests()) continue;
      const Chosen chosen(*kernels.bricks, w, x, 1e30f);
      CHECK(chosen.count == 1);
      CHECK(std::ranges::none_of(add_rests(*kernels.bricks, w, chosen), finite));
    }
  });
}

TEST(brick_prefill_matches_doubles) {
  for_all_matrices([](const Kernels& kernels, const Encoded& w) {
    const std::int64_t width = kernels.panel, rows = 64 * w.strips;
    const std::vector<float> b = random_floats(2 * w.cols * width);
    AlignedBytes memory;
    const PreparedPanels in =
        prepared_panels(panel_kernels(kernels, WeightFormat::bf16), b, w.cols, width, memory);
    std::vector<float> c(2 * rows * width, 7);
    const auto multiply = [&](bool add) {
      for (std::int64_t s = 0; s < w.strips; ++s)
        kernels.multiply_bricks(w.bricks(), s, in, {c.data() + 64 * s * width, rows * width}, 2,
                                add);
    };
    multiply(false);
    const std::vector<float> once = c;
    multiply(true);
    // Operands rounded to bf16 each change a term by at most 1/256 of it.
    const bool rounds = in.data != b.data();
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t lane = 0; lane < 2 * width; ++lane) {
        const std::int64_t panel = lane / width, at = (panel * rows + r) * width + lane % width;
        double exact = 0, sum = 0, terms = 0, size = 0;
        for (std::int64_t i = 0; i < w.cols && r < w.rows; ++i) {
          const float x = b[(panel * w.cols + i) * width + lane % width];
          const double value = w.value(r, i);
          exact += value * x;
          sum += rounds ? as_bf16(value) * as_bf16(x) : value * x;
          terms += std::abs(value * x);
          size += (std::abs(value) + 1) * std::abs(x);
        }
        CHECK_NEAR(once[at], r < w.rows ? sum : 7, 2e-6 * size);
        CHECK_NEAR(once[at], r < w.rows ? exact : 7, (rounds ? terms / 127 : 0) + 2e-6 * size);
        CHECK_NEAR(c[at], r < w.rows ? 2 * once[at] : 7, 2e-6 * size);
      }
  });
}

int main() { return run_tests(); }
