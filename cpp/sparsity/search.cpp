#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <numeric>

#include "sparsity/sparsity.h"

namespace tda {
namespace {

// Tokens that share one conversion of a down row to f32.
constexpr std::int64_t kTokens = 32;
// Columns of the sums computed at a time: small enough for the L1 cache.
constexpr std::int64_t kColumns = 192;
// Contributions added to each other before they are added to the running sum.
constexpr std::int64_t kTerms = 8;

using Ids = std::span<const std::int32_t>;

/// sum over i < n of weights[i] * column[i * kColumns], as a tree: faster and
/// more accurate than one long chain of additions.
template <std::int64_t n>
float pairwise_dot(const float* weights, const float* column) {
  if constexpr (n == 1) {
    return *weights * *column;
  } else {
    return pairwise_dot<n / 2>(weights, column) +
           pairwise_dot<n / 2>(weights + n / 2, column + n / 2 * kColumns);
  }
}

/// sums[c] += sum over i of weights[i] * rows[i, c], c < count, rows: [kTerms, kColumns].
void add_group(const float* weights, const float* rows, std::int64_t count, float* sums) {
  for (std::int64_t c = 0; c < count; ++c) sums[c] += pairwise_dot<kTerms>(weights, rows + c);
}

/// sums [tokens, H] += sum over `neurons` of h[t, j] down[j], h: [tokens, F].
void add_contributions(Ids neurons, const float* h, std::int64_t tokens, const Matrix& down,
                       float* sums) {
  const auto count = static_cast<std::int64_t>(neurons.size());
  const std::int64_t padded = (count + kTerms - 1) / kTerms * kTerms;
  std::vector<float> weights(tokens * padded);  // h of the neurons, zero-padded to whole groups
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t i = 0; i < count; ++i) {
      weights[t * padded + i] = h[t * down.rows + neurons[i]];
    }
  }
  std::array<float, kTerms * kColumns> rows{};
  for (std::int64_t column = 0; column < down.cols; column += kColumns) {
    const std::int64_t columns = std::min(kColumns, down.cols - column);
    for (std::int64_t group = 0; group < count; group += kTerms) {
      for (std::int64_t i = 0; i < std::min(kTerms, count - group); ++i) {
        read_row(down, neurons[group + i], column, columns, rows.data() + i * kColumns);
      }
      for (std::int64_t t = 0; t < tokens; ++t) {
        add_group(weights.data() + t * padded + group, rows.data(), columns,
                  sums + t * down.cols + column);
      }
    }
  }
}

/// out[t] = the L2 norm of row t. sums: [n, width]; out: [n]
void row_lengths(const float* sums, std::int64_t n, std::int64_t width, double* out) {
  for (std::int64_t t = 0; t < n; ++t) {
    const float* row = sums + t * width;
    const double squares =
        std::transform_reduce(row, row + width, 0.0, std::plus<>(), [](double x) { return x * x; });
    out[t] = std::sqrt(squares);
  }
}

