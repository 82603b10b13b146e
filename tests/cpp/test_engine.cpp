// Sampler, sessions and the generate loop over a tiny checkpoint.
#include <sys/resource.h>
#include <tda/engine.h>
#include <unistd.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <map>
#include <thread>

#include "check.h"
#include "engine/sampler.h"
#include "fixtures.h"
#include "tiny_checkpoint.h"

using fixtures::json;
using tda::GenerateOptions;
using tda::Token;

namespace {

const std::vector<float> kLogits = {1.0f, 3.0f, 2.0f, 3.0f, -1.0f, 0.5f};
const std::vector<Token> kPrompt = {1, 5, 9, 13, 17, 21, 4, 8, 15, 16, 23, 42};

/// Shares of 20,000 draws.
std::map<Token, double> frequencies(GenerateOptions options) {
  options.seed = 7;
  tda::Sampler sampler(options, {});
  std::map<Token, double> shares;
  for (int i = 0; i < 20000; ++i) shares[sampler.sample(kLogits)] += 1.0 / 20000;
  return shares;
}

double softmax(Token token, double temperature, std::vector<Token> among) {
  double sum = 0;
  for (const Token t : among) sum += std::exp(kLogits[t] / temperature);
  return std::exp(kLogits[token] / temperature) / sum;
}

void check_distribution(const GenerateOptions& options, const std::vector<Token>& among) {
  const auto shares = frequencies(options);
  CHECK(shares.size() == among.size());
  for (const Token token : among) {
    CHECK(shares.contains(token));
    if (shares.contains(token)) {
      CHECK_NEAR(shares.at(token), softmax(token, options.temperature, among), 0.015);
    }
  }
}

std::vector<Token> generate(const tda::Engine& engine, const GenerateOptions& options,
                            const std::optional<tda::TdaOptions>& tda = {}) {
  return engine.generate(kPrompt, options, tda).tokens;
}

GenerateOptions tokens(std::int64_t count) {
  GenerateOptions options;
  options.max_new_tokens = count;
  options.ignore_eos = true;
  return options;
}

tda::TdaOptions with_error(double error) {
  tda::TdaOptions options;
  options.error = error;
  return options;
}

tda::TdaOptions with_active(double active) {
  tda::TdaOptions options;
  options.active = active;
  return options;
}

}  // namespace

TEST(greedy_takes_the_lowest_of_equal_ids) {
  CHECK(tda::Sampler({}, {}).sample(kLogits) == 1);
  CHECK(tda::argmax(kLogits) == 1);
}

