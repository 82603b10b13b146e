// The CPU backend's parts by themselves: kernels, rotary frequencies, threads.
#include <tda/engine.h>
#include <tda/error.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "base/thread_pool.h"
#include "base/half.h"
#include "naive.h"

using namespace tda;

namespace {

constexpr Activation kActivations[] = {Activation::silu, Activation::gelu, Activation::gelu_tanh,
                                       Activation::relu};

std::vector<float> random_floats(std::int64_t count) {
  static std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& v : values) v = normal(random);
  return values;
}

constexpr int kBf16c = 4;  // its place among the kernels of rows

/// Rows in one format (0: f32, 1: bf16, kBf16c), and what they hold.
struct Stored {
  std::int64_t n;
  std::vector<float> values;
  std::vector<float> stored;  // the bytes; some formats need less
  std::int64_t stride = 0;

  Stored(const Kernels& kernels, int format, std::int64_t rows, std::int64_t length)
      : n(length), values(random_floats(rows * n)), stored(rows * (n + 100)) {
    if (format != kBf16c) kernels.caches[format].store(values.data(), 1, rows * n, stored.data());
    if (format == 0) return;
    if (format == kBf16c && n > 30)  // rows with 17 upper bytes, of which two large ones are apart
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
    if (format == 1) return;
    stride = bf16c_row_bytes(n);
    auto* const bytes = reinterpret_cast<std::byte*>(stored.data());
    for (std::int64_t r = 0; r < rows; ++r)
      CHECK(compress_bf16(halves.data() + r * n, n, bytes + r * stride));
  }
  Rows rows() const {
    return {reinterpret_cast<const std::byte*>(stored.data()), nullptr, n, stride};
  }
};

template <class Body>
void for_all_kernels(const Body& body, std::initializer_list<int> formats = {0, 1}) {
  for (const Kernels* table : available_kernels())
    for (const int format : formats) {
      const int before = check::failures;
      body(*table, format);
      if (check::failures > before) std::printf("  in: %s, format %d\n", table->name, format);
    }
}

}  // namespace

TEST(rows_are_stored_and_loaded) {
  for_all_kernels([](const Kernels& kernels, int format) {
    std::vector<float> x = random_floats(70);
    x[3] = INFINITY;
    x[4] = NAN;
    std::vector<float> row(35), back(70, 7);
    kernels.caches[format].store(x.data(), 2, 35, row.data());
    kernels.rows[format].load({reinterpret_cast<const std::byte*>(row.data()), nullptr, 35},
                              back.data(), 2);
    for (std::int64_t i = 0; i < 35; ++i) {
      const float expected = format == 0 ? x[2 * i] : bf16_to_f32(f32_to_bf16(x[2 * i]));
      CHECK(back[2 * i] == expected || (std::isnan(back[2 * i]) && std::isnan(expected)));
      CHECK(back[2 * i + 1] == 7);
    }
  });
}

TEST(dot_matches_doubles) {
  for_all_kernels(
      [](const Kernels& kernels, int format) {
        for (std::int64_t n = 1; n < 150; n += n % 7 + 1) {
          const std::int64_t rows = n % 6;
          const Stored w(kernels, format, rows, n);
          const auto x = random_floats(n);
          std::vector<float> y(rows + 1, 3);
          kernels.rows[format].dot(w.rows(), rows, x.data(), y.data(), false, {});
          const std::vector<float> once = y;
          kernels.rows[format].dot(w.rows(), rows, x.data(), y.data(), true, {});
          for (std::int64_t r = 0; r < rows; ++r) {
            double expected = 0;
            for (std::int64_t i = 0; i < n; ++i) expected += double{w.values[r * n + i]} * x[i];
            CHECK_NEAR(once[r], expected, 1e-5);
            CHECK_NEAR(y[r], 2 * expected, 2e-5);
          }
          CHECK(y[rows] == 3);
        }
      },
      {0, 1, kBf16c});
}

