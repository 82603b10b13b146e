// What is not finite must reach the results: through every kernel of every instruction set that
// this machine has, and from a backend's first layer to its logits.
#include <tda/error.h>

#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "aligned.h"
#include "check.h"
#include "cpu/cpu_backend.h"
#include "cpu/isa.h"
#include "model/forward.h"
#include "naive.h"

using namespace tda;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
const std::array<float, 3> kBad = {NAN, kInfinity, -kInfinity};
constexpr std::int64_t kRows = 50;

std::vector<float> random_floats(std::int64_t count) {
  static std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& v : values) v = normal(random);
  return values;
}

bool is_finite(std::span<const float> values) {
  return std::ranges::all_of(values, [](float v) { return std::isfinite(v); });
}
bool none_is_finite(std::span<const float> values) {
  return std::ranges::none_of(values, [](float v) { return std::isfinite(v); });
}

/// kRows random rows of int8.
struct IntegerMatrix {
  AlignedBytes data;
  Matrix matrix;

  explicit IntegerMatrix(std::int64_t cols) : matrix{WeightFormat::int8, kRows, cols} {
    data.resize(kRows * matrix.row_bytes() + 64);
    matrix.data = data.data();
    for (std::int64_t r = 0; r < kRows; ++r) {
      const std::vector<float> row = random_floats(cols);
      quantize_int8(row.data(), cols, data.data() + r * matrix.row_bytes());
    }
  }
};

/// body(kernels, int8's index among the kernels, columns) for all of them.
template <class Body>
void for_all(const Body& body) {
  for (const Kernels* kernels : available_kernels())
    for (const std::int64_t n : {8, 66, 128, 200, 576}) body(*kernels, 2, n);
}

template <class Kind>
const void* prepared(const Kind& kernels, const float* x, std::int64_t n, AlignedBytes& memory) {
  if (!kernels.prepare) return x;
  memory.resize(kernels.prepared_bytes(n));
  kernels.prepare(x, n, memory.data());
  return memory.data();
}

}  // namespace

TEST(integer_rows_times_a_vector_that_is_not_finite) {
  for_all([](const Kernels& kernels, int at, std::int64_t n) {
    const IntegerMatrix w(n);
    const RowKernels& rows = kernels.rows[at];
    for (const float bad : kBad)
      for (const std::int64_t where : {std::int64_t{0}, n / 2, n - 1}) {
        std::vector<float> x = random_floats(n);
        x[where] = bad;
        AlignedBytes memory;
        const void* const p = prepared(rows, x.data(), n, memory);
        std::vector<float> y(kRows);
        rows.dot(rows_of(w.matrix), kRows, p, y.data(), false, {});
        CHECK(none_is_finite(y));
      }
    // All of them, as after a norm.
    const std::vector<float> x(n, NAN);
    AlignedBytes memory;
    std::vector<float> y(kRows);
    rows.dot(rows_of(w.matrix), kRows, prepared(rows, x.data(), n, memory), y.data(), false, {});
    CHECK(none_is_finite(y));
  });
}