TEST(argmax_is_the_first_of_the_largest) {
  std::mt19937 random(7);
  for (int run = 0; run < 400; ++run) {
    std::vector<float> logits(std::uniform_int_distribution<std::size_t>(1, 2500)(random));
    // Few values, so that the largest one is there often, and all of them below zero in some runs.
    std::uniform_int_distribution<int> level(-40, run % 2 == 0 ? -1 : 40);
    for (float& logit : logits) logit = static_cast<float>(level(random));
    const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
    CHECK(tda::argmax(logits) == static_cast<tda::Token>(best));
    std::swap(logits.front(), logits[static_cast<std::size_t>(best)]);
    CHECK(tda::argmax(logits) == 0);
    const std::size_t where =
        std::uniform_int_distribution<std::size_t>(0, logits.size() - 1)(random);
    for (const float bad : {std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
      logits[where] = bad;
      CHECK_THROWS(tda::argmax(logits), tda::Error, "not finite");
      CHECK_THROWS(tda::check_finite(logits), tda::Error, "not finite");
    }
  }
}

TEST(sampling_follows_the_softmax) {
  check_distribution({.temperature = 1.0}, {0, 1, 2, 3, 4, 5});
  check_distribution({.temperature = 2.5}, {0, 1, 2, 3, 4, 5});
  check_distribution({.temperature = 1.0, .top_k = 3}, {1, 2, 3});
  check_distribution({.temperature = 1.0, .top_k = 1}, {1});
}

TEST(top_p_keeps_the_fewest_that_reach_it) {
  // At temperature 1 the tokens 1 and 3 have 0.39 each, 2 has 0.14.
  check_distribution({.temperature = 1.0, .top_p = 0.3}, {1});
  check_distribution({.temperature = 1.0, .top_p = 0.7}, {1, 3});
  check_distribution({.temperature = 1.0, .top_p = 0.85}, {1, 2, 3});
}

TEST(min_p_is_relative_to_the_best) {
  check_distribution({.temperature = 1.0, .min_p = 0.3}, {1, 2, 3});
  check_distribution({.temperature = 1.0, .min_p = 1.0}, {1, 3});
}

TEST(a_seed_keeps_its_tokens) {
  std::vector<float> logits(1000);
  std::uint32_t state = 1;
  for (float& logit : logits) {
    state = state * 1664525 + 1013904223;
    logit = static_cast<float>(state >> 8) * 0x1p-24f * 12 - 6;
  }
  const auto check = [&](GenerateOptions options, const std::vector<Token>& expected) {
    options.seed = 42;
    tda::Sampler sampler(options, std::vector<Token>{1, 2, 3});
    for (const Token token : expected) CHECK(sampler.sample(logits) == token);
  };
  check({.temperature = 1}, {753, 616, 751, 122, 914, 78, 556, 401});
  check({.temperature = 0.3}, {743, 639, 743, 116, 898, 68, 533, 413});
  check({.temperature = 2, .top_k = 40}, {644, 180, 644, 445, 284, 759, 753, 743});
  check({.temperature = 1, .top_p = 0.9}, {832, 526, 832, 592, 912, 37, 489, 284});
  check({.temperature = 1.5, .min_p = 0.05}, {940, 557, 192, 532, 596, 358, 367, 370});
  check({.temperature = 1.1, .repetition_penalty = 1.5}, {753, 614, 743, 122, 914, 78, 533, 395});
}

TEST(picking_goes_by_the_running_sum) {
  const std::vector<double> weights = {1, 0, 3, 0};
  CHECK(tda::pick(weights, 0) == 0);
  CHECK(tda::pick(weights, 0.2499) == 0);
  CHECK(tda::pick(weights, 0.25) == 2);  // what has no weight is never picked
  CHECK(tda::pick(weights, 1 - 0x1p-53) == 2);
  CHECK(tda::pick(std::vector<double>{0.0, 1.0}, 0) == 1);
}

TEST(only_what_needs_all_logits_asks_for_them) {
  const auto draws = [](GenerateOptions options) { return tda::Sampler(options, {}).only_draws(); };
  CHECK(draws({}));
  CHECK(draws({.temperature = 0.7}));
  CHECK(draws({.temperature = 0, .top_k = 5, .top_p = 0.5, .min_p = 0.5}));  // greedy all the same
  CHECK(!draws({.temperature = 0.7, .top_k = 5}));
  CHECK(!draws({.temperature = 0.7, .top_p = 0.5}));
  CHECK(!draws({.temperature = 0.7, .min_p = 0.5}));
  CHECK(!draws({.repetition_penalty = 1.1}));
  CHECK(!draws({.presence_penalty = 0.1}));
  CHECK(!draws({.frequency_penalty = -0.1}));
  CHECK(!draws({.logit_bias = {{3, 1.0}}}));
  CHECK(draws({.logprobs = 5}));
}

TEST(repetition_penalty_counts_the_prompt_and_the_output) {
  const std::vector<Token> prompt = {1, 1};
  tda::Sampler sampler({.repetition_penalty = 2.0}, prompt);
  CHECK(sampler.sample(kLogits) == 3);  // 1 is now at 1.5
  CHECK(sampler.sample(kLogits) == 2);  // and so is 3
  CHECK(sampler.sample(kLogits) == 1);
  // A negative logit is made smaller too.
  const std::vector<float> negative = {-1.0f, -1.5f};
  tda::Sampler other({.repetition_penalty = 2.0}, std::vector<Token>{0});
  CHECK(other.sample(negative) == 1);
}

TEST(presence_and_frequency_penalty_count_the_output_alone) {
  const std::vector<Token> prompt = {1, 1, 1};
  tda::Sampler presence({.presence_penalty = 1.5}, prompt);
  for (const Token expected : {1, 3, 2, 1, 1}) CHECK(presence.sample(kLogits) == expected);
  tda::Sampler frequency({.frequency_penalty = 0.75}, prompt);
  // 1 and 3 start at 3 and lose 0.75 each time, 2 stays at 2 until it comes.
  for (const Token expected : {1, 3, 1, 3, 2, 1, 3}) CHECK(frequency.sample(kLogits) == expected);
}

TEST(bias_is_added_and_forbids) {
  CHECK(tda::Sampler({.logit_bias = {{5, 2.6}}}, {}).sample(kLogits) == 5);
  CHECK(tda::Sampler({.logit_bias = {{1, -100.0}}}, {}).sample(kLogits) == 3);
  GenerateOptions options{.temperature = 1e6, .logit_bias = {{0, -100.0}, {2, -100.0}}};
  const auto shares = frequencies(options);
  CHECK(shares.size() == 4 && !shares.contains(0) && !shares.contains(2));
  for (Token token = 0; token < 6; ++token) options.logit_bias[token] = -100;
  tda::Sampler none(options, {});
  CHECK_THROWS(none.sample(kLogits), tda::OptionError, "no token");
}

TEST(a_mask_allows_what_its_bits_say) {
  const std::vector<std::uint32_t> mask = {0b10101};
  tda::Sampler greedy({}, {});
  CHECK(greedy.sample(kLogits, mask) == 2);
  CHECK(greedy.sample(kLogits) == 1);  // the next step has one of its own
  tda::Sampler hot({.temperature = 50.0, .seed = 1}, {});
  std::map<Token, int> counts;
  for (int i = 0; i < 300; ++i) ++counts[hot.sample(kLogits, mask)];
  CHECK(counts.size() == 3 && counts.contains(0) && counts.contains(2) && counts.contains(4));
  CHECK_THROWS(greedy.sample(kLogits, std::vector<std::uint32_t>{0}), tda::OptionError, "no token");
  const std::vector<float> many(40, 1.0f);
  CHECK_THROWS(greedy.sample(many, mask), tda::OptionError, "1 words of 32 bits, expected 2");
  const std::vector<std::uint32_t> last = {0, 0x80};
  CHECK(greedy.sample(many, last) == 39);
}

TEST(a_mask_that_allows_all_changes_nothing) {
  const std::vector<std::uint32_t> all = {~0u};
  for (const double temperature : {0.0, 0.7}) {
    const GenerateOptions options{.temperature = temperature, .seed = 5};
    tda::Sampler plain(options, {}), masked(options, {});
    for (int i = 0; i < 200; ++i) CHECK(plain.sample(kLogits) == masked.sample(kLogits, all));
  }
}

TEST(the_likeliest_come_with_their_log_probabilities) {
  const tda::Logprobs found = tda::logprobs_of(kLogits, 4, 3);
  CHECK(found.chosen.token == 4 && found.chosen.logprob == tda::log_probability(kLogits, 4));
  CHECK(found.top.size() == 3);
  for (const std::size_t i : {0, 1, 2}) {
    CHECK(found.top[i].token == (std::vector<Token>{1, 3, 2})[i]);
    CHECK(found.top[i].logprob == tda::log_probability(kLogits, found.top[i].token));
  }
  CHECK(tda::logprobs_of(kLogits, 0, 0).top.empty());
  CHECK(tda::logprobs_of(kLogits, 0, 100).top.size() == kLogits.size());
}

TEST(logits_that_are_not_finite_are_an_error) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  tda::Sampler sampler({}, {});
  CHECK_THROWS(sampler.sample(std::vector<float>{nan, nan}), tda::Error, "not finite");
  CHECK_THROWS(sampler.sample(std::vector<float>{0, inf}), tda::Error, "not finite");
  CHECK_THROWS(sampler.sample(std::vector<float>{0, -inf}), tda::Error, "not finite");
  CHECK_THROWS(sampler.sample(std::vector<float>{0, nan, 1}), tda::Error, "not finite");
}

