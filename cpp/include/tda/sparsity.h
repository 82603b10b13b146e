// Threshold-based dynamic activation (TDA): the options and the calibrated thresholds.
//
// For one layer, token t and neuron j of the feed-forward network:
//   h[t,j] = act(W_gate[j]·x_t) * (W_up[j]·x_t)
//   n[t,j] = h[t,j] * W_down[:,j]      the neuron's contribution: FFN(x_t) = sum_j n[t,j]
//   R[j]   = sqrt(mean_t((|n[t,j]| / ||(|n[t,1]|, ..., |n[t,F]|)||_2)^2))    over the prompt
//
// Scope "sequence" (Ma et al., arXiv 2408.11393): the prompt runs dense; neurons with
// R[j] >= threshold[layer] are kept for the whole generation, the others are never read again.
// Scope "token" (ours): the threshold applies to |n[t,j]| = |h[t,j]| ||W_down[:,j]|| of each
// generated token. Gate and up are read for all neurons, and down rows are saved.
//
// Precision by input (ours; graded weights): in y = W x every weight has 4 bits that are always
// read and a 4-bit rest. Inputs with |x[i]| * ||rest[:, i]|| at or above a threshold are read at 8
// bits, the others at 4 (TdaOptions::inputs). For the down projection that number is |n[t,j]| with
// the rest's length in the place of the column's.
#pragma once

#include <tda/types.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace [[gnu::visibility("default")]] tda {

struct PredictorWeights;

/// Numbers of Thresholds::prior are whole multiples of this, which is how the file has them.
inline constexpr float kPriorUnit = 1.0f / (1 << 24);

/// What a TDA threshold holds for: a whole generation, or each token afresh.
enum class Scope { sequence, token };

/// What TDA judges a neuron by. `contribution` is the method; the others are for comparison.
enum class Estimate {
  contribution,  // |n|
  hidden,        // |h|, scope sequence: GRIFFIN (arXiv 2404.01365)
  gate,          // |act(W_gate[j]·x_t)|, scope token: CATS (arXiv 2404.08763)
};

std::string_view name_of(Scope);
std::string_view name_of(Estimate);
/// The inverse of name_of ("sequence", "gate", ...); throws OptionError that lists what is valid.
Scope parse_scope(std::string_view);
Estimate parse_estimate(std::string_view);

/// What calibration found, and on what text: one threshold per layer or, for graded weights, what
/// reading fewer inputs at 8 bits costs. Stored as JSON.
struct Thresholds {
  std::string model;        // folder name of the model, for messages
  std::string fingerprint;  // of the checkpoint's tensors; must match the model used with
  std::string weights;      // format of the weights, "int8": must match, too
  Scope scope = Scope::sequence;
  double error = 0;                 // the CETT that the search was asked to meet, see TdaOptions,
  double bytes = 0;                 // or else the share of FFN bytes, see CalibrateOptions
  std::vector<float> values = {};   // [L] on R ("sequence") or |n| ("token")
  std::vector<float> reached = {};  // [L] CETT at values, or share of bytes, on the text
  /// graded weights, instead of the above: values of TdaOptions::inputs, descending; by how much
  /// perplexity rose with each, 0.02 for 2%; and the standard error of that over the tokens. [N]
  std::vector<float> inputs = {}, losses = {}, loss_errors = {};
  /// [L, F] scope "sequence": R² over all tokens of the texts, in multiples of kPriorUnit. What a
  /// prompt's own R² is joined with before it is compared. Empty in files made before there was one.
  std::vector<float> prior = {};
  std::string source;       // "texts" or "self-generated"
  std::int64_t texts = 0;   // calibration texts used
  std::int64_t tokens = 0;  // tokens in them

  /// Written atomically (temporary name, fsync, rename). Throws CheckpointError naming the file.
  void save(const std::filesystem::path&) const;
  static Thresholds load(const std::filesystem::path&);
};

