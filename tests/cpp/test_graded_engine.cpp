// Graded weights in the engine: what loading makes of a checkpoint, engine folders, and options.
#include <tda/engine.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <limits>
#include <utility>
#include <vector>

#include "check.h"
#include "checkpoint/checkpoint.h"
#include "fixtures.h"
#include "weights/model.h"

using namespace tda;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

using fixtures::Folder;
using fixtures::tiny;
using fixtures::updated;

const std::vector<Token> kPrompt = {1, 5, 0, 3, 6, 2, 4, 4, 1, 2, 0, 6, 3, 5, 5, 1};

std::string read(const fixtures::fs::path& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

EngineOptions with_threads(int threads) {
  return {.weights = WeightFormat::graded, .threads = threads};
}
TdaOptions of_inputs(double inputs, std::optional<double> active = {}) {
  return {.active = active, .inputs = inputs};
}

struct Saved {
  Folder folder;
  fixtures::Tensors tensors;
  explicit Saved(const fixtures::json& config = tiny) : tensors(fixtures::tensors_of(config)) {
    fixtures::write_model(folder, config, tensors, "F32");
  }
  Engine open(int threads = 2) const { return Engine(folder.path, with_threads(threads)); }
};

/// Whether the matrix's rows are those of the tensors, 8 bits wide: half a step is 1/510 of 4, the
/// range of what fixtures hold, and clipping may cost a few such steps.
void check_rows(const Matrix& matrix, const std::vector<const fixtures::Tensor*>& tensors,
                const std::function<std::pair<int, std::int64_t>(std::int64_t)>& source) {
  double squares = 0;
  for (std::int64_t r = 0; r < matrix.rows; ++r) {
    std::vector<float> row(matrix.cols);
    read_row(matrix, r, 0, matrix.cols, row.data());
    const auto [which, at] = source(r);
    const fixtures::Tensor& tensor = *tensors[which];
    for (std::int64_t i = 0; i < matrix.cols; ++i) {
      const float value = at < tensor.shape[0] ? tensor.values[at * matrix.cols + i] : 0;
      CHECK_NEAR(row[i], value, at < tensor.shape[0] ? 0.2 : 0);
      squares += (row[i] - value) * (row[i] - value);
    }
  }
  CHECK(std::sqrt(squares / double(matrix.rows * matrix.cols)) < 0.01);
}

}  // namespace

TEST(graded_matrices_are_those_of_the_checkpoint) {
  const Saved saved;
  const Checkpoint checkpoint(saved.folder.path);
  for (const int threads : {1, 3}) {
    const auto model = load_model(checkpoint, WeightFormat::graded, threads);
    const auto tensor = [&](const std::string& name) { return &saved.tensors.at(name); };
    const auto same = [](std::int64_t r) { return std::pair(0, r); };
    check_rows(model->head, {tensor("lm_head.weight")}, same);
    check_rows(model->embedding, {tensor("model.embed_tokens.weight")}, same);
    for (int l = 0; l < 2; ++l) {
      const std::string layer = "model.layers." + std::to_string(l) + ".";
      const LayerWeights& w = model->layers[l];
      const std::string a = layer + "self_attn.", f = layer + "mlp.";
      check_rows(w.output, {tensor(a + "o_proj.weight")}, same);
      check_rows(
          w.qkv,
          {tensor(a + "q_proj.weight"), tensor(a + "k_proj.weight"), tensor(a + "v_proj.weight")},
          [](std::int64_t r) {
            return r < 72 ? std::pair(0, r) : std::pair(r < 96 ? 1 : 2, (r - 72) % 24);
          });
      check_rows(w.gate_up, {tensor(f + "gate_proj.weight"), tensor(f + "up_proj.weight")},
                 [](std::int64_t r) {
                   return std::pair(static_cast<int>(r / 32 % 2), r / 64 * 32 + r % 32);
                 });
      check_rows(w.down, {tensor(f + "down_proj.weight")}, same);
      CHECK(w.down.by_block && w.gate_up.rows == 192);
      for (std::int64_t j = 0; j < 70; ++j) {
        double squares = 0;
        for (std::int64_t r = 0; r < 72; ++r) {
          float value = 0;
          read_row(w.down, r, j, 1, &value);
          squares += double{value} * value;
        }
        CHECK_NEAR(w.down_lengths[j], std::sqrt(squares), 1e-5 * std::sqrt(squares));
      }
    }
  }
}