TEST(log_probability_is_normalised) {
  double sum = 0;
  for (Token t = 0; t < 6; ++t) sum += std::exp(tda::log_probability(kLogits, t));
  CHECK_NEAR(sum, 1.0, 1e-6);
}

TEST(options_are_checked) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const auto rejects = [](GenerateOptions options, const char* name) {
    CHECK_THROWS(options.validate(), tda::OptionError, name);
  };
  rejects({.max_new_tokens = 0}, "max_new_tokens");
  rejects({.temperature = -1}, "temperature");
  rejects({.temperature = nan}, "temperature");
  rejects({.temperature = std::numeric_limits<double>::infinity()}, "temperature");
  rejects({.top_k = -1}, "top_k");
  rejects({.presence_penalty = 2.1}, "presence_penalty");
  rejects({.frequency_penalty = nan}, "frequency_penalty");
  rejects({.logit_bias = {{1, 101.0}}}, "logit_bias[1]");
  rejects({.logit_bias = {{1, nan}}}, "logit_bias[1]");
  rejects({.logprobs = 101}, "logprobs");
  rejects({.logprobs = -1}, "logprobs");
  rejects({.top_p = 0}, "top_p");
  rejects({.top_p = 1.5}, "top_p");
  rejects({.top_p = nan}, "top_p");
  rejects({.min_p = -0.1}, "min_p");
  rejects({.min_p = nan}, "min_p");
  rejects({.repetition_penalty = 0}, "repetition_penalty");
  rejects({.repetition_penalty = nan}, "repetition_penalty");
}

