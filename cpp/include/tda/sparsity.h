// Threshold-based dynamic activation (TDA): the options and the calibrated thresholds.
//
// For one layer, token t and neuron j of the feed-forward network:
//   h[t,j] = act(W_gate[j]·x_t) * (W_up[j]·x_t)
//   n[t,j] = h[t,j] * W_down[:,j]                 the neuron's contribution, FFN(x_t) = sum_j
//   n[t,j] R[j]   = sqrt(mean_t((|n[t,j]| / ||(|n[t,1]|, ..., |n[t,F]|)||_2)^2))     over the
//   prompt
// Scope "sequence" (Ma et al., arXiv 2408.11393): the prompt runs dense, neurons with
// R[j] >= threshold[layer] stay for the whole generation, the others are never read again.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace tda {

/// One threshold per layer, and where it came from. Stored as JSON.
struct Thresholds {
  std::string model;        // folder name of the model, for messages
  std::string fingerprint;  // of the checkpoint's tensors; must match the model used with
  std::string scope = "sequence";
  double error = 0;            // the CETT that the search was asked to meet, see TdaOptions
  std::vector<float> values;   // [L]
  std::vector<float> reached;  // [L] CETT at values, on the calibration text
  std::string source;          // "texts" or "self-generated"
  std::int64_t texts = 0;      // calibration texts used
  std::int64_t tokens = 0;     // tokens in them

  /// Written atomically (temporary name, fsync, rename). Throws CheckpointError naming the file.
  void save(const std::filesystem::path&) const;
  static Thresholds load(const std::filesystem::path&);
};

/// Exactly one of `error`, `active` and `thresholds` is set.
struct TdaOptions {
  std::string scope = "sequence";
  /// Target for CETT, the cumulative error of tail truncation (arXiv 2402.03804):
  /// ||sum of the dropped n[t,j]|| / ||FFN(x_t)||, averaged over the prompt's tokens; 0 <= error
  /// < 1. The threshold of each layer is searched on the prompt itself.
  std::optional<double> error = {};
  /// Keep this share of every layer's neurons, those with the largest R; 0 < active <= 1.
  std::optional<double> active = {};
  /// Calibrated beforehand, see Engine::calibrate.
  std::shared_ptr<const Thresholds> thresholds = {};
  /// Every `refresh` generated tokens, run those tokens again, dense and as one batch, let their
  /// statistic count as much as all before, and renew the mask. 0: never.
  std::int64_t refresh = 0;

  /// Throws OptionError.
  void validate() const;
};

struct CalibrateOptions {
  double error = 0.1;
  std::int64_t max_tokens = 512;    // of each text
  std::int64_t sample_tokens = 32;  // of each text CETT is measured on so many, evenly spread
  std::int64_t self_texts = 16;     // with no texts given, the model writes so many itself,
  std::int64_t self_tokens = 128;   // each so long, sampled at temperature 1,
  std::uint64_t seed = 0;           // from this seed on

  /// Throws OptionError.
  void validate() const;
};

}  // namespace tda
