#include "engine/budget.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/text_of.h"
#include "engine/session_impl.h"

namespace tda {
namespace {

constexpr std::int64_t kTexts = 4;           // on which harm is measured
constexpr std::int64_t kDecodedTokens = 32;  // of each, after its first half
constexpr double kProbe = 0.3;               // share of neurons kept while a layer is probed

/// Natural logarithms of softmax(logits).
std::vector<float> log_softmax(std::span<const float> logits) {
  const float largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float v : logits) sum += std::exp(double{v} - largest);
  const auto shift = static_cast<float>(largest + std::log(sum));
  std::vector<float> result(logits.begin(), logits.end());
  for (float& v : result) v -= shift;
  return result;
}

/// sum p (log p - log q)
double divergence(std::span<const float> p, std::span<const float> q) {
  double sum = 0;
  for (std::size_t i = 0; i < p.size(); ++i)
    sum += std::exp(double{p[i]}) * (double{p[i]} - double{q[i]});
  return std::max(sum, 0.0);
}

double squares_below(std::span<const float> values, float threshold) {
  double sum = 0;
  for (const float v : values) sum += v < threshold ? double{v} * v : 0.0;
  return sum;
}

}  // namespace

/// Decodes the second half of one text again and again, each time with one layer changed.
class HarmProbe {
 public:
  HarmProbe(const std::shared_ptr<const Runtime>& runtime, std::span<const Token> text)
      : half_((std::ssize(text) + 1) / 2),
        decoded_(text.subspan(half_, std::min(kDecodedTokens, std::ssize(text) - half_))),
        session_(runtime, std::ssize(text), 0) {
    session_.open();
    session_.prefill(text.first(half_), FfnMode::dense, 0);
    dense_ = run();
  }

  std::int64_t tokens() const { return std::ssize(decoded_); }

  /// KL divergence from dense, summed over the tokens, with one layer under a threshold.
  double harm(std::int64_t layer, float threshold) {
    session_.backend.set_threshold(*session_.state, layer, threshold);
    const std::vector<std::vector<float>> changed = run();
    session_.backend.set_threshold(*session_.state, layer, 0);
    double sum = 0;
    for (std::size_t t = 0; t < dense_.size(); ++t) sum += divergence(dense_[t], changed[t]);
    return sum;
  }

 private:
  std::vector<std::vector<float>> run() {
    session_.position = half_;
    session_.decode_mode = FfnMode::sparse;
    std::vector<std::vector<float>> result;
    for (const Token token : decoded_) result.push_back(log_softmax(session_.decode(token)));
    return result;
  }

  std::int64_t half_;
  std::span<const Token> decoded_;
  Session::Impl session_;
  std::vector<std::vector<float>> dense_;
};

std::vector<double> measure_harm(const std::shared_ptr<const Runtime>& runtime,
                                 std::span<const std::vector<Token>> texts,
                                 const std::vector<std::vector<float>>& contributions,
                                 const Progress& progress) {
  const ModelConfig& config = runtime->config();
  std::vector<HarmProbe> probes;
  double tokens = 0;
  for (const std::vector<Token>& text : texts) {
    if (std::ssize(text) < 2 || std::ssize(probes) == kTexts) continue;
    probes.emplace_back(runtime, Tokens(text).first(std::min<std::size_t>(text.size(), 512)));
    tokens += static_cast<double>(probes.back().tokens());
  }
  if (probes.empty()) throw OptionError("texts: found none of two tokens or more");

  std::vector<double> result(config.num_layers);
  for (std::int64_t layer = 0; layer < config.num_layers; ++layer) {
    const std::vector<float>& sizes = contributions[layer];
    const double sampled = static_cast<double>(sizes.size()) / config.intermediate_size;
    std::vector<float> sorted = sizes;
    const float threshold = threshold_of_share(sorted, kProbe);
    double sum = 0;
    for (HarmProbe& probe : probes) sum += probe.harm(layer, threshold);
    // Mean harm over all texts of a squared change of 1 per token. The minimum is below what can be
    // measured: a layer without effect is cut first.
    result[layer] =
        std::max(sum / tokens, 1e-12) / std::max(squares_below(sizes, threshold) / sampled, 1e-30);
    if (progress) progress(layer + 1, config.num_layers);
  }
  return result;
}

Spent spend(const std::vector<double>& harm, const std::vector<std::vector<float>>& contributions,
            double bytes) {
  const auto at = [&](double lambda) {
    Spent spent;
    for (std::size_t layer = 0; layer < harm.size(); ++layer) {
      const auto threshold = static_cast<float>(std::sqrt(lambda / harm[layer]));
      const std::vector<float>& sizes = contributions[layer];
      const auto read = std::ranges::count_if(sizes, [&](float size) { return size >= threshold; });
      spent.thresholds.push_back(threshold);
      // Gate and up rows of all, and down rows.
      const auto downs = static_cast<double>(read) / static_cast<double>(sizes.size());
      spent.bytes.push_back((2 + downs) / 3);
    }
    return spent;
  };
  const auto mean = [&](const Spent& spent) {
    return std::accumulate(spent.bytes.begin(), spent.bytes.end(), 0.0) /
           static_cast<double>(spent.bytes.size());
  };
  double low = 1e-30, high = 1e30;  // lambda: the first reads everything, the second nothing
  if (mean(at(high)) > bytes) {
    throw OptionError("bytes " + text_of(bytes) + ": expected at least " + text_of(mean(at(high))) +
                      ", which gate and up rows alone read");
  }
  for (int i = 0; i < 200 && high / low > 1 + 1e-9; ++i) {
    const double middle = std::sqrt(low) * std::sqrt(high);
    (mean(at(middle)) > bytes ? low : high) = middle;
  }
  return at(high);
}

}  // namespace tda