TEST(generation_equals_the_argmax_of_growing_prompts) {
  const TinyCheckpoint checkpoint;
  const tda::Engine engine(checkpoint.folder());
  const auto result = engine.generate(kPrompt, tokens(20));
  CHECK(result.tokens.size() == 20);
  CHECK(result.finish_reason == tda::FinishReason::length);
  std::vector<Token> text = kPrompt;
  for (const Token token : result.tokens) {
    const auto logits = engine.logits(text);
    const std::size_t vocab = TinyCheckpoint::kVocab;
    CHECK(tda::argmax(std::span(logits).last(vocab)) == token);
    text.push_back(token);
  }
}

TEST(seeds_reproduce) {
  const TinyCheckpoint checkpoint;
  const tda::Engine engine(checkpoint.folder());
  auto options = tokens(30);
  options.temperature = 1.5;
  options.seed = 3;
  const auto first = generate(engine, options);
  CHECK(first == generate(engine, options));
  options.seed = 4;
  CHECK(first != generate(engine, options));
}

TEST(an_end_of_text_token_stops_and_is_not_returned) {
  const TinyCheckpoint checkpoint;
  const tda::Engine engine(checkpoint.folder());
  GenerateOptions options;
  options.temperature = 3.0;  // hot enough to meet token 2 soon
  options.max_new_tokens = 200;
  options.seed = 1;
  const auto result = engine.generate(kPrompt, options);
  CHECK(result.finish_reason == tda::FinishReason::stop);
  CHECK(result.tokens.size() < 200);
  CHECK(std::ranges::count(result.tokens, 2) == 0);
}

TEST(error_zero_and_all_active_equal_dense) {
  const TinyCheckpoint checkpoint;
  const tda::Engine engine(checkpoint.folder());
  const auto dense = engine.score(kPrompt, 4).log_probabilities;
  CHECK(engine.score(kPrompt, 4, with_error(0)).log_probabilities == dense);
  CHECK(engine.score(kPrompt, 4, with_active(1)).log_probabilities == dense);
  CHECK(engine.score(kPrompt, 4, with_active(0.5)).log_probabilities != dense);
}

TEST(continuations_of_one_prompt_are_scored_as_if_alone) {
  const TinyCheckpoint checkpoint;
  const tda::Engine engine(checkpoint.folder());
  const std::vector<std::vector<tda::Token>> continuations = {{5, 6, 7, 8, 9}, {9}, {4, 4, 30}};
  tda::TdaOptions refreshed = with_active(0.5);
  refreshed.refresh = 2;
  for (const auto& tda : {std::optional<tda::TdaOptions>(), std::optional(with_active(0.5)),
                          std::optional(refreshed)}) {
    const auto found = engine.score_each(kPrompt, continuations, tda);
    CHECK(found.size() == 3);
    for (std::size_t i = 0; i < found.size(); ++i) {
      std::vector<tda::Token> whole(kPrompt.begin(), kPrompt.end());
      whole.insert(whole.end(), continuations[i].begin(), continuations[i].end());
      const auto alone = engine.score(whole, std::ssize(kPrompt), tda);
      CHECK(found[i].log_probabilities == alone.log_probabilities);
      CHECK(found[i].top_tokens == alone.top_tokens);
      CHECK(found[i].stats.ffn_bytes == alone.stats.ffn_bytes);
      CHECK(found[i].stats.bytes_per_token == alone.stats.bytes_per_token);
    }
  }
  CHECK_THROWS(engine.score_each(kPrompt, std::vector<std::vector<tda::Token>>{{5}, {}}),
               tda::OptionError, "continuations[1]: tokens: found none");
}