TEST(bf16c_rows_are_loaded) {
  for_all_kernels(
      [](const Kernels& kernels, int format) {
        for (const std::int64_t n : {1, 35, 64, 200}) {
          const Stored w(kernels, format, 6, n);
          for (std::int64_t r = 0; r < 6; ++r) {
            std::vector<float> back(2 * n, 7);
            Rows row = w.rows();
            row.data += r * row.stride;
            kernels.rows[format].load(row, back.data(), 2);
            for (std::int64_t i = 0; i < n; ++i)
              CHECK(back[2 * i] == w.values[r * n + i] && back[2 * i + 1] == 7);
          }
        }
      },
      {kBf16c});
}

TEST(bf16c_rows_that_lie_stay_within_vectors) {
  for_all_kernels(
      [](const Kernels& kernels, int format) {
        const std::int64_t n = 70;
        Stored w(kernels, format, 1, n);
        std::memset(w.stored.data(), 0xff, bf16c_head_bytes(n));
        std::vector<float> x(n, 1), y(1), h(1), sum(2 * kGroup + 1, 3), back(n + 1, 3);
        kernels.rows[format].dot(w.rows(), 1, x.data(), y.data(), false, {});
        kernels.rows[format].load(w.rows(), back.data(), 1);
        const std::int32_t id = 0;
        kernels.rows[format].ffn_fused({w.rows(), w.rows(), w.rows()}, Activation::silu, {&id, 1},
                                     x.data(), h.data(), sum.data());
        CHECK(back[n] == 3 && sum[2 * kGroup] == 3);
        const std::vector<std::byte> row(bf16c_row_bytes(n), std::byte{0xff});
        expand_bf16(row.data(), n, 1, n - 1, back.data());
        CHECK(back[n] == 3);
      },
      {kBf16c});
}

TEST(neurons_match_doubles) {
  for_all_kernels(
      [](const Kernels& kernels, int format) {
        const std::int64_t n = 75, size = 40, room = groups_of(n) * kGroup;
        const Stored gate(kernels, format, size, n), up(kernels, format, size, n),
            down(kernels, format, size, n);
        const auto x = random_floats(n);
        for (const std::int64_t count : {1, 3, 8, 21, 40}) {
          std::vector<std::int32_t> ids;
          for (std::int64_t i = 0; i < count; ++i)
            ids.push_back(static_cast<std::int32_t>(i * 39 / 40));
          std::vector<float> h(count + 1, 3), y(room + 1, 3);
          kernels.rows[format].ffn_fused({gate.rows(), up.rows(), down.rows()}, Activation::silu,
                                       {ids.data(), count}, x.data(), h.data(), y.data());
          naive::Vector expected(n);
          for (std::int64_t i = 0; i < count; ++i) {
            double g = 0, u = 0;
            for (std::int64_t e = 0; e < n; ++e) {
              g += double{gate.values[ids[i] * n + e]} * x[e];
              u += double{up.values[ids[i] * n + e]} * x[e];
            }
            const double weight = naive::activate(Activation::silu, g) * u;
            CHECK_NEAR(h[i], weight, 1e-4);
            for (std::int64_t e = 0; e < n; ++e)
              expected[e] += weight * down.values[ids[i] * n + e];
          }
          for (std::int64_t e = 0; e < n; ++e) CHECK_NEAR(y[e], expected[e], 1e-3);
          CHECK(h[count] == 3 && y[room] == 3);
        }
      },
      {0, 1, kBf16c});
}

