#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/text_of.h"

namespace tda {
namespace {

[[noreturn]] void reject(const char* option, const std::string& found, const char* expected) {
  throw OptionError(std::string(option) + " " + found + ": expected " + expected);
}

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
}

float log_probability(std::span<const float> logits, Token token) {
  const double largest = logits[argmax(logits)];
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - largest);
  return static_cast<float>(logits[token] - largest - std::log(sum));
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

/// Top-k, top-p and min-p need sorted candidates, the penalty needs the history.
bool Sampler::only_draws() const {
  const bool all = options_.top_k == 0 && options_.top_p == 1 && options_.min_p == 0;
  return options_.repetition_penalty == 1.0 && (options_.temperature == 0 || all);
}

Token Sampler::sample(std::span<const float> logits) {
  if (only_draws()) return draw(logits, options_.temperature, uniform());
  candidates_.resize(logits.size());
  for (std::size_t i = 0; i < logits.size(); ++i) {
    candidates_[i] = {static_cast<Token>(i), logits[i]};
  }
  // Keskar et al., arXiv 1909.05858: the factor lowers the logit of a token seen before.
  const auto penalty = static_cast<float>(options_.repetition_penalty);
  for (const Token token : seen_) {
    float& logit = candidates_[token].logit;
    logit = logit > 0 ? logit / penalty : logit * penalty;
  }
  const Token token = choose();
  if (options_.repetition_penalty != 1.0) remember(token);
  return token;
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
