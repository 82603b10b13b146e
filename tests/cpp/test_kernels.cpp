// The kernels for f32, bf16 and bf16c, of all instruction sets, against doubles.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "base/half.h"
#include "check.h"
#include "cpu/isa.h"
#include "kernel_tests.h"
#include "naive.h"
#include "weights/quantize.h"

using namespace tda;

namespace {

constexpr Activation kActivations[] = {Activation::silu, Activation::gelu, Activation::gelu_tanh,
                                       Activation::relu};

constexpr std::initializer_list<WeightFormat> kFormats = {WeightFormat::f32, WeightFormat::bf16,
                                                          WeightFormat::bf16c};

/// The weight format whose rows are stored like keys and values.
WeightFormat weights_like(KvFormat format) {
  return format == KvFormat::f32 ? WeightFormat::f32 : WeightFormat::bf16;
}

/// Rows in one format (f32, bf16 or bf16c), and their values.
struct Stored {
  std::int64_t n;
  std::vector<float> values;
  std::vector<float> stored;  // their bytes; some formats need fewer
  std::int64_t stride = 0;

  Stored(WeightFormat format, std::int64_t rows, std::int64_t length)
      : n(length), values(random_floats(rows * n)), stored(rows * (n + 100)) {
    if (format == WeightFormat::f32) {
      std::copy(values.begin(), values.end(), stored.begin());
      return;
    }
    if (format == WeightFormat::bf16c && n > 30)  // rows with 17 upper bytes: two are kept apart
      for (std::int64_t r = 1; r < rows; r += 2) {
        float* const row = values.data() + r * n;
        for (int i = 0; i < n; ++i) row[i] = std::ldexp(i % 2 ? -1.5f : 1.0f, -4 - i / 2 % 7 * 2);
        row[r % n] = 1;
        row[n - 1 - r % 5] = -1;
        row[n / 2] = std::ldexp(1.0f, -20);
        row[n / 2 + 1] = 0;
      }
    std::vector<std::uint16_t> halves;
    for (float& v : values) {
      halves.push_back(f32_to_bf16(v));
      v = bf16_to_f32(halves.back());
    }
    if (format == WeightFormat::bf16) {
      std::copy_n(reinterpret_cast<const std::byte*>(halves.data()), 2 * halves.size(),
                  reinterpret_cast<std::byte*>(stored.data()));
      return;
    }
    stride = bf16c_row_bytes(n);
    auto* const bytes = reinterpret_cast<std::byte*>(stored.data());
    for (std::int64_t r = 0; r < rows; ++r)
      CHECK(compress_bf16(halves.data() + r * n, n, bytes + r * stride));
  }
  Rows rows() const { return {reinterpret_cast<const std::byte*>(stored.data()), n, stride}; }
};

}  // namespace

TEST(rows_are_stored_and_loaded) {
  for_all_kernels({KvFormat::f32, KvFormat::bf16}, [](const Kernels& kernels, KvFormat format) {
    std::vector<float> x = random_floats(70);
    x[3] = INFINITY;
    x[4] = NAN;
    std::vector<float> row(35), back(70, 7);
    cache_kernels(kernels, format).store(x.data(), 2, 35, row.data());
    row_kernels(kernels, weights_like(format))
        .load({reinterpret_cast<const std::byte*>(row.data()), 35}, back.data(), 2);
    for (std::int64_t i = 0; i < 35; ++i) {
      const float expected =
          format == KvFormat::f32 ? x[2 * i] : bf16_to_f32(f32_to_bf16(x[2 * i]));
      CHECK(back[2 * i] == expected || (std::isnan(back[2 * i]) && std::isnan(expected)));
      CHECK(back[2 * i + 1] == 7);
    }
  });
}