TEST(bytes_are_those_of_the_mask) {
  const TinyCheckpoint checkpoint;
  const tda::Engine engine(checkpoint.folder());
  const auto stats = engine.generate(kPrompt, tokens(41), with_active(0.4)).stats;
  const std::int64_t neuron = 3 * TinyCheckpoint::kHidden * sizeof(float);
  CHECK(stats.ffn_bytes == 40 * TinyCheckpoint::kLayers * 20 * neuron);
  CHECK_NEAR(stats.ffn_bytes_fraction, 0.4, 1e-12);
  CHECK_NEAR(stats.ffn_active, 0.4, 1e-12);
  CHECK(stats.prompt_tokens == 12);
  CHECK(stats.new_tokens == 41);
}

TEST(refresh_makes_the_cache_exact_and_renews_the_masks) {
  const TinyCheckpoint checkpoint;
  const tda::Engine engine(checkpoint.folder());
  // After a refresh of all decoded tokens the cache holds what a dense prefill would have put
  // there.
  tda::Session session = engine.session(40);
  session.prefill(std::span(kPrompt).first(6));
  auto options = with_active(0.3);
  options.refresh = 3;
  session.apply(options);
  const auto before = session.mask(0);
  for (int i = 6; i < 9; ++i) session.decode(kPrompt[i]);
  const auto logits = session.decode(kPrompt[9]);  // refreshes first
  tda::Session dense = engine.session(40);
  dense.prefill(std::span(kPrompt).first(9));
  for (std::int64_t layer = 0; layer < TinyCheckpoint::kLayers; ++layer) {
    dense.set_mask(layer, session.mask(layer));
  }
  const auto expected = dense.decode(kPrompt[9]);
  for (std::size_t i = 0; i < logits.size(); ++i) CHECK_NEAR(logits[i], expected[i], 1e-4);
  CHECK(session.mask(0) != before);
}

TEST(a_generation_draws_as_its_sampler_does) {
  const TinyCheckpoint checkpoint;
  const tda::Engine engine(checkpoint.folder());
  GenerateOptions options = tokens(20);
  options.seed = 3;
  for (const double temperature : {0.0, 2.0})
    for (const std::int64_t top_k : {0, 9}) {
      options.temperature = temperature;
      options.top_k = top_k;
      tda::Sampler sampler(options, kPrompt);
      tda::Session session = engine.session(40);
      std::vector<Token> expected = {sampler.sample(session.prefill(kPrompt))};
      while (expected.size() < 20)
        expected.push_back(sampler.sample(session.decode(expected.back())));
      CHECK(generate(engine, options) == expected);
    }
}

TEST(sessions_check_their_input) {
  const TinyCheckpoint checkpoint;
  const tda::Engine engine(checkpoint.folder());
  tda::Session session = engine.session(8);
  CHECK_THROWS(session.statistic(0), tda::OptionError, "no statistic");
  CHECK_THROWS(session.prefill(kPrompt), tda::ContextOverflow, "capacity");
  CHECK_THROWS(session.prefill({}), tda::OptionError, "none");
  CHECK_THROWS(session.decode(61), tda::OptionError, "61");
  CHECK_THROWS(session.decode(-1), tda::OptionError, "-1");
  CHECK_THROWS(session.mask(2), tda::OptionError, "layer 2");
  session.prefill(std::span(kPrompt).first(4));
  CHECK_THROWS(session.apply(with_error(0.1)), tda::OptionError, "sample_tokens");
  const std::vector<std::int32_t> unsorted = {3, 2};
  CHECK_THROWS(session.set_mask(0, unsorted), tda::OptionError, "ascending");
  CHECK_THROWS(engine.session(0), tda::OptionError, "capacity");
  CHECK_THROWS(engine.session(1000), tda::ContextOverflow, "256");
  CHECK_THROWS(engine.generate(kPrompt, tokens(250)), tda::ContextOverflow, "max_context 256");
  CHECK_THROWS(engine.score(kPrompt, 12), tda::OptionError, "prompt_tokens");
  CHECK_THROWS(engine.score(kPrompt, 0), tda::OptionError, "prompt_tokens");
}