TEST(integer_neurons_of_which_one_is_not_finite) {
  for_all([](const Kernels& kernels, int at, std::int64_t n) {
    const IntegerMatrix gate(n), up(n), down(n);
    const NeuronRows rows = {rows_of(gate.matrix), rows_of(up.matrix), rows_of(down.matrix)};
    std::vector<std::int32_t> ids(kRows);
    std::iota(ids.begin(), ids.end(), 0);
    const std::vector<float> x = random_floats(n), lengths(kRows, 1.0f);
    AlignedBytes memory;
    const void* const p = prepared(kernels.rows[at], x.data(), n, memory);
    std::vector<float> h(kRows + 16), y((n + 63) / 64 * 64);
    const auto fused = [&](Activation activation) {
      kernels.rows[at].ffn_fused(rows, activation, {ids.data(), kRows}, p, h.data(), y.data());
      return std::span(y).first(n);
    };
    const auto selected = [&](float threshold, bool by_gate) {
      const Selection selection = {threshold, by_gate, lengths.data()};
      kernels.rows[at].ffn_selected(rows, Activation::silu, selection, {ids.data(), kRows}, p,
                                    h.data(), y.data());
      return std::span(y).first(n);
    };
    CHECK(is_finite(fused(Activation::relu)));
    CHECK(is_finite(selected(1, false)));
    // A row's step, behind its codes and scales.
    const std::int64_t step = groups_of(n) * (kGroup + kInt8Scales);
    for (const float bad : kBad)
      for (const IntegerMatrix* damaged : {&gate, &up, &down}) {
        auto* const place = const_cast<std::byte*>(damaged->matrix.row(17)) + step;
        float before;
        std::memcpy(&before, place, 4);
        std::memcpy(place, &bad, 4);
        for (const Activation activation :
             {Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu})
          CHECK(none_is_finite(fused(activation)));
        if (damaged != &down) {  // of which rows may not be selected
          CHECK(none_is_finite(selected(1e6f, false)));
          if (damaged == &gate) CHECK(none_is_finite(selected(1e6f, true)));
        }
        std::memcpy(place, &before, 4);
      }
  });
}

TEST(integer_rows_times_panels_that_are_not_finite) {
  for_all([](const Kernels& kernels, int at, std::int64_t n) {
    const IntegerMatrix w(n);
    const PanelKernels& panels = kernels.panels[at];
    const std::int64_t width = kernels.panel, lane = width - 2;
    for (const float bad : kBad) {
      std::vector<float> b = random_floats(n * width);
      b[(n / 2) * width + lane] = bad;
      AlignedBytes memory;
      const void* const p = prepared(panels, b.data(), n, memory);
      std::vector<float> c(kRows * width);
      panels.multiply(rows_of(w.matrix), kRows, {p, static_cast<std::int64_t>(memory.size())},
                      {c.data(), kRows * width}, 1, false);
      for (std::int64_t i = 0; i < kRows * width; ++i)
        CHECK(std::isfinite(c[i]) == (i % width != lane));

      std::vector<float> h = random_floats(kRows * width), y(n * width);
      h[33 * width + lane] = bad;
      panels.multiply_transposed(rows_of(w.matrix), kRows, 0, n, {h.data(), kRows * width},
                                 {y.data(), n * width}, 1);
      for (std::int64_t i = 0; i < n * width; ++i)
        CHECK(std::isfinite(y[i]) == (i % width != lane));
    }
  });
}

TEST(keys_and_values_that_are_not_finite) {
  for (const Kernels* kernels : available_kernels())
    for (const int format : {0, 1, 2})
      for (const std::int64_t n : {10, 64, 80})
        for (const float bad : kBad)
          for (const bool in_key : {true, false}) {
            constexpr std::int64_t kKeys = 21;
            const std::int64_t bytes =
                kv_row_bytes(std::array{KvFormat::f32, KvFormat::bf16, KvFormat::int8}[format], n);
            std::vector<std::byte> k(kKeys * bytes), v(kKeys * bytes);
            for (std::int64_t i = 0; i < kKeys; ++i)
              for (auto [rows, damaged] : {std::pair{&k, in_key}, std::pair{&v, !in_key}}) {
                std::vector<float> values = random_floats(n);
                if (damaged && i == 13) values[n - 3] = bad;
                kernels->caches[format].store(values.data(), 1, n, rows->data() + i * bytes);
              }
            for (const std::int64_t queries : {1, 2, 3}) {
              const std::vector<float> q = random_floats(queries * n);
              std::vector<float> partial(queries * (2 + n));
              kernels->caches[format].attend(k.data(), v.data(), kKeys, n, q.data(), queries,
                                             {0.5f, queries % 2 == 0 ? 0.0f : 1.5f},
                                             partial.data());
              for (std::int64_t j = 0; j < queries; ++j) {
                const std::span<const float> part = std::span(partial).subspan(j * (2 + n), 2 + n);
                CHECK(in_key ? !std::isfinite(part[1]) : !is_finite(part.last(n)));
              }
            }
          }
}