TEST(attend_matches_doubles) {
  for_all_kernels([](const Kernels& kernels, int format) {
    for (const std::int64_t n : {10, 64, 80})
      for (const std::int64_t keys : {1, 5, 127, 128})
        for (const std::int64_t queries : {1, 2, 3, 7}) {
          const Stored k(kernels, format, keys, n), v(kernels, format, keys, n);
          const auto q = random_floats(queries * n);
          std::vector<float> partial(queries * (2 + n) + 1, 3);
          kernels.caches[format].attend(k.stored.data(), v.stored.data(), keys, n, q.data(),
                                        queries, 0.5f, partial.data());
          for (std::int64_t j = 0; j < queries; ++j) {
            const float* part = partial.data() + j * (2 + n);
            naive::Vector scores(keys), out(n);
            double total = 0;
            for (std::int64_t i = 0; i < keys; ++i) {
              for (std::int64_t e = 0; e < n; ++e)
                scores[i] += 0.5 * k.values[i * n + e] * q[j * n + e];
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
            float most = 0;
            for (std::int64_t e = 0; e < n; ++e) most = std::max(most, std::abs(values[2 * e]));
            kernels->caches[2].store(values.data(), 2, n, rows->data() + i * bytes);
            for (std::int64_t e = 0; e < n; ++e) {
              const auto code = static_cast<std::int8_t>((*rows)[i * bytes + e]);
              stored->push_back(code * double{most} / 127);
              CHECK(std::abs(stored->back() - values[2 * e]) <= most / 254 * (1 + 1e-5));
            }
          }
        const auto q = random_floats(queries * n);
        std::vector<float> partial(queries * (2 + n) + 1, 3);
        kernels->caches[2].attend(k.data(), v.data(), keys, n, q.data(), queries, 0.5f,
                                  partial.data());
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
  for_all_kernels(
      [](const Kernels& kernels, int format) {
        const std::int64_t width = kernels.panel, count = 2;
        for (const std::int64_t rows : {1, 7, 48, 61})
          for (const std::int64_t n : {1, 33, 300}) {
            const Stored w(kernels, format, rows, n);
            const auto b = random_floats(count * n * width),
                       b2 = random_floats(count * rows * width);
            std::vector<float> c(count * rows * width + 1, 3);
            const PanelKernels& panels = kernels.panels[format];
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
            // What prepares, rounds to bf16: each term moves by at most 1/256 of its size.
            const auto taken = [&](float v) {
              return panels.prepare ? bf16_to_f32(f32_to_bf16(v)) : v;
            };
            const Panels out = {c.data(), rows * width};
            kernels.panels[format].multiply(w.rows(), rows, in, out, count, false);
            kernels.panels[format].multiply(w.rows(), rows, in, out, count, true);
            // Some of the columns.
            const std::int64_t first = n / 2 / panels.block_columns * panels.block_columns;
            const std::int64_t columns = n - first;
            std::vector<float> c2(count * columns * width + 1, 3);
            kernels.panels[format].multiply_transposed(w.rows(), rows, first, columns,
                                                       {b2.data(), rows * width},
                                                       {c2.data(), columns * width}, count);
            for (std::int64_t p = 0; p < count; ++p)
              for (std::int64_t lane = 0; lane < width; ++lane) {
                naive::Vector expected2(columns, 3);
                for (std::int64_t r = 0; r < rows; ++r) {
                  double expected = 0, exact = 0, bound = 2e-4;
                  for (std::int64_t i = 0; i < n; ++i) {
                    const double weight = w.values[r * n + i];
                    const float x = b[(p * n + i) * width + lane];
                    expected += weight * taken(x);
                    exact += weight * x;
                    bound += 2 * std::abs(weight * x) / 256;
                  }
                  for (std::int64_t i = 0; i < columns; ++i)
                    expected2[i] += double{w.values[r * n + first + i]} *
                                    taken(b2[(p * rows + r) * width + lane]);
                  CHECK_NEAR(c[(p * rows + r) * width + lane], 2 * expected, 2e-4);
                  CHECK_NEAR(c[(p * rows + r) * width + lane], 2 * exact, bound);
                }
                for (std::int64_t i = 0; i < columns; ++i)
                  CHECK_NEAR(c2[(p * columns + i) * width + lane], expected2[i], 1e-4);
              }
            CHECK(c.back() == 3 && c2.back() == 3);
          }
      },
      {0, 1, kBf16c});
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

TEST(rope_frequencies_match_transformers) {
  using Scaling = RopeConfig::Scaling;
  const auto check = [](const RopeConfig& rope, std::int64_t length,
                        const std::vector<float>& expected) {
    const auto found = rope_frequencies(rope, 16, length);
    CHECK(found.size() == expected.size());
    for (std::size_t i = 0; i < expected.size(); ++i)
      CHECK_NEAR(found.at(i) / expected[i], 1, 2e-7);
  };
  RopeConfig rope;
  check(rope, 1,
        {1.f, 0.316227764f, 0.100000001f, 0.0316227786f, 0.00999999978f, 0.00316227786f,
         0.00100000005f, 0.000316227786f});
  rope.scaling = Scaling::linear;
  rope.factor = 3;
  check(rope, 1,
        {0.333333343f, 0.105409257f, 0.0333333351f, 0.0105409259f, 0.00333333318f, 0.00105409266f,
         0.000333333359f, 0.000105409265f});
  rope.scaling = Scaling::dynamic;
  rope.factor = 2;
  rope.original_max_position = 2048;
  check(rope, 2000,
        {1.f, 0.316227764f, 0.100000001f, 0.0316227786f, 0.00999999978f, 0.00316227786f,
         0.00100000005f, 0.000316227786f});
  check(rope, 5000,
        {1.f, 0.260517091f, 0.0678691566f, 0.0176810753f, 0.00460622227f, 0.00119999971f,
         0.000312620425f, 8.14429659e-05f});
  rope = {};
  rope.scaling = Scaling::llama3;
  rope.theta = 500000;
  rope.factor = 8;
  rope.original_max_position = 256;
  check(rope, 1,
        {1.f, 0.193922758f, 0.0105382307f, 0.000911583134f, 0.000176776681f, 3.42810235e-05f,
         6.64786967e-06f, 1.28917316e-06f});
  rope = {};
  rope.scaling = Scaling::yarn;
  rope.factor = 4;
  rope.original_max_position = 512;
  check(rope, 1,
        {1.f, 0.25693506f, 0.0625f, 0.0138349654f, 0.00249999994f, 0.000790569466f, 0.000250000012f,
         7.90569466e-05f});
  rope.truncate = false;
  rope.beta_fast = 16;
  rope.beta_slow = 2;
  check(rope, 1,
        {1.f, 0.316227764f, 0.0756644011f, 0.0107961092f, 0.00249999994f, 0.000790569466f,
         0.000250000012f, 7.90569466e-05f});
}

TEST(thread_pool_runs_every_task_once) {
  for (const int threads : {1, 2, 5, 33}) {
    ThreadPool pool(threads);
    for (std::int64_t region = 0; region < 3000; ++region) {
      const std::int64_t n = region % 11 * (region % 100 == 0 ? 50 : 1);
      std::vector<int> runs(n);
      pool.run(n, [&](std::int64_t i, int thread) {
        if (region % 1000 == 999) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        runs[i] += 1 + (thread >= threads);
      });
      CHECK(runs == std::vector<int>(n, 1));
      // Now and then long enough for the workers to fall asleep.
      if (region % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }
  CHECK(ThreadPool(0).threads() >= 1);
}

TEST(thread_pool_runs_tasks_side_by_side) {
  const int threads = 4;
  ThreadPool pool(threads);
  // Each task waits for all the others, so each needs a thread of its own.
  std::atomic<int> arrived = 0, lonely = 0;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  pool.run(threads, [&](std::int64_t, int) {
    ++arrived;
    while (arrived < threads && std::chrono::steady_clock::now() < deadline)
      std::this_thread::yield();
    if (arrived < threads) ++lonely;
  });
  CHECK(lonely == 0);
}

TEST(bandwidth_is_measured) {
  CHECK(measure_read_bandwidth(2, 4) > 1e6);
  CHECK_THROWS(measure_read_bandwidth(1, 0), OptionError, "megabytes: 0");
}

TEST(wrong_options_are_named) {
  CHECK_THROWS(resolve_threads(-1), OptionError, "threads: -1");
  CHECK_THROWS(resolve_threads(1025), OptionError, "1024");
  setenv("TDA_CPU_ISA", "sse9", 1);
  CHECK_THROWS(choose_kernels(), OptionError, "TDA_CPU_ISA=sse9");
  CHECK_THROWS(choose_kernels(), OptionError, "portable");
  setenv("TDA_CPU_ISA", "portable", 1);
  CHECK(&choose_kernels() == available_kernels().front());
  unsetenv("TDA_CPU_ISA");
  CHECK(&choose_kernels() == available_kernels().back());
}

int main() { return run_tests(); }