/// What `tdaengine train-predictor` or `train-experts` has learnt about a model, for comparison with
/// TDA: two small matrices per layer that tell from x_t, before any neuron is computed, which
/// neurons matter to the token, one by one (DejaVu, arXiv 2310.17157) or by groups of neurons, called
/// experts (MoEfication, arXiv 2110.01786).
struct Predictor {
  std::string file;          // its path
  std::string model;         // folder name of the model, for messages
  std::string fingerprint;   // of the checkpoint's tensors; must match the model used with
  std::int64_t rank = 0;     // rows of the first matrix
  std::int64_t experts = 0;  // in each layer; 0: neurons are predicted one by one
  std::int64_t bytes = 0;    // read for a token, of all layers
  std::shared_ptr<const PredictorWeights> weights;

  /// Throws CheckpointError naming the file.
  static std::shared_ptr<const Predictor> load(const std::filesystem::path&);
};

/// TdaOptions{} is the recommended setting for the model and weights at hand; where nothing is
/// faster than dense at little loss, that is dense, and GenerationStats::tda says so. For a setting
/// by hand exactly one of `error`, `active` and `thresholds` is set, or `predictor`.
struct TdaOptions {
  /// Unset: that of `thresholds`, or else sequence.
  std::optional<Scope> scope = {};
  Estimate estimate = Estimate::contribution;
  /// Target for CETT, the cumulative error of tail truncation (arXiv 2402.03804):
  /// ||sum of the dropped n[t,j]|| / ||FFN(x_t)||, averaged over the prompt's tokens; 0 <= error
  /// < 1. The threshold of each layer is searched on the prompt itself.
  std::optional<double> error = {};
  /// Keep this share of every layer's neurons, those with the largest R; 0 < active <= 1. Scope
  /// "token": the share that the prompt's own tokens would have kept on average.
  std::optional<double> active = {};
  /// graded weights (int4: the head), instead of scope, error or thresholds: the share of inputs at
  /// 8 bits in q, k, v, output, gate and up, 0 <= inputs <= 1. The head, where they count most, has
  /// its square root. `active`, 0 to 1, is then the share of down's inputs, the neurons, at 8 bits;
  /// unset: half of `inputs`. The shares are those that the prompt's own tokens would have taken on
  /// average.
  std::optional<double> inputs = {};
  /// graded or int4 weights, instead of inputs: the fewest inputs whose calibrated loss, the rise
  /// of perplexity, is at most this; 0.02: 2%. Needs `thresholds`, or a file tda.json in the
  /// model's folder that Engine::calibrate has made.
  std::optional<double> loss = {};
  /// Calibrated beforehand, see Engine::calibrate. Scope "sequence": a file with a prior may be given
  /// together with `active`, which then takes the place of the file's values.
  std::shared_ptr<const Thresholds> thresholds = {};
  /// Scope "sequence": every `refresh` generated tokens, run those tokens again, dense and as one
  /// batch, let their statistic count as much as all before, and renew the mask. 0: never.
  std::int64_t refresh = 0;
  /// Scope "sequence", CPU: copy the rows of the mask's neurons to where they follow each other, so
  /// that they are read as fast as dense ones. Takes a mask's share of the FFN's memory once more,
  /// and some milliseconds for each mask; changes no result.
  bool compact = false;
  /// CPU, not graded or int4 weights: each token's neurons are those that the predictor expects to
  /// matter most, a share `active` of all, or those of the `experts` most likely experts.
  std::shared_ptr<const Predictor> predictor = {};
  std::int64_t experts = 0;

  bool operator==(const TdaOptions&) const = default;
  /// Throws OptionError.
  void validate() const;
};

/// With graded or int4 weights scope, error, bytes and sample_tokens have no meaning and stay as
/// they are.
struct CalibrateOptions {
  Scope scope = Scope::sequence;
  double error = 0.1;  // the CETT to meet in every layer
  /// Scope "token", instead of error: the share of FFN bytes to read, over all layers, relative to
  /// dense decoding. It is spent where it helps most: what a contribution's loss does to the
  /// model's predictions is measured layer by layer (see cpp/engine/budget.h). 0 < bytes <= 1.
  std::optional<double> bytes = {};
  std::int64_t max_tokens = 512;    // of each text
  std::int64_t sample_tokens = 32;  // of each text CETT is measured on so many, evenly spread
  std::int64_t self_texts = 16;     // with no texts given, the model writes so many itself,
  std::int64_t self_tokens = 128;   // each so long, sampled at temperature 1,
  std::uint64_t seed = 0;           // from this seed on

  /// Throws OptionError.
  void validate() const;
};

}  // namespace tda