TEST(soft_caps_hide_nothing) {
  for (const Kernels* kernels : available_kernels())
    for (const float bad : kBad) {
      std::vector<float> logits = random_floats(21);
      logits[13] = bad;
      kernels->soft_cap(30, logits.data(), std::ssize(logits));
      for (std::size_t i = 0; i < logits.size(); ++i) CHECK(std::isfinite(logits[i]) == (i != 13));
    }
}

TEST(sizes_beyond_bf16_are_not_hidden_in_keys) {
  for (const Kernels* kernels : available_kernels()) {
    const float most = std::numeric_limits<float>::max();
    std::uint16_t stored;
    kernels->caches[1].store(&most, 1, 1, &stored);
    CHECK(std::isnan(bf16_to_f32(stored)));
  }
}

TEST(norms_whose_mean_overflows) {
  for (const Kernels* kernels : available_kernels()) {
    constexpr std::int64_t n = 66;
    const std::int64_t width = kernels->panel;
    std::vector<float> weight(n, 1.0f), x = random_floats(n), out(n);
    x[5] = 3e38f;  // finite, its square is not
    kernels->rms_norm(x.data(), weight.data(), 1e-5f, n, out.data());
    CHECK(none_is_finite(out));
    std::vector<float> panel = random_floats(n * width), normed(n * width);
    panel[5 * width + 1] = 3e38f;
    kernels->rms_norm_panel(panel.data(), weight.data(), 1e-5f, n, normed.data());
    for (std::int64_t i = 0; i < n * width; ++i)
      CHECK(std::isfinite(normed[i]) == (i % width != 1));
  }
}

TEST(activations_hide_nothing) {
  for (const Kernels* kernels : available_kernels())
    for (const Activation activation :
         {Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu})
      for (const float bad : kBad) {
        const std::vector<float> up(20, 1.0f), gate(20, bad);
        std::vector<float> h(20);
        kernels->gated(activation, gate.data(), up.data(), h.data(), 20);
        CHECK(none_is_finite(h));
      }
}

namespace {

/// The model's weights that a test may damage, each with a token that meets them.
void expect_failure(const std::shared_ptr<const Model>& model, KvFormat kv, const char* what) {
  const CpuBackend backend(model, 2);
  const std::vector<Token> tokens = naive::random_tokens(20, model->config.vocab_size);
  const auto prefilled = backend.new_state(20, kv);
  CHECK_THROWS(check_finite(forward(backend, *prefilled, naive::step_of(tokens, 0), 20)), Error,
               "not finite");
  const auto decoded = backend.new_state(20, kv);
  int raised = 0;
  for (std::int64_t i = 0; i < 20; ++i) {
    forward(backend, *decoded, naive::step_of({&tokens[i], 1}, i), 0);
    try {
      backend.draw(*decoded, 0, 0);
    } catch (const Error&) {
      ++raised;
    }
  }
  if (raised < 20) check::fail(__FILE__, __LINE__, std::string(what) + " is not always noticed");
}

}  // namespace

TEST(a_damaged_matrix_shows_in_the_logits) {
  using Member = Matrix LayerWeights::*;
  for (const WeightFormat format : {WeightFormat::f32, WeightFormat::bf16, WeightFormat::int8})
    for (const KvFormat kv : {KvFormat::f32, KvFormat::int8}) {
      for (const Member member : {&LayerWeights::qkv, &LayerWeights::output, &LayerWeights::gate,
                                  &LayerWeights::up, &LayerWeights::down}) {
        const naive::RandomModel random(naive::small_config(), format, 3);
        const Matrix& matrix = random.get()->layers[0].*member;
        naive::RandomModel::poison(matrix, matrix.rows - 1);  // of qkv a value's row
        expect_failure(random.get(), kv, "a layer's row");
      }
      const naive::RandomModel random(naive::small_config(), format, 3);
      naive::RandomModel::poison(random.get()->head, 60);  // one logit alone
      expect_failure(random.get(), kv, "a row of the head");
    }
}

int main() { return run_tests(); }