/// For every token, the sum of the contributions that a threshold drops. A trial starts from the
/// last accepted (lower) threshold and adds only the neurons between the two, so that a whole
/// bisection costs about one down projection of the tokens.
class DroppedSums {
 public:
  DroppedSums(std::span<const FfnSample> samples, const Matrix& down)
      : samples_(samples), down_(down) {
    std::int64_t tokens = 0;
    for (const FfnSample& sample : samples) {
      std::vector<std::int32_t>& order = orders_.emplace_back(sample.scores.size());
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
        return sample.scores[a] < sample.scores[b];
      });
      const auto total = static_cast<std::int64_t>(sample.h.size()) / down.rows;
      for (std::int64_t first = 0; first < total; first += kTokens) {
        const std::int64_t count = std::min(kTokens, total - first);
        blocks_.push_back({orders_.size() - 1, sample.h.data() + first * down.rows, tokens, count});
        tokens += count;
      }
    }
    accepted_.resize(tokens * down.cols);
    lengths_.resize(tokens);
    ffn_lengths_.resize(tokens);
  }

  /// Mean over all tokens of ||dropped|| / ||FFN|| at a threshold, which is at least the accepted
  /// one.
  double cett(float threshold) {
    trial_ = accepted_;
    for (const Block& block : blocks_) measure(block, threshold);
    ffn_known_ = true;
    double sum = 0;
    for (std::size_t t = 0; t < lengths_.size(); ++t) {
      if (ffn_lengths_[t] > 0) sum += lengths_[t] / ffn_lengths_[t];
    }
    return sum / static_cast<double>(lengths_.size());
  }

  /// Makes the last trial, which had this threshold, the start of later ones.
  void accept(float threshold) {
    accepted_threshold_ = threshold;
    accepted_.swap(trial_);
  }

 private:
  struct Block {
    std::size_t sample;
    const float* h;      // [tokens, F]
    std::int64_t first;  // first token's row in accepted_ and trial_
    std::int64_t tokens;
  };

  /// How many of the sample's neurons have a score below the threshold.
  std::size_t count_below(float threshold, std::size_t sample) const {
    const std::vector<std::int32_t>& order = orders_[sample];
    const std::vector<float>& scores = samples_[sample].scores;
    return std::partition_point(order.begin(), order.end(),
                                [&](std::int32_t j) { return scores[j] < threshold; }) -
           order.begin();
  }

  void measure(const Block& block, float threshold) {
    const std::int64_t width = down_.cols;
    const Ids order = orders_[block.sample];
    const std::size_t from = count_below(accepted_threshold_, block.sample);
    const std::size_t to = count_below(threshold, block.sample);
    float* sums = trial_.data() + block.first * width;
    add_contributions(order.subspan(from, to - from), block.h, block.tokens, down_, sums);
    row_lengths(sums, block.tokens, width, lengths_.data() + block.first);
    if (ffn_known_) return;
    std::vector<float> ffn(sums, sums + block.tokens * width);
    add_contributions(order.subspan(to), block.h, block.tokens, down_, ffn.data());
    row_lengths(ffn.data(), block.tokens, width, ffn_lengths_.data() + block.first);
  }

  std::span<const FfnSample> samples_;
  const Matrix& down_;
  std::vector<std::vector<std::int32_t>> orders_;  // [samples][F] neurons by ascending score
  std::vector<Block> blocks_;
  std::vector<float> accepted_, trial_;        // [tokens, H]
  std::vector<double> lengths_, ffn_lengths_;  // [tokens] norms of the rows of trial_ and of FFN(x)
  float accepted_threshold_ = 0;
  bool ffn_known_ = false;  // set by the first trial, which sums all neurons anyway
};

/// The distinct scores of all samples, ascending.
std::vector<float> pooled_scores(std::span<const FfnSample> samples) {
  std::vector<float> scores;
  for (const FfnSample& sample : samples) {
    scores.insert(scores.end(), sample.scores.begin(), sample.scores.end());
  }
  std::sort(scores.begin(), scores.end());
  scores.erase(std::unique(scores.begin(), scores.end()), scores.end());
  return scores;
}

}  // namespace

double cett(std::span<const FfnSample> samples, const Matrix& down, float threshold) {
  return DroppedSums(samples, down).cett(threshold);
}

ThresholdSearch search_threshold(std::span<const FfnSample> samples, const Matrix& down,
                                 double target) {
  if (target == 0) return {};
  const std::vector<float> scores = pooled_scores(samples);
  DroppedSums sums(samples, down);
  ThresholdSearch best{scores.front(), 0};  // drops nothing
  // scores[low] meets the target; scores[high] does not, or is past the end.
  for (std::size_t low = 0, high = scores.size(); high - low > 1;) {
    const std::size_t middle = low + (high - low) / 2;
    const double error = sums.cett(scores[middle]);
    if (error <= target) {
      sums.accept(scores[middle]);
      best = {scores[middle], error};
      low = middle;
    } else {
      high = middle;
    }
  }
  return best;
}

ThresholdSearch search_token_threshold(std::span<const float> h, std::span<const float> estimates,
                                       const Matrix& down, double target) {
  // Makes a sample of every token.
  const std::int64_t neurons = down.rows, tokens = std::ssize(h) / neurons;
  std::vector<FfnSample> samples(tokens);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const auto part = [&](std::span<const float> all) {
      const auto row = all.subspan(t * neurons, neurons);
      return std::vector<float>(row.begin(), row.end());
    };
    samples[t] = {part(estimates), part(h)};
  }
  return search_threshold(samples, down, target);
}

}  // namespace tda