TEST(graded_engine_folders_compute_the_same_bits) {
  for (const auto& config :
       {tiny, updated(tiny, {{"attention_bias", true}, {"tie_word_embeddings", true}})}) {
    const Saved saved(config);
    const Folder packed;
    pack_checkpoint(saved.folder.path, packed.path, WeightFormat::graded, 2);
    const std::string file = read(packed.path / "model.safetensors");
    const Engine expected = saved.open(), found(packed.path, {.threads = 1});
    CHECK(found.weights() == WeightFormat::graded);
    CHECK(found.weight_bytes() == expected.weight_bytes());
    const std::vector<float> logits = expected.logits(kPrompt);
    CHECK(std::ranges::all_of(logits, [](float v) { return std::isfinite(v); }));
    CHECK(found.logits(kPrompt) == logits);
    for (const std::optional<TdaOptions>& tda : {std::optional<TdaOptions>(), {of_inputs(0.4)}})
      CHECK(found.score(kPrompt, 9, tda).log_probabilities ==
            expected.score(kPrompt, 9, tda).log_probabilities);
    const Folder again;  // the bytes depend on the checkpoint alone
    pack_checkpoint(packed.path, again.path, WeightFormat::graded, 1);
    CHECK(read(again.path / "model.safetensors") == file);
    const Folder another;
    pack_checkpoint(saved.folder.path, another.path, WeightFormat::graded, 1);
    CHECK(read(another.path / "model.safetensors") == file);
  }
}

TEST(graded_damage_is_refused_by_name) {
  Saved saved;
  std::vector<float>& down = saved.tensors.at("model.layers.1.mlp.down_proj.weight").values;
  std::ranges::fill(down, 0.01f);
  down[3 * 70 + 5] = 0.75f;
  fixtures::write_model(saved.folder, tiny, saved.tensors, "F32");
  const Folder packed;
  pack_checkpoint(saved.folder.path, packed.path, WeightFormat::graded, 2);
  const std::string good = read(packed.path / "model.safetensors");
  const StripOutlier outlier = {3, 5, 0.75f};
  const auto bytes = [](const auto& value) {
    return std::string(reinterpret_cast<const char*>(&value), sizeof value);
  };
  const std::size_t at = good.find(bytes(outlier), 4096);
  CHECK(at != std::string::npos);
  const auto refuses = [&](std::size_t place, const std::string& damage,
                           const std::string& message) {
    std::string file = good;
    file.replace(place, damage.size(), damage);
    packed.write("model.safetensors", file);
    CHECK_THROWS(Engine(packed.path), CheckpointError, message);
    CHECK_THROWS(Engine(packed.path), CheckpointError, "model.safetensors: ");
  };
  const auto moved = [&](std::int32_t row, std::int32_t input) {
    return bytes(StripOutlier{row, input, 0.75f});
  };
  const std::string expected = ", expected rows 0 to 63, inputs 0 to 69";
  refuses(at, moved(64, 5), "layer 1, outlier in row 64, input 5" + expected);
  refuses(at, moved(-1, 5), "layer 1, outlier in row -1, input 5" + expected);
  refuses(at, moved(3, 70), "layer 1, outlier in row 3, input 70" + expected);
  refuses(at, moved(3, -1), "layer 1, outlier in row 3, input -1" + expected);
  refuses(at + 8, bytes(NAN), "layer 1, outlier");
  // The vectors before and after the outliers: steps and rests' steps of 128 rows, then the rests'
  // lengths of 96 inputs.
  refuses(at - 1024, bytes(NAN), "layer 1, steps, value 0 is nan, expected a finite number");
  refuses(at - 512 + 4 * 7, bytes(kInfinity), "layer 1, steps of the rests, value 7 is inf");
  refuses(at + 128, bytes(NAN), "layer 1, lengths of the rests, value 0 is nan");
}

TEST(graded_weights_must_be_finite) {
  for (const char* name :
       {"lm_head.weight", "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.v_proj.weight"})
    for (const float bad : {NAN, kInfinity, -kInfinity}) {
      Saved saved;
      saved.tensors.at(name).values.back() = bad;
      fixtures::write_model(saved.folder, tiny, saved.tensors, "F32");
      CHECK_THROWS(saved.open(), CheckpointError,
                   "tensor \"" + std::string(name) + "\" holds NaN or infinity as graded");
    }
}

