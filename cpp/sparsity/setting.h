// From TdaOptions to what a session does: the recommended setting, its words and its warnings.
#pragma once

#include <tda/sparsity.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace tda {

/// What a setting depends on besides itself.
struct TdaFacts {
  WeightFormat weights = WeightFormat::bf16;
  bool layers_have_rests =
      true;  // of weights in bricks: 8 bits for some inputs, not in the head alone
  bool cuda = false;
  std::int64_t parameters = 0;
  std::int64_t prompt_tokens = 0;
};

struct TdaSetting {
  std::optional<TdaOptions> options;  // with scope set; nothing: dense
  std::string words;                  // GenerationStats::tda
  std::vector<std::string> warnings;  // GenerationStats::warnings
};

/// The scope that the options name or imply.
Scope scope_of(const TdaOptions& options);

/// The fewest inputs whose calibrated loss, and that of every larger share, is at most `loss`; 1 if
/// there are none.
double inputs_within(const Thresholds& calibrated, double loss);

/// By TdaOptions::inputs, the shares that two products have for themselves: of neurons whose down
/// rows are read at 8 bits, and of the head's inputs.
double down_share(const TdaOptions& options);
double head_share(const TdaOptions& options);

/// What the options come to for this model and prompt. `asked` without a value: dense. Throws
/// OptionError for options that are invalid by themselves.
TdaSetting resolve(const std::optional<TdaOptions>& asked, const TdaFacts& facts);

}  // namespace tda