TEST(dot_matches_doubles) {
  for_all_kernels(kFormats, [](const Kernels& kernels, WeightFormat format) {
    for (std::int64_t n = 1; n < 150; n += n % 7 + 1) {
      const std::int64_t rows = n % 6;
      const Stored w(format, rows, n);
      const auto x = random_floats(n);
      std::vector<float> y(rows + 1, 3);
      row_kernels(kernels, format).dot(w.rows(), rows, x.data(), y.data(), false, {});
      const std::vector<float> once = y;
      row_kernels(kernels, format).dot(w.rows(), rows, x.data(), y.data(), true, {});
      for (std::int64_t r = 0; r < rows; ++r) {
        double expected = 0;
        for (std::int64_t i = 0; i < n; ++i) expected += double{w.values[r * n + i]} * x[i];
        CHECK_NEAR(once[r], expected, 1e-5);
        CHECK_NEAR(y[r], 2 * expected, 2e-5);
      }
      CHECK(y[rows] == 3);
    }
  });
}

TEST(bf16c_rows_are_loaded) {
  for_all_kernels({WeightFormat::bf16c}, [](const Kernels& kernels, WeightFormat format) {
    for (const std::int64_t n : {1, 35, 64, 200}) {
      const Stored w(format, 6, n);
      for (std::int64_t r = 0; r < 6; ++r) {
        std::vector<float> back(2 * n, 7);
        Rows row = w.rows();
        row.data += r * row.stride;
        row_kernels(kernels, format).load(row, back.data(), 2);
        for (std::int64_t i = 0; i < n; ++i)
          CHECK(back[2 * i] == w.values[r * n + i] && back[2 * i + 1] == 7);
      }
    }
  });
}

TEST(corrupt_bf16c_rows_stay_within_vectors) {
  for_all_kernels({WeightFormat::bf16c}, [](const Kernels& kernels, WeightFormat format) {
    const std::int64_t n = 70;
    Stored w(format, 1, n);
    std::memset(w.stored.data(), 0xff, bf16c_head_bytes(n));
    std::vector<float> x(n, 1), y(1), h(1), sum(2 * kGroup + 1, 3), back(n + 1, 3);
    row_kernels(kernels, format).dot(w.rows(), 1, x.data(), y.data(), false, {});
    row_kernels(kernels, format).load(w.rows(), back.data(), 1);
    const std::int32_t id = 0;
    row_kernels(kernels, format)
        .ffn_fused({w.rows(), w.rows(), w.rows()}, Activation::silu, {&id, 1}, x.data(), h.data(),
                   sum.data());
    CHECK(back[n] == 3 && sum[2 * kGroup] == 3);
    const std::vector<std::byte> row(bf16c_row_bytes(n), std::byte{0xff});
    expand_bf16(row.data(), n, 1, n - 1, back.data());
    CHECK(back[n] == 3);
  });
}

TEST(ffn_fused_matches_doubles) {
  for_all_kernels(kFormats, [](const Kernels& kernels, WeightFormat format) {
    const std::int64_t n = 75, size = 40, room = groups_of(n) * kGroup;
    const Stored gate(format, size, n), up(format, size, n), down(format, size, n);
    const auto x = random_floats(n);
    for (const std::int64_t count : {1, 3, 8, 21, 40}) {
      std::vector<std::int32_t> ids;
      for (std::int64_t i = 0; i < count; ++i)
        ids.push_back(static_cast<std::int32_t>(i * 39 / 40));
      std::vector<float> h(count + 1, 3), y(room + 1, 3);
      row_kernels(kernels, format)
          .ffn_fused({gate.rows(), up.rows(), down.rows()}, Activation::silu, {ids.data(), count},
                     x.data(), h.data(), y.data());
      naive::Vector expected(n), sizes(n);  // sizes: sums without signs, which bound the rounding
      for (std::int64_t i = 0; i < count; ++i) {
        double g = 0, u = 0;
        for (std::int64_t e = 0; e < n; ++e) {
          g += double{gate.values[ids[i] * n + e]} * x[e];
          u += double{up.values[ids[i] * n + e]} * x[e];
        }
        const double weight = naive::activate(Activation::silu, g) * u;
        CHECK_NEAR(h[i], weight, 1e-4);
        for (std::int64_t e = 0; e < n; ++e) {  // from the kernel's own h, whose error is apart
          const double product = double{h[i]} * down.values[ids[i] * n + e];
          expected[e] += product;
          sizes[e] += std::abs(product);
        }
      }
      for (std::int64_t e = 0; e < n; ++e) CHECK_NEAR(y[e], expected[e], 1e-6 * (1 + sizes[e]));
      CHECK(h[count] == 3 && y[room] == 3);
    }
  });
}