TEST(calibration_makes_thresholds_for_its_model_only) {
  const TinyCheckpoint checkpoint, other(2);
  const tda::Engine engine(checkpoint.folder()), stranger(other.folder());
  tda::CalibrateOptions options;
  options.error = 0.2;
  const std::vector<std::vector<Token>> texts = {kPrompt, {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5}};
  const auto thresholds = engine.calibrate(texts, options);
  CHECK(thresholds.texts == 2);
  CHECK(thresholds.tokens == 23);
  CHECK(thresholds.source == "texts");
  for (const float reached : thresholds.reached) CHECK(reached <= 0.2f);
  tda::TdaOptions tda;
  tda.thresholds = std::make_shared<const tda::Thresholds>(thresholds);
  CHECK(generate(engine, tokens(5), tda).size() == 5);
  CHECK_THROWS(generate(stranger, tokens(5), tda), tda::CheckpointError, "do not fit model");

  options.self_texts = 3;
  options.self_tokens = 20;
  const auto own = engine.calibrate({}, options);
  CHECK(own.source == "self-generated");
  CHECK(own.tokens == 60);
  CHECK(own.values == engine.calibrate({}, options).values);
}

/// A checkpoint of zeros, whose file takes no room on disk.
struct ZeroCheckpoint {
  explicit ZeroCheckpoint(std::int64_t vocabulary) {
    json header;
    std::int64_t end = 0;
    const auto add = [&](const std::string& name, const std::vector<std::int64_t>& shape) {
      const std::int64_t begin = end;
      end += 4 * shape[0] * (shape.size() > 1 ? shape[1] : 1);
      header[name] = {{"dtype", "F32"}, {"shape", shape}, {"data_offsets", {begin, end}}};
    };
    const std::string layer = "model.layers.0.";
    add("model.embed_tokens.weight", {vocabulary, kHidden});
    for (const std::string& name :
         {layer + "input_layernorm", layer + "post_attention_layernorm", std::string("model.norm")})
      add(name + ".weight", {kHidden});
    for (const char* name : {"self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate",
                             "mlp.up", "mlp.down"})
      add(layer + name + "_proj.weight", {kHidden, kHidden});
    const json config = {{"model_type", "llama"},
                         {"vocab_size", vocabulary},
                         {"hidden_size", kHidden},
                         {"intermediate_size", kHidden},
                         {"num_hidden_layers", 1},
                         {"num_attention_heads", 1},
                         {"max_position_embeddings", kMostTokens},
                         {"tie_word_embeddings", true}};
    folder.write("config.json", config.dump());
    const std::string start = fixtures::with_length(header.dump(), "");
    std::filesystem::resize_file(folder.write("model.safetensors", start), start.size() + end);
  }
  static constexpr std::int64_t kHidden = 6;
  static constexpr std::int64_t kMostTokens = std::int64_t{1} << 24;
  fixtures::Folder folder;
};

// Sanitizers end the process where `new` finds no memory, and take address space of their own.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
TEST(memory_that_runs_out_is_an_error) {
  const ZeroCheckpoint large(1 << 22);
  {
    const tda::Engine engine(large.folder.path, {.threads = 1});
    const std::vector<Token> tokens(ZeroCheckpoint::kMostTokens);
    CHECK_THROWS(engine.logits(tokens), tda::DeviceError,
                 "281474976710656 bytes needed for the logits");
  }
  // 96 MiB of weights, more than the heaps that malloc may keep in reserve.
  std::int64_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  rlimit before;
  ::getrlimit(RLIMIT_AS, &before);
  const auto left = static_cast<rlim_t>(pages * ::sysconf(_SC_PAGESIZE) + (8 << 20));
  const rlimit tight = {.rlim_cur = left, .rlim_max = before.rlim_max};
  ::setrlimit(RLIMIT_AS, &tight);
  CHECK_THROWS(tda::Engine(large.folder.path, {.threads = 1}), tda::DeviceError,
               "out of memory: the weights need");
  ::setrlimit(RLIMIT_AS, &before);
  CHECK(tda::Engine(large.folder.path, {.threads = 1}).parameters() ==
        6 * (1 << 22) + 3 * 6 + 7 * 36);
}
#endif

