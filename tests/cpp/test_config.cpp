// config.json and generation_config.json -> ModelConfig.
#include <tda/error.h>

#include <cmath>

#include "check.h"
#include "checkpoint/checkpoint.h"
#include "fixtures.h"

namespace {

using namespace fixtures;
using tda::CheckpointError;

tda::ModelConfig config_of(const json& config, const std::string& generation = "") {
  Folder folder;
  folder.write("config.json", config.dump());
  if (!generation.empty()) folder.write("generation_config.json", generation);
  return tda::read_config(folder.path);
}

TEST(config_defaults_are_the_families) {
  const tda::ModelConfig llama = config_of({{"model_type", "llama"}});
  CHECK(llama.vocab_size == 32000 && llama.hidden_size == 4096 && llama.intermediate_size == 11008);
  CHECK(llama.num_layers == 32 && llama.num_kv_heads == 32 && llama.head_dim == 128);
  CHECK(llama.max_position == 2048 && llama.rms_norm_eps == 1e-6 && !llama.tied_embeddings);
  CHECK(llama.bos_token == 1 && llama.eos_tokens == std::vector<tda::Token>{2});
  CHECK(!llama.qkv_bias && !llama.output_bias && !llama.qk_norm && llama.rope.theta == 10000);
  CHECK(llama.sliding_window == std::vector<std::int64_t>(32, 0));

  const tda::ModelConfig mistral = config_of({{"model_type", "mistral"}});
  CHECK(mistral.intermediate_size == 14336 && mistral.num_kv_heads == 8);
  CHECK(mistral.max_position == 131072);
  CHECK(mistral.sliding_window == std::vector<std::int64_t>(32, 4096));

  const tda::ModelConfig qwen2 = config_of({{"model_type", "qwen2"}});
  CHECK(qwen2.vocab_size == 151936 && qwen2.num_kv_heads == 32 && qwen2.qkv_bias);
  CHECK(!qwen2.output_bias && !qwen2.bos_token && qwen2.eos_tokens.empty());

  const tda::ModelConfig qwen3 = config_of({{"model_type", "qwen3"}, {"hidden_size", 64}});
  CHECK(qwen3.head_dim == 128 && qwen3.qk_norm && !qwen3.qkv_bias);
}

TEST(config_knows_what_sets_families_apart) {
  const tda::ModelConfig gemma = config_of({{"model_type", "gemma3_text"}});
  CHECK(gemma.head_dim == 256 && gemma.tied_embeddings && gemma.qk_norm && gemma.post_norms);
  CHECK(gemma.norm_offset == 1 && gemma.embedding_scale == 48 && gemma.attention_scale() == 0.0625);
  CHECK(gemma.activation == tda::Activation::gelu_tanh && gemma.rope.theta == 1e6);
  CHECK(gemma.other_rope && gemma.other_rope->theta == 1e4);
  CHECK(gemma.bos_token == 2 && gemma.eos_tokens == std::vector<tda::Token>{1});
  for (std::size_t i = 0; i < 26; ++i) {
    CHECK(gemma.sliding_window[i] == (i % 6 == 5 ? 0 : 4096));
    CHECK(gemma.uses_other_rope[i] == (i % 6 != 5));
  }
  const tda::ModelConfig gemma2 = config_of({{"model_type", "gemma2"}});
  CHECK(gemma2.vocab_size == 256000 && gemma2.max_position == 8192 && gemma2.post_norms);
  CHECK(gemma2.norm_offset == 1 && gemma2.tied_embeddings && !gemma2.qk_norm && !gemma2.other_rope);
  CHECK(gemma2.score_cap == 50 && gemma2.logit_cap == 30 && gemma2.rope.theta == 1e4);
  CHECK(gemma2.attention_scale() == 0.0625 && gemma.score_cap == 0 && gemma.logit_cap == 0);
  for (std::size_t i = 0; i < 26; ++i) CHECK(gemma2.sliding_window[i] == (i % 2 == 1 ? 0 : 4096));
  const tda::ModelConfig uncapped = config_of({{"model_type", "gemma2"},
                                               {"attn_logit_softcapping", nullptr},
                                               {"final_logit_softcapping", 8}});
  CHECK(uncapped.score_cap == 0 && uncapped.logit_cap == 8);
  const tda::ModelConfig small =
      config_of({{"model_type", "gemma3_text"}, {"hidden_size", 640}, {"num_hidden_layers", 1}});
  CHECK(small.embedding_scale == std::sqrt(640.0f) && small.embedding_scale_bf16 == 25.25f);

  const tda::ModelConfig olmo = config_of({{"model_type", "olmo2"}});
  CHECK(!olmo.pre_norms && olmo.post_norms && olmo.qk_norm_of_all_heads && !olmo.qk_norm);
  CHECK(olmo.rms_norm_eps == 1e-5 && olmo.eos_tokens == std::vector<tda::Token>{50279});

  const tda::ModelConfig granite = config_of({{"model_type", "granite"},
                                              {"embedding_multiplier", 12},
                                              {"residual_multiplier", 0.25},
                                              {"attention_multiplier", 0.125},
                                              {"logits_scaling", 8}});
  CHECK(granite.embedding_scale == 12 && granite.residual_scale == 0.25f);
  CHECK(granite.attention_scale() == 0.125f && granite.logit_scale == 0.125f);

  const tda::ModelConfig smollm3 = config_of({{"model_type", "smollm3"}});
  CHECK(smollm3.rope.theta == 2e6 && smollm3.other_rope && smollm3.other_rope->off);
  for (std::size_t i = 0; i < 36; ++i) CHECK(smollm3.uses_other_rope[i] == (i % 4 == 3));
}

TEST(config_refuses_what_a_family_cannot_run) {
  struct Case {
    const char* type;
    json changes;
    const char* message;
  };
  const json full = {{"full_attention", {{"rope_theta", 1e5}}}};
  const Case cases[] = {
      {"gemma3_text", {{"attn_logit_softcapping", 50}}, "attn_logit_softcapping is 50, expected"},
      {"gemma3_text", {{"final_logit_softcapping", 30}}, "final_logit_softcapping is 30, expected"},
      {"gemma3_text", {{"use_bidirectional_attention", true}}, "use_bidirectional_attention is"},
      {"gemma3_text", {{"query_pre_attn_scalar", 0}}, "query_pre_attn_scalar is 0"},
      {"gemma3_text", {{"sliding_window", nullptr}}, "sliding_window is null"},
      {"gemma3_text", {{"sliding_window_pattern", 0}}, "sliding_window_pattern is 0"},
      {"gemma3_text", {{"hidden_activation", "swiglu"}}, "hidden_activation is \"swiglu\""},
      {"gemma3_text",
       {{"rope_parameters", {{"rope_theta", 1e5}}}},
       "rope_parameters is an object, expected an object with full_attention"},
      {"gemma3_text",
       {{"rope_parameters", full}, {"rope_scaling", {{"type", "linear"}, {"factor", 8}}}},
       "rope_scaling is an object, expected none beside"},
      {"gemma3_text", {{"query_pre_attn_scalar", 1e-300}}, "expected a number from 0.000001"},
      {"granite", {{"residual_multiplier", 0}}, "residual_multiplier is 0"},
      {"granite", {{"logits_scaling", 1e300}}, "expected a number from 0.000001 to 1000000"},
      {"granite", {{"logits_scaling", "8"}}, "logits_scaling is \"8\""},
      {"smollm3", {{"no_rope_layers", {1}}}, "no_rope_layers is an array, expected an array of"},
      {"smollm3", {{"no_rope_layers", {1, 2}}}, "no_rope_layers is an array, expected 0 and 1"},
      {"smollm3", {{"use_sliding_window", true}}, "use_sliding_window is true"},
      {"phi3",
       {{"rope_scaling", {{"type", "linear"}, {"factor", 8}}}},
       "rope_scaling is an object, expected longrope or no"},
      {"phi3", {{"rope_scaling", {{"type", "longrope"}}}}, "rope_scaling.short_factor is missing"},
      {"phi3", {{"rope_scaling", {{"type", "linear"}, {"factor", 2}}}}, "expected longrope or no"},
      {"gemma2", {{"attn_logit_softcapping", 0}}, "attn_logit_softcapping is 0, expected a number"},
      {"gemma2", {{"final_logit_softcapping", "no"}}, "final_logit_softcapping is \"no\""},
      {"gemma2", {{"use_bidirectional_attention", true}}, "use_bidirectional_attention is"},
      {"gemma", json::object(), "model_type is \"gemma\", expected \"llama\""},
      {"mixtral", json::object(), "model_type is \"mixtral\""},
  };
  for (const Case& c : cases) {
    json config = updated(tiny, c.changes);
    config["model_type"] = c.type;
    config.erase("architectures");
    CHECK_THROWS(config_of(config), CheckpointError, c.message);
  }
}

TEST(config_reads_what_is_given) {
  const tda::ModelConfig c = config_of(updated(tiny, {{"head_dim", 8},
                                                      {"attention_bias", true},
                                                      {"hidden_act", "gelu_new"},
                                                      {"tie_word_embeddings", true},
                                                      {"rms_norm_eps", 1e-5},
                                                      {"bos_token_id", nullptr}}));
  CHECK(c.q_size() == 48 && c.kv_size() == 16 && c.qkv_bias && c.output_bias);
  CHECK(c.activation == tda::Activation::gelu_tanh && c.tied_embeddings && !c.bos_token);
  CHECK(c.rms_norm_eps == 1e-5);
  CHECK(config_of(updated(tiny, {{"num_key_value_heads", nullptr}})).num_kv_heads == 6);
}

TEST(config_joins_end_of_text_tokens) {
  using Ids = std::vector<tda::Token>;
  const auto eos = [](const json& changes, const std::string& generation = "") {
    return config_of(updated(tiny, changes), generation).eos_tokens;
  };
  CHECK((eos({{"eos_token_id", {3, 4, 3}}}) == Ids{3, 4}));
  // generation_config.json decides alone, as in generate() of transformers 5.
  CHECK((eos({{"eos_token_id", 3}}, R"({"eos_token_id": [5, 4]})") == Ids{5, 4}));
  CHECK(eos({{"eos_token_id", 3}}, R"({"eos_token_id": null})").empty());
  CHECK((eos(json::object(), R"({"eos_token_id": 5})") == Ids{5}));  // not llama's default, 2
  CHECK(eos({{"eos_token_id", 3}}, R"({"temperature": 1})").empty());
  CHECK((eos({{"eos_token_id", 3}}, R"({"eos_token_id": 5, "length_penalty": NaN})") == Ids{5}));
  CHECK(eos({{"eos_token_id", nullptr}}).empty());
  CHECK_THROWS(eos({{"eos_token_id", 7}}), CheckpointError, "integer from 0 to 6");
  CHECK_THROWS(eos({{"eos_token_id", "</s>"}}), CheckpointError, "eos_token_id is \"</s>\"");
  CHECK_THROWS(eos(json::object(), "{"), CheckpointError, "generation_config.json: expected JSON");
}

TEST(config_reads_both_spellings_of_rope) {
  using Scaling = tda::RopeConfig::Scaling;
  const auto rope = [](const json& changes) { return config_of(updated(tiny, changes)).rope; };
  const json llama3 = {{"rope_type", "llama3"},
                       {"factor", 8},
                       {"low_freq_factor", 1.0},
                       {"high_freq_factor", 4.0},
                       {"original_max_position_embeddings", 32}};
  for (const auto& r : {rope({{"rope_theta", 5e5}, {"rope_scaling", llama3}}),
                        rope({{"rope_parameters", updated(llama3, {{"rope_theta", 5e5}})}})}) {
    CHECK(r.scaling == Scaling::llama3 && r.theta == 5e5 && r.factor == 8);
    CHECK(r.low_freq_factor == 1 && r.high_freq_factor == 4 && r.original_max_position == 32);
  }
  CHECK(rope({{"rope_scaling", llama3}, {"original_max_position_embeddings", 16}})
            .original_max_position == 16);

  const auto linear = rope({{"rope_scaling", {{"type", "linear"}, {"factor", 2.5}}}});
  CHECK(linear.scaling == Scaling::linear && linear.factor == 2.5 && linear.theta == 10000);
  const auto dynamic = rope({{"rope_scaling", {{"type", "dynamic"}, {"factor", 4}}}});
  CHECK(dynamic.scaling == Scaling::dynamic && dynamic.original_max_position == 64);
  CHECK(rope({{"rope_scaling", nullptr}, {"rope_theta", 77}}).theta == 77);
  CHECK(rope({{"rope_parameters", {{"rope_type", "default"}}}}).scaling == Scaling::none);
}

TEST(config_reads_yarn) {
  const auto yarn = [](json changes) {
    changes["rope_type"] = "yarn";
    return config_of(updated(tiny, {{"rope_scaling", changes}})).rope;
  };
  const auto plain = yarn({{"factor", 4.0}, {"original_max_position_embeddings", 32}});
  CHECK(plain.scaling == tda::RopeConfig::Scaling::yarn && plain.factor == 4);
  CHECK(plain.beta_fast == 32 && plain.beta_slow == 1 && plain.truncate);
  CHECK_NEAR(plain.attention_factor, 0.1 * std::log(4.0) + 1, 1e-15);
  CHECK(yarn({{"factor", 4.0}}).original_max_position == 64);
  CHECK(yarn({{"factor", nullptr}, {"original_max_position_embeddings", 16}}).factor == 4);
  CHECK(yarn({{"factor", 4.0}, {"attention_factor", 0.5}}).attention_factor == 0.5);
  const auto scaled = yarn({{"factor", 40}, {"mscale", 0.5}, {"mscale_all_dim", 1.0}});
  CHECK_NEAR(scaled.attention_factor, (0.05 * std::log(40.0) + 1) / (0.1 * std::log(40.0) + 1),
             1e-15);
  CHECK(!yarn({{"factor", 4}, {"truncate", false}}).truncate);
}

TEST(config_reads_longrope) {
  const auto longrope = [](json changes, const char* type = "longrope") {
    const json given = {{"rope_type", type},
                        {"short_factor", {1, 1.5, 2, 2, 2, 2}},
                        {"long_factor", {2, 3, 4, 5, 6, 7.5}},
                        {"original_max_position_embeddings", 16}};
    return config_of(updated(tiny, {{"rope_scaling", updated(given, changes)}})).rope;
  };
  for (const char* const type : {"longrope", "su"}) {
    const auto plain = longrope(json::object(), type);
    CHECK(plain.scaling == tda::RopeConfig::Scaling::longrope && plain.factor == 4);
    CHECK(plain.original_max_position == 16 && plain.short_factor[1] == 1.5f);
    CHECK(plain.long_factor.size() == 6 && plain.long_factor[5] == 7.5f);
    CHECK_NEAR(plain.attention_factor, std::sqrt(1 + std::log(4.0) / std::log(16.0)), 1e-15);
  }
  CHECK(longrope({{"factor", 0.5}}).attention_factor == 1);
  CHECK_NEAR(longrope({{"factor", 8}}).attention_factor, std::sqrt(1.75), 1e-15);
  CHECK(longrope({{"attention_factor", 1.19}}).attention_factor == 1.19);
  const std::pair<json, const char*> wrong[] = {
      {{{"short_factor", nullptr}}, "short_factor is null, expected an array of 6 numbers"},
      {{{"long_factor", {1, 2, 3}}}, "long_factor is an array, expected an array of 6 numbers"},
      {{{"long_factor", {1, 2, 3, 4, 5, "6"}}}, "from 0.001 to 1000000, not \"6\""},
      {{{"short_factor", {0, 2, 3, 4, 5, 6}}}, "from 0.001 to 1000000, not 0"},
      {{{"original_max_position_embeddings", 1}}, "expected 2 or more"},
      {{{"attention_factor", 1e9}}, "attention_factor is 1000000000.0, expected"},
  };
  for (const auto& [changes, message] : wrong)
    CHECK_THROWS(longrope(changes), CheckpointError, message);
}

TEST(config_reads_sliding_windows) {
  using Windows = std::vector<std::int64_t>;
  const auto windows = [](const char* type, const json& changes) {
    json config = updated(tiny, changes);
    config["model_type"] = type;
    config.erase("architectures");
    return config_of(config).sliding_window;
  };
  CHECK((windows("mistral", {{"sliding_window", 5}}) == Windows{5, 5}));
  CHECK((windows("mistral", {{"sliding_window", nullptr}}) == Windows{0, 0}));
  CHECK((windows("qwen2", {{"sliding_window", 5}, {"max_window_layers", 1}}) == Windows{0, 0}));
  const json used = {{"use_sliding_window", true}, {"sliding_window", 5}, {"max_window_layers", 1}};
  CHECK((windows("qwen2", used) == Windows{0, 5}));
  const json types = {"sliding_attention", "full_attention"};
  CHECK((windows("qwen3", updated(used, {{"layer_types", types}})) == Windows{5, 0}));
  CHECK_THROWS(windows("qwen3", {{"layer_types", types}}), CheckpointError, "layer_types");
  CHECK_THROWS(windows("mistral", {{"layer_types", types}}), CheckpointError, "layer_types");
  CHECK_THROWS(windows("llama", {{"layer_types", {"full_attention"}}}), CheckpointError,
               "array of 2 names");
  CHECK_THROWS(windows("mistral", {{"sliding_window", 0}}), CheckpointError, "sliding_window is 0");
}

TEST(config_refuses_what_it_cannot_run) {
  struct Case {
    json changes;
    const char* message;
  };
  const auto scaling = [](const json& rope) { return json{{"rope_scaling", rope}}; };
  const Case cases[] = {
      {{{"model_type", "gpt2"}}, "model_type is \"gpt2\", expected \"llama\""},
      {{{"model_type", nullptr}}, "model_type is null"},
      {{{"architectures", {"LlamaForSequenceClassification"}}}, "expected [\"LlamaForCausalLM\"]"},
      {{{"hidden_size", "72"}}, "hidden_size is \"72\", expected an integer from 1"},
      {{{"hidden_size", 72.0}}, "hidden_size is 72.0"},
      {{{"hidden_size", nullptr}}, "hidden_size is null"},
      {{{"vocab_size", 0}}, "vocab_size is 0"},
      {{{"num_hidden_layers", -1}}, "num_hidden_layers is -1"},
      {{{"intermediate_size", 18446744073709551615u}}, "intermediate_size is 18446744073709551615"},
      {{{"num_attention_heads", 10}}, "hidden_size is 72, expected a multiple"},
      {{{"num_key_value_heads", 4}}, "num_key_value_heads is 4, expected a divisor"},
      {{{"head_dim", 7}}, "head_dim is 7, expected an even number"},
      {{{"head_dim", 4194304}}, "num_attention_heads is 6, expected at most 2^22"},
      {{{"rms_norm_eps", 0}}, "rms_norm_eps is 0, expected a number above 0"},
      {{{"rms_norm_eps", true}}, "rms_norm_eps is true"},
      {{{"hidden_act", "quick_gelu"}}, "hidden_act is \"quick_gelu\", expected silu, gelu"},
      {{{"hidden_act", json::array()}}, "hidden_act is an array"},
      {{{"mlp_bias", true}}, "mlp_bias is true, expected false"},
      {{{"tie_word_embeddings", 1}}, "tie_word_embeddings is 1, expected true or false"},
      {{{"quantization_config", {{"bits", 4}}}}, "quantization_config.quant_method is missing"},
      {{{"partial_rotary_factor", 0.5}}, "partial_rotary_factor is 0.5, expected 1"},
      {{{"rope_theta", 0}}, "rope_theta is 0"},
      {{{"rope_scaling", 3}}, "rope_scaling is 3, expected an object"},
      {{{"rope_parameters", {{"full_attention", {{"rope_theta", 1e4}}}}}},
       "rope_parameters.\"full_attention\" is an object"},
      {scaling({{"type", "ntk"}}),
       "rope_scaling.type is \"ntk\", expected default, linear, dynamic, llama3, yarn or longrope"},
      {scaling({{"type", "linear"}}), "rope_scaling.factor is missing"},
      {scaling({{"type", "linear"}, {"factor", -1}}), "rope_scaling.factor is -1"},
      {scaling({{"type", "linear"}, {"factor", 1e-40}}), "factor is 1e-40, expected a number from"},
      {scaling({{"type", "dynamic"}, {"factor", 1e300}}), "factor is 1e+300, expected a number"},
      {scaling({{"rope_type", "llama3"}, {"factor", 8}}), "low_freq_factor is missing"},
      {scaling({{"rope_type", "llama3"},
                {"factor", 8},
                {"low_freq_factor", 4},
                {"high_freq_factor", 4}}),
       "high_freq_factor is 4, expected more than"},
      {scaling({{"rope_type", "yarn"}, {"factor", 4}, {"beta_fast", 0.5}}), "at least beta_slow"},
      {scaling({{"rope_type", "yarn"}, {"factor", 4}, {"mscale", -9}, {"mscale_all_dim", 1}}),
       "positive attention factor"},
  };
  for (const Case& c : cases)
    CHECK_THROWS(config_of(updated(tiny, c.changes)), CheckpointError, c.message);

  Folder folder;
  CHECK_THROWS(tda::read_config(folder.path), CheckpointError, "config.json: No such file");
  folder.write("config.json", "{\"model_type\": \"llama\", }");
  CHECK_THROWS(tda::read_config(folder.path), CheckpointError, "config.json: expected JSON");
}

}  // namespace

int main() { return run_tests(); }