TEST(attend_matches_doubles) {
  for_all_kernels({KvFormat::f32, KvFormat::bf16}, [](const Kernels& kernels, KvFormat format) {
    for (const std::int64_t n : {10, 64, 80})
      for (const std::int64_t keys : {1, 5, 127, 128})
        for (const std::int64_t queries : {1, 2, 3, 7}) {
          const float cap = queries % 2 == 0 ? 0.0f : 1.5f;
          const Stored k(weights_like(format), keys, n), v(weights_like(format), keys, n);
          const auto q = random_floats(queries * n);
          std::vector<float> partial(queries * (2 + n) + 1, 3);
          cache_kernels(kernels, format)
              .attend(k.stored.data(), v.stored.data(), keys, n, q.data(), queries, {0.5f, cap},
                      partial.data());
          for (std::int64_t j = 0; j < queries; ++j) {
            const float* part = partial.data() + j * (2 + n);
            naive::Vector scores(keys), out(n);
            double total = 0;
            for (std::int64_t i = 0; i < keys; ++i) {
              for (std::int64_t e = 0; e < n; ++e)
                scores[i] += 0.5 * k.values[i * n + e] * q[j * n + e];
              if (cap > 0) scores[i] = cap * std::tanh(scores[i] / cap);
              const double weight = std::exp(scores[i] - part[0]);
              total += weight;
              for (std::int64_t e = 0; e < n; ++e) out[e] += weight * v.values[i * n + e];
            }
            CHECK_NEAR(part[0], *std::max_element(scores.begin(), scores.end()), 1e-5);
            CHECK_NEAR(part[1], total, 1e-4);
            for (std::int64_t e = 0; e < n; ++e) CHECK_NEAR(part[2 + e], out[e], 1e-4);
          }
          CHECK(partial.back() == 3);
        }
  });
}

TEST(soft_cap_matches_doubles) {
  for (const Kernels* kernels : available_kernels())
    for (const double cap : {0.5, 30.0, 50.0}) {
      std::vector<float> x;
      for (double size = 1e-6; size < 1e4; size *= 1.01)
        for (const double sign : {-1, 1}) x.push_back(static_cast<float>(sign * size));
      std::vector<float> capped = x;
      capped.push_back(3);
      kernels->soft_cap(static_cast<float>(cap), capped.data(), std::ssize(x));
      for (std::size_t i = 0; i < x.size(); ++i) {
        const double expected = cap * std::tanh(x[i] / cap);
        CHECK_NEAR(capped[i] / expected, 1, 3e-7);
      }
      CHECK(capped.back() == 3);
    }
}