TEST(threads_share_an_engine) {
  const TinyCheckpoint checkpoint;
  const tda::Engine engine(checkpoint.folder());
  const auto alone = generate(engine, tokens(20), with_active(0.5));
  std::vector<std::vector<Token>> results(4);
  {
    std::vector<std::jthread> threads;
    for (auto& result : results) {
      threads.emplace_back([&] { result = generate(engine, tokens(20), with_active(0.5)); });
    }
  }
  for (const auto& result : results) CHECK(result == alone);
}

TEST(a_generation_is_cancelled_by_its_reader_or_by_any_thread) {
  const TinyCheckpoint checkpoint;
  const tda::Engine engine(checkpoint.folder());
  const auto whole = generate(engine, tokens(200));
  int seen = 0;
  const auto three = engine.generate(kPrompt, tokens(200), {}, [&](Token) { return ++seen < 3; });
  CHECK(three.tokens == std::vector<Token>(whole.begin(), whole.begin() + 3));
  CHECK(three.finish_reason == tda::FinishReason::cancelled);

  tda::Generation generation = engine.start(kPrompt, tokens(200));
  std::vector<Token> found;
  {
    const std::jthread other([&] { generation.cancel(); });
    while (const auto token = generation.next()) found.push_back(*token);
  }
  CHECK(found == std::vector<Token>(whole.begin(), whole.begin() + std::ssize(found)));
  CHECK(!generation.next());
  CHECK(generation.finish_reason() ==
        (found.size() == 200 ? tda::FinishReason::length : tda::FinishReason::cancelled));
}

TEST(what_before_step_throws_ends_the_call) {
  const TinyCheckpoint checkpoint;
  tda::EngineOptions options;
  int left = 1000;
  options.before_step = [&] {
    if (left-- == 0) throw tda::Error("enough");
  };
  const tda::Engine engine(checkpoint.folder(), options);
  const auto whole = generate(engine, tokens(20));
  tda::Generation generation = engine.start(kPrompt, tokens(20));
  left = 3;  // the prompt and two tokens
  for (int i = 0; i < 3; ++i) CHECK(generation.next() == whole[i]);
  CHECK_THROWS(generation.next(), tda::Error, "enough");
  CHECK(!generation.next());
  CHECK(generation.finish_reason() == tda::FinishReason::cancelled);
  left = 0;
  CHECK_THROWS(engine.logits(kPrompt), tda::Error, "enough");
  left = 1000;
  CHECK(generate(engine, tokens(20)) == whole);
}

TEST(an_interrupted_refresh_is_made_up_for) {
  const TinyCheckpoint checkpoint;
  tda::EngineOptions engine_options;
  bool stop = false;
  engine_options.before_step = [&] {
    if (stop) throw tda::Error("enough");
  };
  const tda::Engine engine(checkpoint.folder(), engine_options);
  auto options = with_active(0.3);
  options.refresh = 3;
  const auto last_logits = [&](bool interrupted) {
    tda::Session session = engine.session(40);
    session.prefill(std::span(kPrompt).first(6));
    session.apply(options);
    for (int i = 6; i < 9; ++i) session.decode(kPrompt[i]);
    stop = interrupted;
    if (stop) CHECK_THROWS(session.decode(kPrompt[9]), tda::Error, "enough");
    stop = false;
    CHECK(session.position() == 9);
    return session.decode(kPrompt[9]);
  };
  CHECK(last_logits(true) == last_logits(false));
}