TEST(graded_options_say_what_does_not_fit) {
  const Saved saved;
  const Engine graded = saved.open(), int8(saved.folder.path, {.weights = WeightFormat::int8});
  const auto refuses = [&](const Engine& engine, const TdaOptions& tda, const std::string& part) {
    CHECK_THROWS(engine.score(kPrompt, 9, tda), OptionError, part);
    CHECK_THROWS(engine.generate(kPrompt, {.max_new_tokens = 2}, tda), OptionError, part);
  };
  refuses(int8, of_inputs(0.2), "tda inputs: expected graded or int4 weights, found int8");
  for (const TdaOptions& tda : {TdaOptions{.error = 0.1}, TdaOptions{.active = 0.5},
                                TdaOptions{.scope = Scope::token, .active = 0.5},
                                TdaOptions{.scope = Scope::token, .error = 0.1}})
    refuses(graded, tda, "tda with graded weights: expected inputs");
  for (TdaOptions tda :
       {TdaOptions{.scope = Scope::token}, TdaOptions{.error = 0.1}, TdaOptions{.refresh = 8},
        TdaOptions{.compact = true}, TdaOptions{.estimate = Estimate::gate}}) {
    tda.inputs = 0.2;
    refuses(graded, tda, "tda inputs: expected alone or with active");
  }
  for (const double share : {-0.1, 1.1, double{NAN}}) {
    refuses(graded, of_inputs(share), "tda inputs ");
    refuses(graded, of_inputs(0.2, share), "tda active ");
  }
  Session session = graded.session(20);
  session.prefill(kPrompt);
  CHECK_THROWS(session.apply(of_inputs(0.2)), OptionError, "sample_tokens");
  const std::vector<std::int32_t> mask = {1, 2};
  CHECK_THROWS(session.set_mask(1, mask), OptionError, "mask of layer 1: found graded weights");
}

TEST(graded_shares_of_inputs_are_what_is_read) {
  const Saved saved;
  const auto stats_of = [&](const std::optional<TdaOptions>& tda, int threads = 2) {
    return saved.open(threads).score(kPrompt, 9, tda).stats;
  };
  const auto scores = [&](const std::optional<TdaOptions>& tda, int threads) {
    return saved.open(threads).score(kPrompt, 9, tda).log_probabilities;
  };
  // Of all bytes of gate, up and down, and of the head: rows of 64, 32 bytes an input.
  const auto high_bytes = [](std::int64_t rows, std::int64_t cols) {
    return static_cast<double>(Bricks(nullptr, rows, cols, BrickKind::graded, false).high_bytes());
  };
  const double high = high_bytes(192, 72) + high_bytes(72, 70);
  const double gate_up = 72 * 32 * 3, down = 70 * 32 * 2;
  const double head_high = high_bytes(7, 72), head = 72 * 32;
  const auto fraction = [&](double inputs, double active) {
    return (high + inputs * gate_up + active * down) / (high + gate_up + down);
  };
  const GenerationStats dense = stats_of({});
  CHECK(dense.tda == "dense");
  CHECK_NEAR(dense.ffn_bytes_fraction, 1, 1e-12);
  CHECK_NEAR(dense.head_bytes_fraction, 1, 1e-12);
  for (const double inputs : {0.0, 0.3, 0.7, 1.0})
    for (const double active : {0.0, 0.4, 1.0}) {
      const GenerationStats stats = stats_of(of_inputs(inputs, active));
      // Other tokens than the prompt's take other shares, except of nothing and everything.
      const auto certain = [](double share) { return share == 0 || share == 1; };
      const double by_input = certain(inputs) ? 1e-12 : 0.05;
      CHECK_NEAR(stats.ffn_active, 1, 1e-12);
      CHECK_NEAR(1 - stats.ffn_coarse, active, certain(active) ? 1e-12 : 0.15);
      CHECK_NEAR(stats.ffn_bytes_fraction, fraction(inputs, active),
                 std::max(by_input, certain(active) ? 1e-12 : 0.05));
      CHECK_NEAR(stats.head_bytes_fraction,
                 (head_high + std::sqrt(inputs) * head) / (head_high + head), by_input);
    }
  CHECK(stats_of(TdaOptions{}).tda == stats_of(of_inputs(0.2)).tda);
  CHECK(stats_of(of_inputs(0.2)).tda ==
        "by input: 20% of inputs and 10% of neurons at 8 bits, the others at 4");
  CHECK(scores(TdaOptions{}, 2) == scores(of_inputs(0.2, 0.1), 2));
  CHECK(scores(of_inputs(1, 1), 2) == scores({}, 2));
  CHECK(scores(of_inputs(0), 2) != scores({}, 2));
  for (const int threads : {1, 3}) {
    CHECK(scores({}, threads) == scores({}, 2));
    CHECK(scores(of_inputs(0.3), threads) == scores(of_inputs(0.3), 2));
  }
}

int main() { return run_tests(); }