TEST(int8_cache_rounds_and_attends_like_doubles) {
  for (const Kernels* kernels : available_kernels())
    for (const std::int64_t n : {10, 64, 80})
      for (const std::int64_t keys : {1, 5, 128}) {
        const std::int64_t queries = 3, bytes = kv_row_bytes(KvFormat::int8, n);
        std::vector<std::byte> k(keys * bytes), v(keys * bytes);
        naive::Vector stored_k, stored_v;
        for (auto [rows, stored] : {std::pair{&k, &stored_k}, std::pair{&v, &stored_v}})
          for (std::int64_t i = 0; i < keys; ++i) {
            auto values = random_floats(2 * n);
            if (i == 3) values.assign(2 * n, 0.0f);
            cache_kernels(*kernels, KvFormat::int8)
                .store(values.data(), 2, n, rows->data() + i * bytes);
            for (std::int64_t e = 0; e < n; ++e) {
              float most = 0;
              for (std::int64_t other = e / 32 * 32; other < std::min(n, e / 32 * 32 + 32); ++other)
                most = std::max(most, std::abs(values[2 * other]));
              std::uint16_t scale;
              std::memcpy(&scale, rows->data() + i * bytes + n + e / 32 * 2, 2);
              CHECK(std::abs(bf16_to_f32(scale) - most / 127) <= most / 127 / 256);
              const auto code = static_cast<std::int8_t>((*rows)[i * bytes + e]);
              stored->push_back(code * double{bf16_to_f32(scale)});
              // Half a step, which rounding to bf16 may have made larger.
              CHECK(std::abs(stored->back() - values[2 * e]) <= most / 254 * (1 + 1.0 / 256));
            }
          }
        const auto q = random_floats(queries * n);
        std::vector<float> partial(queries * (2 + n) + 1, 3);
        cache_kernels(*kernels, KvFormat::int8)
            .attend(k.data(), v.data(), keys, n, q.data(), queries, {0.5f, 0}, partial.data());
        for (std::int64_t j = 0; j < queries; ++j) {
          const float* part = partial.data() + j * (2 + n);
          naive::Vector out(n);
          double total = 0, largest = -1e30;
          for (std::int64_t i = 0; i < keys; ++i) {
            double score = 0;
            for (std::int64_t e = 0; e < n; ++e) score += 0.5 * stored_k[i * n + e] * q[j * n + e];
            largest = std::max(largest, score);
            const double weight = std::exp(score - part[0]);
            total += weight;
            for (std::int64_t e = 0; e < n; ++e) out[e] += weight * stored_v[i * n + e];
          }
          CHECK_NEAR(part[0], largest, 1e-5);
          CHECK_NEAR(part[1], total, 1e-4);
          for (std::int64_t e = 0; e < n; ++e) CHECK_NEAR(part[2 + e], out[e], 1e-4);
        }
        CHECK(partial.back() == 3);
      }
}

TEST(multiply_matches_doubles) {
  for_all_kernels(kFormats, [](const Kernels& kernels, WeightFormat format) {
    const std::int64_t width = kernels.panel, count = 2;
    for (const std::int64_t rows : {1, 7, 48, 61})
      for (const std::int64_t n : {1, 33, 300}) {
        const Stored w(format, rows, n);
        const auto b = random_floats(count * n * width), b2 = random_floats(count * rows * width);
        std::vector<float> c(count * rows * width + 1, 3);
        const PanelKernels& panels = panel_kernels(kernels, format);
        std::vector<std::byte> prepared;
        PreparedPanels in = ConstPanels{b.data(), n * width};
        if (panels.prepare) {
          in = {prepared.data(), panels.prepared_bytes(n)};
          prepared.resize(count * in.stride + 1, std::byte{7});
          in.data = prepared.data();
          for (std::int64_t p = 0; p < count; ++p)
            panels.prepare(b.data() + p * n * width, n, prepared.data() + p * in.stride);
          CHECK(prepared.back() == std::byte{7});
        }
        // `prepare` rounds to bf16, which changes each term by at most 1/256.
        const auto rounded = [&](float v) {
          return panels.prepare ? bf16_to_f32(f32_to_bf16(v)) : v;
        };
        const Panels out = {c.data(), rows * width};
        panels.multiply(w.rows(), rows, in, out, count, false);
        panels.multiply(w.rows(), rows, in, out, count, true);
        // Some of the columns.
        const std::int64_t first = n / 2 / panels.block_columns * panels.block_columns;
        const std::int64_t columns = n - first;
        std::vector<float> c2(count * columns * width + 1, 3);
        panels.multiply_transposed(w.rows(), rows, first, columns, {b2.data(), rows * width},
                                   {c2.data(), columns * width}, count);
        for (std::int64_t p = 0; p < count; ++p)
          for (std::int64_t lane = 0; lane < width; ++lane) {
            naive::Vector expected2(columns, 3);
            for (std::int64_t r = 0; r < rows; ++r) {
              double expected = 0, exact = 0, bound = 2e-4;
              for (std::int64_t i = 0; i < n; ++i) {
                const double weight = w.values[r * n + i];
                const float x = b[(p * n + i) * width + lane];
                expected += weight * rounded(x);
                exact += weight * x;
                bound += 2 * std::abs(weight * x) / 256;
              }
              for (std::int64_t i = 0; i < columns; ++i)
                expected2[i] += double{w.values[r * n + first + i]} *
                                rounded(b2[(p * rows + r) * width + lane]);
              CHECK_NEAR(c[(p * rows + r) * width + lane], 2 * expected, 2e-4);
              CHECK_NEAR(c[(p * rows + r) * width + lane], 2 * exact, bound);
            }
            for (std::int64_t i = 0; i < columns; ++i)
              CHECK_NEAR(c2[(p * columns + i) * width + lane], expected2[i], 1e-4);
          }
        CHECK(c.back() == 3 && c2.back() == 3);
      }
  });
}