TEST(interrupted_new_keys_are_made_up_for) {
  const TinyCheckpoint checkpoint;
  nlohmann::json config;
  std::ifstream(checkpoint.folder() / "config.json") >> config;
  config["rope_scaling"] = {{"rope_type", "longrope"},
                            {"original_max_position_embeddings", 300},
                            {"short_factor", {1, 1.2, 1.5}},
                            {"long_factor", {2, 5, 9}}};
  config["max_position_embeddings"] = 500;
  std::ofstream(checkpoint.folder() / "config.json") << config;
  tda::EngineOptions options;
  int left = 1000;
  options.before_step = [&] {
    if (left-- == 0) throw tda::Error("enough");
  };
  const tda::Engine engine(checkpoint.folder(), options);
  std::vector<tda::Token> text(310);
  for (std::size_t i = 0; i < text.size(); ++i) text[i] = static_cast<tda::Token>(i * 7 % 61);
  const auto rest = std::span(text).subspan(295);
  // As many tokens on the short side, then on the long one.
  const auto short_side = engine.logits(std::span(text).first(297)),
             long_side = engine.logits(text);
  for (const int steps : {0, 1}) {  // 295 tokens are two steps
    tda::Session session = engine.session(310);
    session.prefill(std::span(text).first(295));
    left = steps;
    CHECK_THROWS(session.prefill(rest), tda::Error, "enough");
    left = 1000;
    CHECK(session.position() == 295);
    const auto behind = session.prefill(rest.first(2));
    for (std::size_t i = 0; i < behind.size(); ++i)
      CHECK_NEAR(behind[i], short_side[short_side.size() - behind.size() + i], 1e-4);
    const auto last = session.prefill(rest.subspan(2));
    for (std::size_t i = 0; i < last.size(); ++i)
      CHECK_NEAR(last[i], long_side[long_side.size() - last.size() + i], 1e-4);
  }
}

TEST(threads_share_an_engine_step_by_step) {
  const TinyCheckpoint checkpoint;
  const tda::Engine engine(checkpoint.folder(), {.threads = 2});
  // Each session in turn dense, with a mask, by token, and with a mask that is renewed.
  const auto run = [&](std::size_t kind) {
    tda::Session session = engine.session(40, 8);
    session.prefill(std::span(kPrompt).first(5 + kind));
    tda::TdaOptions options = with_active(0.5);
    options.scope = kind == 2 ? tda::Scope::token : tda::Scope::sequence;
    options.refresh = kind == 3 ? 3 : 0;
    if (kind > 0) session.apply(options);
    std::vector<float> all = session.statistic(1);
    for (const Token token : kPrompt) {
      const std::vector<float> logits = session.decode(token);
      all.insert(all.end(), logits.begin(), logits.end());
    }
    return all;
  };
  std::vector<std::vector<float>> alone, together(8);
  for (std::size_t kind = 0; kind < 4; ++kind) alone.push_back(run(kind));
  {
    std::vector<std::jthread> threads;
    for (std::size_t i = 0; i < together.size(); ++i)
      threads.emplace_back([&, i] { together[i] = run(i % 4); });
  }
  for (std::size_t i = 0; i < together.size(); ++i) CHECK(together[i] == alone[i % 4]);
}

TEST(the_recommended_setting_is_dense_where_nothing_is_faster) {
  const TinyCheckpoint checkpoint;
  const tda::Engine engine(checkpoint.folder());
  const auto decode = [&](std::initializer_list<tda::TdaOptions> settings) {
    tda::Session session = engine.session(20, 8);
    session.prefill(kPrompt);
    for (const tda::TdaOptions& options : settings) session.apply(options);
    return session.decode(kPrompt[0]);
  };
  CHECK(decode({with_active(0.5)}) != decode({}));
  CHECK(decode({with_active(0.5), tda::TdaOptions{}}) == decode({}));
  const auto result = engine.generate(kPrompt, tokens(3), tda::TdaOptions{});
  CHECK(result.stats.tda.starts_with("dense: with f32 weights no setting is faster"));
  CHECK(engine.generate(kPrompt, tokens(3)).stats.tda == "dense");
  const auto masked = engine.generate(kPrompt, tokens(3), with_active(0.5)).stats;
  CHECK(masked.tda == "sequence scope: 50% of neurons");
  CHECK(masked.warnings.size() == 2);  // a short prompt, a small model
}

TEST(results_do_not_depend_on_the_number_of_threads) {
  const TinyCheckpoint checkpoint;
  std::vector<std::vector<float>> results;
  for (const int count : {1, 2, 3, 5}) {
    tda::EngineOptions options;
    options.threads = count;
    results.push_back(tda::Engine(checkpoint.folder(), options)
                          .score(kPrompt, 5, with_error(0.1))
                          .log_probabilities);
  }
  for (const auto& result : results) CHECK(result == results.front());
}

int main() { return run_tests(); }
