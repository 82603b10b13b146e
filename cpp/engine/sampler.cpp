#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/text_of.h"

namespace tda {
namespace {

[[noreturn]] void reject(const char* option, const std::string& found, const char* expected) {
  throw OptionError(std::string(option) + " " + found + ": expected " + expected);
}

/// At -100 the OpenAI API bans a token; here it is never chosen, whatever the other logits.
constexpr double kMostBias = 100;
constexpr std::int64_t kMostLogprobs = 100;
constexpr float kForbidden = -std::numeric_limits<float>::infinity();

bool is_in(TokenMask mask, Token token) {
  return mask[static_cast<std::size_t>(token) / 32] >> (token % 32) & 1;
}

/// Logits to log-probabilities.
class LogSoftmax {
 public:
  explicit LogSoftmax(std::span<const float> logits) : largest_(logits[argmax(logits)]) {
    for (const float logit : logits) sum_ += std::exp(logit - largest_);
  }
  float operator()(float logit) const {
    return static_cast<float>(logit - largest_ - std::log(sum_));
  }

 private:
  double largest_;
  double sum_ = 0;
};

}  // namespace

void GenerateOptions::validate() const {
  // Written so that NaN fails each check.
  if (max_new_tokens < 1) reject("max_new_tokens", std::to_string(max_new_tokens), "1 or more");
  if (!(temperature >= 0 && std::isfinite(temperature))) {
    reject("temperature", text_of(temperature), "a finite number, 0 (greedy) or more");
  }
  if (top_k < 0) reject("top_k", std::to_string(top_k), "0 (off) or more");
  if (!(top_p > 0 && top_p <= 1)) reject("top_p", text_of(top_p), "more than 0, at most 1 (off)");
  if (!(min_p >= 0 && min_p <= 1)) reject("min_p", text_of(min_p), "0 (off) to 1");
  if (!(repetition_penalty > 0 && std::isfinite(repetition_penalty))) {
    reject("repetition_penalty", text_of(repetition_penalty), "a finite number above 0 (1: off)");
  }
  for (const auto& [name, penalty] : {std::pair("presence_penalty", presence_penalty),
                                      std::pair("frequency_penalty", frequency_penalty)}) {
    if (!(penalty >= -2 && penalty <= 2)) reject(name, text_of(penalty), "-2 to 2 (0: off)");
  }
  for (const auto& [token, bias] : logit_bias) {
    const std::string name = "logit_bias[" + std::to_string(token) + "]";
    if (!(std::abs(bias) <= kMostBias)) {
      reject(name.c_str(), text_of(bias), "-100 (never) to 100");
    }
  }
  if (logprobs && !(*logprobs >= 0 && *logprobs <= kMostLogprobs)) {
    reject("logprobs", std::to_string(*logprobs), "0 to 100 tokens beside the chosen one");
  }
}

float log_probability(std::span<const float> logits, Token token) {
  return LogSoftmax(logits)(logits[token]);
}

Logprobs logprobs_of(std::span<const float> logits, Token chosen, std::int64_t count) {
  const LogSoftmax logprob(logits);
  std::vector<Token> best(logits.size());
  std::iota(best.begin(), best.end(), 0);
  const std::size_t kept = std::min(best.size(), static_cast<std::size_t>(count));
  std::partial_sort(
      best.begin(), best.begin() + static_cast<std::ptrdiff_t>(kept), best.end(),
      [&](Token a, Token b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
  best.resize(kept);
  Logprobs result{.chosen = {chosen, logprob(logits[chosen])}, .top = {}};
  for (const Token token : best) result.top.push_back({token, logprob(logits[token])});
  return result;
}

Sampler::Sampler(const GenerateOptions& options, Tokens prompt)
    : options_(options), random_(options.seed ? *options.seed : std::random_device{}()) {
  if (options_.repetition_penalty == 1.0) return;
  for (const Token token : prompt) remember(token);
}

void Sampler::remember(Token token) {
  const auto id = static_cast<std::size_t>(token);
  if (id >= is_seen_.size()) is_seen_.resize(id + 1, false);
  if (!is_seen_[id]) seen_.push_back(token);
  is_seen_[id] = true;
}

bool Sampler::changes_logits() const {
  return options_.repetition_penalty != 1.0 || options_.presence_penalty != 0 ||
         options_.frequency_penalty != 0 || !options_.logit_bias.empty();
}

/// Top-k, top-p and min-p need sorted candidates; bias and penalties need their tokens' logits.
bool Sampler::only_draws() const {
  const bool all = options_.top_k == 0 && options_.top_p == 1 && options_.min_p == 0;
  return !changes_logits() && (options_.temperature == 0 || all);
}

Token Sampler::sample(std::span<const float> logits, TokenMask allowed) {
  if (only_draws() && allowed.empty()) return draw(logits, options_.temperature, uniform());
  candidates_.resize(logits.size());
  for (std::size_t i = 0; i < logits.size(); ++i) {
    candidates_[i] = {static_cast<Token>(i), logits[i]};
  }
  change_logits();
  drop_forbidden(allowed);
  const Token token = choose();
  if (options_.repetition_penalty != 1.0) remember(token);
  if (options_.presence_penalty != 0 || options_.frequency_penalty != 0) ++counts_[token];
  return token;
}

void Sampler::change_logits() {
  for (const auto& [token, bias] : options_.logit_bias) {
    float& logit = candidates_[token].logit;
    logit = bias == -kMostBias ? kForbidden : static_cast<float>(logit + bias);
  }
  // Keskar et al., arXiv 1909.05858: the factor lowers the logit of a token seen before.
  const auto penalty = static_cast<float>(options_.repetition_penalty);
  for (const Token token : seen_) {
    float& logit = candidates_[token].logit;
    logit = logit > 0 ? logit / penalty : logit * penalty;
  }
  for (const auto& [token, count] : counts_) {
    float& logit = candidates_[token].logit;
    logit = static_cast<float>(logit - options_.presence_penalty -
                               options_.frequency_penalty * static_cast<double>(count));
  }
}

void Sampler::drop_forbidden(TokenMask allowed) {
  if (options_.logit_bias.empty() && allowed.empty()) return;
  const std::size_t vocab = candidates_.size();
  const std::size_t words = (vocab + 31) / 32;
  if (!allowed.empty() && allowed.size() < words) {
    throw OptionError("mask of allowed tokens: found " + std::to_string(allowed.size()) +
                      " words of 32 bits, expected " + std::to_string(words) + " for " +
                      std::to_string(vocab) + " tokens");
  }
  std::erase_if(candidates_, [&](const Candidate& candidate) {
    return candidate.logit == kForbidden || (!allowed.empty() && !is_in(allowed, candidate.token));
  });
  if (candidates_.empty()) {
    throw OptionError(std::string(allowed.empty() ? "logit_bias" : "mask of allowed tokens") +
                      ": found no token that may come next, expected one");
  }
}

/// Moves the `count` best candidates to the front, best first; of equal logits the lower id first.
void Sampler::sort_best(std::size_t count) {
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
  };
  std::partial_sort(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(count),
                    candidates_.end(), better);
}

Token Sampler::choose() {
  if (options_.temperature == 0) {
    sort_best(1);
    return candidates_.front().token;
  }
  std::size_t kept = candidates_.size();
  if (options_.top_k > 0) kept = std::min(kept, static_cast<std::size_t>(options_.top_k));
  const bool sorted = kept < candidates_.size() || options_.top_p < 1 || options_.min_p > 0;
  if (sorted) sort_best(kept);

  std::vector<float> logits(kept);
  for (std::size_t i = 0; i < kept; ++i) logits[i] = candidates_[i].logit;
  std::vector<double> weights = softmax_weights(logits, options_.temperature);
  if (options_.top_p < 1) {  // the fewest candidates that reach top_p together
    const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
    double reached = 0;
    std::size_t count = 0;
    while (count < kept && reached < options_.top_p * sum) reached += weights[count++];
    kept = count;
  }
  if (options_.min_p > 0) {
    while (weights[kept - 1] < options_.min_p) --kept;
  }
  weights.resize(kept);
  return candidates_[pick(weights, uniform())].token;
}

}  // namespace tda