TEST(norms_match_doubles) {
  for (const Kernels* table : available_kernels())
    for (const std::int64_t n : {1, 10, 66, 1000}) {
      const auto weight = random_floats(n), x = random_floats(n * table->panel);
      std::vector<float> out(n * table->panel), row(n), row_out(n);
      table->rms_norm_panel(x.data(), weight.data(), 0.1f, n, out.data());
      for (std::int64_t lane = 0; lane < table->panel; ++lane) {
        double squares = 0;
        for (std::int64_t i = 0; i < n; ++i) {
          row[i] = x[i * table->panel + lane];
          squares += double{row[i]} * row[i];
        }
        table->rms_norm(row.data(), weight.data(), 0.1f, n, row_out.data());
        for (std::int64_t i = 0; i < n; ++i) {
          const double expected = row[i] / std::sqrt(squares / n + 0.1) * weight[i];
          CHECK_NEAR(row_out[i], expected, 2e-6);
          CHECK_NEAR(out[i * table->panel + lane], expected, 2e-6);
        }
      }
    }
}

TEST(gated_writes_no_more_than_asked) {
  for (const Kernels* table : available_kernels())
    for (std::int64_t n = 1; n < 70; ++n) {
      const auto gate = random_floats(n), up = random_floats(n);
      std::vector<float> h(n + 1, 7);
      table->gated(Activation::silu, gate.data(), up.data(), h.data(), n);
      for (std::int64_t i = 0; i < n; ++i)
        CHECK_NEAR(h[i], naive::activate(Activation::silu, gate[i]) * up[i], 2e-6);
      CHECK(h[n] == 7);
    }
}

TEST(activations_are_accurate) {
  for (const Kernels* table : available_kernels()) {
    std::vector<float> x, ones, out;
    for (float v = -100; v <= 100; v += 0.0137f) x.push_back(v);
    for (const float v : {0.0f, -0.0f, 1e30f, -1e30f, 1e-30f, -87.3f, -88.5f}) x.push_back(v);
    ones.assign(x.size(), 1);
    out.resize(x.size());
    const std::int64_t n = static_cast<std::int64_t>(x.size());
    for (const Activation a : kActivations) {
      table->gated(a, x.data(), ones.data(), out.data(), n);
      for (std::int64_t i = 0; i < n; ++i) {
        const double expected = naive::activate(a, x[i]);
        CHECK_NEAR(out[i], expected, 3e-7 * std::max(1.0, std::abs(expected)));
      }
    }
    const float nan = NAN;
    float result = 0;
    table->gated(Activation::silu, &nan, ones.data(), &result, 1);
    CHECK(std::isnan(result));
  }
}

int main() { return run_tests(); }
