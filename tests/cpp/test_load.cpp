// A checkpoint's tensors, packed into engine layout.
#include <tda/error.h>
#include <tda/types.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "base/half.h"
#include "check.h"
#include "checkpoint/checkpoint.h"
#include "fixtures.h"
#include "weights/model.h"

namespace {

using namespace fixtures;
using tda::CheckpointError;
using tda::WeightFormat;

Values row_values(const tda::Matrix& matrix, std::int64_t row) {
  Values result(matrix.cols);
  if (matrix.format == WeightFormat::f32) {
    std::memcpy(result.data(), matrix.row(row), matrix.row_bytes());
  } else {
    const auto* bits = reinterpret_cast<const std::uint16_t*>(matrix.row(row));
    for (std::int64_t i = 0; i < matrix.cols; ++i) result[i] = tda::bf16_to_f32(bits[i]);
  }
  return result;
}

bool holds(const tda::Matrix& matrix, const std::vector<Tensor>& parts) {
  Values all, found;
  for (const Tensor& part : parts) all.insert(all.end(), part.values.begin(), part.values.end());
  for (std::int64_t r = 0; r < matrix.rows; ++r) {
    const Values row = row_values(matrix, r);
    found.insert(found.end(), row.begin(), row.end());
  }
  return found == all && reinterpret_cast<std::uintptr_t>(matrix.data) % 64 == 0;
}

bool holds(std::span<const float> vector, const std::vector<Tensor>& parts) {
  Values all;
  for (const Tensor& part : parts) all.insert(all.end(), part.values.begin(), part.values.end());
  return Values(vector.begin(), vector.end()) == all;
}

TEST(f16_agrees_with_its_definition) {
  int wrong = 0;
  for (int bits = 0; bits < 0x10000; ++bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double sign = bits >> 15 ? -1 : 1;
    const double expected = exponent == 31  ? (mantissa ? NAN : INFINITY)
                            : exponent == 0 ? std::ldexp(mantissa, -24)
                                            : std::ldexp(1024 + mantissa, exponent - 25);
    const float found = tda::f16_to_f32(static_cast<std::uint16_t>(bits));
    wrong += std::isnan(expected) ? !std::isnan(found)
                                  : found != sign * expected || std::signbit(found) != (sign < 0);
  }
  CHECK(wrong == 0);
}

TEST(bf16_rounds_to_nearest_even) {
  const auto rounded = [](std::uint32_t bits) {
    return tda::f32_to_bf16(std::bit_cast<float>(bits));
  };
  CHECK(rounded(0x3f808000) == 0x3f80);  // a tie, down to even
  CHECK(rounded(0x3f818000) == 0x3f82);  // a tie, up to even
  CHECK(rounded(0x3f807fff) == 0x3f80);
  CHECK(rounded(0xbf808001) == 0xbf81);
  CHECK(rounded(0x00018000) == 0x0002);  // subnormal
  CHECK(rounded(0x7f7fffff) == 0x7f80);  // beyond the largest
  CHECK(rounded(0xff800000) == 0xff80);
  CHECK(std::isnan(tda::bf16_to_f32(rounded(0x7f800001))));
  CHECK(std::isnan(tda::bf16_to_f32(rounded(0xffffffff))));
}

TEST(names_are_parsed_back) {
  for (auto device : {tda::Device::automatic, tda::Device::cpu, tda::Device::cuda})
    CHECK(tda::parse_device(tda::name_of(device)) == device);
  for (auto format : {WeightFormat::automatic, WeightFormat::f32, WeightFormat::bf16})
    CHECK(tda::parse_weight_format(tda::name_of(format)) == format);
  CHECK(tda::parse_kv_format("auto") == tda::KvFormat::automatic);
  CHECK(tda::parse_kv_format("bf16") == tda::KvFormat::bf16);
  CHECK_THROWS(tda::parse_device("gpu"), tda::OptionError,
               "device is \"gpu\", expected auto, cpu or cuda");
  CHECK_THROWS(tda::parse_weight_format("int3"), tda::OptionError,
               "auto, f32, bf16, int8, bf16c, int4 or graded");
}

void check_layer(const tda::LayerWeights& layer, const Tensors& tensors,
                 const std::string& prefix) {
  const auto get = [&](const std::string& name) { return tensors.at(prefix + name); };
  const std::string a = "self_attn.";
  CHECK(holds(layer.attention_norm, {get("input_layernorm.weight")}));
  CHECK(holds(layer.ffn_norm, {get("post_attention_layernorm.weight")}));
  CHECK(holds(layer.qkv,
              {get(a + "q_proj.weight"), get(a + "k_proj.weight"), get(a + "v_proj.weight")}));
  CHECK(holds(layer.output, {get(a + "o_proj.weight")}));
  CHECK(holds(layer.gate, {get("mlp.gate_proj.weight")}));
  CHECK(holds(layer.up, {get("mlp.up_proj.weight")}));

  const Tensor source = get("mlp.down_proj.weight");
  const std::int64_t hidden = source.shape[0], neurons = source.shape[1];
  CHECK(layer.down.rows == neurons && layer.down.cols == hidden);
  CHECK(layer.down_lengths.size() == static_cast<std::size_t>(neurons));
  Tensor down{{neurons, hidden}, {}};
  for (std::int64_t j = 0; j < neurons; ++j) {
    double squares = 0;
    for (std::int64_t i = 0; i < hidden; ++i) {
      down.values.push_back(source.values[i * neurons + j]);
      squares += static_cast<double>(down.values.back()) * down.values.back();
    }
    CHECK_NEAR(layer.down_lengths[j], std::sqrt(squares), 1e-5);
  }
  CHECK(holds(layer.down, {down}));
}

TEST(load_packs_every_dtype_into_every_format) {
  const Tensors tensors = tensors_of(tiny);
  for (const char* dtype : {"F32", "F16", "BF16"}) {
    Folder folder;
    write_model(folder, tiny, tensors, dtype);
    const tda::Checkpoint checkpoint(folder.path);
    const auto natural = tda::load_model(checkpoint, WeightFormat::automatic, 0);
    CHECK(natural->format ==
          (std::string(dtype) == "F32" ? WeightFormat::f32 : WeightFormat::bf16));
    for (const auto format : {WeightFormat::f32, WeightFormat::bf16}) {
      for (const int threads : {1, 3}) {
        const auto model = tda::load_model(checkpoint, format, threads);
        CHECK(model->format == format && model->layers.size() == 2);
        CHECK(holds(model->embedding, {tensors.at("model.embed_tokens.weight")}));
        CHECK(holds(model->head, {tensors.at("lm_head.weight")}));
        CHECK(holds(model->final_norm, {tensors.at("model.norm.weight")}));
        for (int i = 0; i < 2; ++i)
          check_layer(model->layers[i], tensors, "model.layers." + std::to_string(i) + ".");
        CHECK(model->layers[0].qkv_bias.empty() && model->layers[0].q_norm.empty());
        CHECK(model->name == folder.path.filename().string());
        CHECK(model->fingerprint == checkpoint.fingerprint());
      }
    }
  }
}

TEST(load_takes_what_the_family_adds) {
  const auto load = [](const json& config, const Tensors& tensors) {
    Folder folder;
    write_model(folder, config, tensors, "F32");
    return tda::load_model(tda::Checkpoint(folder.path), WeightFormat::bf16, 2);
  };
  const std::string a = "model.layers.1.self_attn.";

  const json biased = updated(tiny, {{"attention_bias", true}, {"tie_word_embeddings", true}});
  Tensors tensors = tensors_of(biased);
  tensors.emplace("model.layers.0.self_attn.rotary_emb.inv_freq", pattern({6}));
  auto model = load(biased, tensors);
  CHECK(holds(model->layers[1].qkv_bias,
              {tensors.at(a + "q_proj.bias"), tensors.at(a + "k_proj.bias"),
               tensors.at(a + "v_proj.bias")}));
  CHECK(holds(model->layers[1].output_bias, {tensors.at(a + "o_proj.bias")}));
  CHECK(model->head.data == model->embedding.data);

  json config =
      updated(tiny, {{"model_type", "qwen3"}, {"architectures", nullptr}, {"head_dim", 12}});
  tensors = tensors_of(config);
  model = load(config, tensors);
  CHECK(holds(model->layers[1].q_norm, {tensors.at(a + "q_norm.weight")}));
  CHECK(holds(model->layers[1].k_norm, {tensors.at(a + "k_norm.weight")}));

  config["model_type"] = "qwen2";
  tensors = tensors_of(config);
  model = load(config, tensors);
  CHECK(!model->layers[0].qkv_bias.empty() && model->layers[0].output_bias.empty());
}

TEST(load_takes_a_head_of_its_own_whatever_the_configuration_says) {
  const json tied = updated(tiny, {{"tie_word_embeddings", true}});
  Tensors tensors = tensors_of(tiny);
  Folder folder;
  write_model(folder, tied, tensors, "BF16");
  auto model = tda::load_model(tda::Checkpoint(folder.path), WeightFormat::bf16, 1);
  CHECK(!model->config.tied_embeddings && holds(model->head, {tensors.at("lm_head.weight")}));
  tensors.at("lm_head.weight") = tensors.at("model.embed_tokens.weight");
  write_model(folder, tied, tensors, "BF16");
  model = tda::load_model(tda::Checkpoint(folder.path), WeightFormat::bf16, 1);
  CHECK(model->config.tied_embeddings && model->head.data == model->embedding.data);
}

TEST(load_refuses_tensors_that_it_would_leave_out) {
  for (const char* name :
       {"model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.o_proj.bias",
        "model.layers.0.mlp.gate_proj.bias", "model.layers.0.input_layernorm.bias",
        "model.layers.0.self_attn.q_norm.weight", "model.norm.bias", "lm_head.bias",
        "model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.9.input_layernorm.weight",
        "v_head.summary.weight"}) {
    Tensors tensors = tensors_of(tiny);
    tensors.emplace(name, pattern({6}));
    Folder folder;
    write_model(folder, tiny, tensors, "F32");
    CHECK_THROWS(tda::load_model(tda::Checkpoint(folder.path), WeightFormat::bf16, 1),
                 CheckpointError, "tensor \"" + std::string(name) + "\" is none that config.json");
  }
}

TEST(load_measures_down_rows_as_stored) {
  Tensors tensors = tensors_of(tiny);
  Tensor& down = tensors.at("model.layers.0.mlp.down_proj.weight");
  for (float& value : down.values) value = 0;
  down.values[69] = 1.005859375f;  // rounds to 1.0078125 in bf16
  Folder folder;
  write_model(folder, tiny, tensors, "F32");
  const tda::Checkpoint checkpoint(folder.path);
  const auto model = tda::load_model(checkpoint, WeightFormat::bf16, 1);
  CHECK(row_values(model->layers[0].down, 69)[0] == 1.0078125f);
  CHECK(model->layers[0].down_lengths[69] == 1.0078125f);
  CHECK(model->layers[0].down_lengths[68] == 0);
  CHECK(tda::load_model(checkpoint, WeightFormat::f32, 1)->layers[0].down_lengths[69] ==
        1.005859375f);
}

TEST(load_stores_outliers_of_down_rows_exactly) {
  Tensors tensors = tensors_of(tiny);
  Tensor& down = tensors.at("model.layers.1.mlp.down_proj.weight");  // [hidden, neurons]
  const std::int64_t neurons = down.shape[1];
  const auto value = [&](std::int64_t neuron, std::int64_t column) -> float& {
    return down.values[column * neurons + neuron];
  };
  for (float& v : down.values) v = 0.01f;
  value(2, 3) = -0.9f;
  value(4, 3) = 0.079f;  // less than 8 times the others
  value(6, 1) = 0.9f, value(6, 3) = 0.2f;
  for (std::int64_t c = 0; c < down.shape[0]; ++c) value(7, c) = 0;
  value(7, 1) = 0.9f;  // the rest of its group is 0 and needs no codes
  Folder folder;
  write_model(folder, tiny, tensors, "F32");
  const tda::Checkpoint checkpoint(folder.path);
  {
    const auto model = tda::load_model(checkpoint, WeightFormat::int8, 2);
    CHECK(model->layers[0].outlier_neurons.empty());
    CHECK(model->layers[1].outlier_neurons == std::vector<std::int32_t>{2});
    std::vector<float> row(down.shape[0]);
    tda::read_row(model->layers[1].down, 2, 0, std::ssize(row), row.data());
    CHECK(row[3] == -0.9f);
    CHECK(std::abs(row[0] - 0.01f) < 0.001f);  // a scale for 0.9 would round it to 0
    const float length = std::sqrt(0.81f + 0.0001f * static_cast<float>(down.shape[0] - 1));
    CHECK(std::abs(model->layers[1].down_lengths[2] - length) < 1e-3f);
  }
  for (const WeightFormat format : {WeightFormat::f32, WeightFormat::bf16})
    CHECK(tda::load_model(checkpoint, format, 2)->layers[1].outlier_neurons.empty());

  value(2, 3) = std::numeric_limits<float>::infinity();
  write_model(folder, tiny, tensors, "F32");
  CHECK_THROWS(tda::load_model(tda::Checkpoint(folder.path), WeightFormat::int8, 1),
               CheckpointError, "holds NaN or infinity");
}

TEST(load_refuses_wrong_tensors) {
  const Tensors tensors = tensors_of(tiny);
  const auto load = [](const Tensors& t, const std::string& dtype = "F32", int threads = 3) {
    Folder folder;
    write_model(folder, tiny, t, dtype);
    return tda::load_model(tda::Checkpoint(folder.path), WeightFormat::bf16, threads);
  };
  const std::string gate = "model.layers.1.mlp.gate_proj.weight";
  Tensors changed = tensors;
  changed.erase(gate);
  CHECK_THROWS(load(changed), CheckpointError,
               "gate_proj.weight\" is missing, expected with shape [70, 72]");
  changed = tensors;
  changed.at(gate).shape = {72, 70};
  CHECK_THROWS(load(changed), CheckpointError, "has shape [72, 70], expected [70, 72]");
  CHECK_THROWS(load(tensors, "F32", -1), tda::OptionError, "option threads: -1");

  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  for (const float bad : {nan, -INFINITY, std::numeric_limits<float>::max()}) {
    changed = tensors;
    changed.at("model.layers.1.mlp.down_proj.weight").values.back() = bad;
    CHECK_THROWS(load(changed), CheckpointError,
                 "layers.1.mlp.down_proj.weight\" holds NaN or inf");
    changed.at(gate).values.back() = bad;
    CHECK_THROWS(load(changed), CheckpointError, gate + "\" holds NaN");  // always the first
  }

  Folder folder;
  folder.write("config.json", tiny.dump());
  folder.write("model.safetensors", relabelled(safetensors(tensors, "F16"), "\"F16\"", "\"I16\""));
  CHECK_THROWS(tda::load_model(tda::Checkpoint(folder.path), WeightFormat::f32, 1), CheckpointError,
               "has dtype I16, expected F32, F16 or BF16");
}

TEST(load_compresses_bf16_or_says_where_that_is_not_possible) {
  Tensors tensors = tensors_of(tiny);
  const auto load = [&](WeightFormat format) {
    Folder folder;
    write_model(folder, tiny, tensors, "F32");
    return tda::load_model(tda::Checkpoint(folder.path), format, 2);
  };
  const auto expect_same = [&] {
    const auto plain = load(WeightFormat::bf16), compressed = load(WeightFormat::bf16c);
    const auto same = [](const tda::Matrix& a, const tda::Matrix& b) {
      CHECK(a.rows == b.rows && a.cols == b.cols);
      std::vector<float> x(a.cols), y(a.cols), z(a.cols - 5);
      for (std::int64_t r = 0; r < a.rows; ++r) {
        tda::read_row(a, r, 0, a.cols, x.data());
        tda::read_row(b, r, 0, b.cols, y.data());
        tda::read_row(b, r, 5, b.cols - 5, z.data());
        CHECK(x == y);
        CHECK(std::equal(z.begin(), z.end(), x.begin() + 5));
      }
    };
    same(plain->head, compressed->head);
    for (std::size_t l = 0; l < plain->layers.size(); ++l) {
      const auto &a = plain->layers[l], &b = compressed->layers[l];
      same(a.qkv, b.qkv), same(a.output, b.output);
      same(a.gate, b.gate), same(a.up, b.up), same(a.down, b.down);
    }
  };
  expect_same();
  const auto with_uppers = [&](const std::string& name, int count, std::int64_t step) {
    auto& values = tensors.at(name).values;
    for (int i = 0; i < 72; ++i)
      values[i * step] = std::ldexp(i % 2 ? -1.5f : 1.0f, 60 - 4 * (i % count / 2));
  };
  const std::string gate = "model.layers.1.mlp.gate_proj.weight";
  const std::string down = "model.layers.1.mlp.down_proj.weight";
  with_uppers(gate, 14, 1);
  with_uppers(down, 14, tensors.at(down).shape[1]);
  for (const int i : {7, 20, 71})  // exceptions
    tensors.at(gate).values[i] = tensors.at(down).values[i * tensors.at(down).shape[1]] = 1e-30f;
  expect_same();
  with_uppers(gate, 72, 1);
  CHECK_THROWS(load(WeightFormat::bf16c), CheckpointError,
               gate +
                   "\": row 0 has more than 3 values whose upper byte is not among its 15 most "
                   "frequent ones, the most that bf16c can store; use bf16");
  with_uppers(gate, 14, 1);
  with_uppers(down, 72, tensors.at(down).shape[1]);
  CHECK_THROWS(load(WeightFormat::bf16c), CheckpointError, "\": column 0 has more than 3 values ");
}

/// A config's sizes that the tensors do not have are refused before memory is allocated.
TEST(load_refuses_sizes_beyond_the_files) {
  const Tensors tensors = tensors_of(tiny);
  const std::int64_t most = 1 << 22;
  struct Case {
    json changes;
    const char* message;
  };
  const Case cases[] = {
      {{{"vocab_size", most}},
       "\"model.embed_tokens.weight\" has shape [7, 72], expected [4194304, "},
      {{{"intermediate_size", most}}, "has shape [70, 72], expected [4194304, 72]"},
      {{{"num_hidden_layers", 4096}}, "\"model.layers.2.input_layernorm.weight\" is missing"},
      {{{"head_dim", 699050}}, "q_proj.weight\" has shape [72, 72], expected [4194300, 72]"},
  };
  for (const Case& c : cases) {
    Folder folder;
    write_model(folder, updated(tiny, c.changes), tensors, "F32");
    CHECK_THROWS(tda::load_model(tda::Checkpoint(folder.path), WeightFormat::f32, 2),
                 CheckpointError, c.message);
  }
}

/// The error is thrown in a worker thread, by plain and by transposed copies.
TEST(load_refuses_files_cut_short_meanwhile) {
  const Tensors tensors = tensors_of(tiny);
  for (const int threads : {1, 3}) {
    for (const std::uintmax_t kept :
         {std::uintmax_t{9000}, std::uintmax_t{3000}, std::uintmax_t{0}}) {
      Folder folder;
      write_model(folder, tiny, tensors, "BF16");
      const tda::Checkpoint checkpoint(folder.path);
      fs::resize_file(folder.path / "model.safetensors", kept);
      CHECK_THROWS(tda::load_model(checkpoint, WeightFormat::bf16, threads), CheckpointError,
                   " to " + std::to_string(kept) + " bytes while it was being read");
    }
  }
}

}  // namespace

int main() { return run_tests(); }
