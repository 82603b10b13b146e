#include "sparsity/setting.h"

#include <tda/error.h>

#include <cmath>
#include <string>
#include <vector>

#include "base/text_of.h"
#include "weights/bricks.h"

namespace tda {
namespace {

// Below these a statistic or a threshold says more about its text than about the model.
constexpr std::int64_t kPromptTokens = 64;
constexpr std::int64_t kCalibrationTokens = 1000;
// What a sequence mask may drop on a small model at a loss of a few per cent.
constexpr std::int64_t kSmallModel = 1'000'000'000;
constexpr double kSmallError = 0.05;
constexpr double kSmallActive = 0.9;

template <typename Enum>
std::string quoted(Enum value) {
  return '"' + std::string(name_of(value)) + '"';
}

std::string percent(double share) { return text_of(std::round(share * 1000) / 10) + "%"; }

/// The recommended setting; nothing where dense is as fast.
std::optional<TdaOptions> recommended(const TdaFacts& facts) {
  if (facts.cuda) return {};
  if (in_bricks(facts.weights)) return TdaOptions{.inputs = 0.2};
  return {};
}

std::string why_dense(const TdaFacts& facts) {
  if (facts.cuda) return "dense: on CUDA no setting is faster at little loss";
  return "dense: with " + std::string(name_of(facts.weights)) +
         " weights no setting is faster at little loss; weights=\"graded\" has one";
}

std::string words_of(const TdaOptions& options, const TdaFacts& facts) {
  if (options.inputs && !facts.layers_have_rests)
    return "by input: " + percent(head_share(options)) +
           " of the head's inputs at 8 bits, everything else at 4" +
           (options.loss ? ", for a loss of " + percent(*options.loss) : "");
  if (options.inputs)
    return "by input: " + percent(*options.inputs) + " of inputs and " +
           percent(down_share(options)) + " of neurons at 8 bits, the others at 4" +
           (options.loss ? ", for a loss of " + percent(*options.loss) : "");
  if (options.predictor)
    return "token scope " + (options.experts
                                 ? "(MoEfication): " + std::to_string(options.experts) + " of " +
                                       std::to_string(options.predictor->experts) + " experts"
                                 : "(DejaVu): " + percent(*options.active) + " of neurons");
  const bool token = options.scope == Scope::token;
  std::string words = token ? "token scope" : "sequence scope";
  if (options.estimate == Estimate::hidden) words += " (GRIFFIN)";
  if (options.estimate == Estimate::gate) words += " (CATS)";
  if (options.error) words += ": error " + text_of(*options.error);
  if (options.active) words += ": " + percent(*options.active) + " of neurons";
  if (options.thresholds)
    words += std::string(options.active ? ", prior" : ": thresholds") + " from " +
             std::to_string(options.thresholds->tokens) + " tokens";
  if (options.refresh > 0)
    words += ", renewed every " + std::to_string(options.refresh) + " tokens";
  if (options.compact) words += ", compact";
  return words;
}

/// Whether a sequence mask drops more than small models were found to stand.
bool drops_much(const TdaOptions& options) {
  if (options.active) return *options.active < kSmallActive;
  return (options.thresholds ? options.thresholds->error : *options.error) > kSmallError;
}

std::vector<std::string> warnings_of(const TdaOptions& options, const TdaFacts& facts) {
  std::vector<std::string> warnings;
  if (options.thresholds && options.thresholds->tokens < kCalibrationTokens) {
    warnings.push_back("thresholds calibrated on " + std::to_string(options.thresholds->tokens) +
                       " tokens: they follow those texts more than the model; expect another "
                       "loss than was asked for, and calibrate on 1,000 tokens or more");
  }
  if (options.scope != Scope::sequence) return warnings;
  if (facts.prompt_tokens < kPromptTokens) {
    warnings.push_back(
        "a sequence mask from a prompt of under 64 tokens: it tells little about the text that "
        "follows; expect a worse text than with longer prompts, or use scope token");
  }
  if (facts.parameters < kSmallModel && drops_much(options)) {
    warnings.push_back(
        "a sequence mask that drops this much on a model of under 1B parameters: on SmolLM2-135M "
        "error 0.1 costs 23% perplexity, and keeping 75% of the neurons 74%; expect a damaged "
        "text. Graded weights with the recommended setting cost 1% there");
  }
  return warnings;
}

/// Of options with a predictor.
void check_predicted(const TdaOptions& o) {
  const auto reject = [](const std::string& name, double found, const std::string& expected) {
    throw OptionError("tda " + name + " " + text_of(found) + ": expected " + expected);
  };
  if (o.active && !(*o.active > 0 && *o.active <= 1))
    reject("active", *o.active, "more than 0, at most 1");
  const TdaOptions alone{
      .scope = o.scope, .active = o.active, .predictor = o.predictor, .experts = o.experts};
  if (o != alone || o.scope == Scope::sequence)
    throw OptionError(
        "tda predictor: expected alone with active or experts and scope \"token\", found further "
        "options");
  if (const std::int64_t count = o.predictor->experts) {
    if (o.active)
      reject("active", *o.active, "experts instead, which " + o.predictor->file + " predicts");
    if (o.experts < 1 || o.experts > count)
      reject("experts", static_cast<double>(o.experts), "1 to " + std::to_string(count));
    return;
  }
  if (o.experts)
    reject("experts", static_cast<double>(o.experts),
           "active instead: " + o.predictor->file + " predicts neurons one by one");
  if (!o.active) throw OptionError("tda predictor: expected active, the share of neurons kept");
}

}  // namespace

double down_share(const TdaOptions& options) {
  return options.active.value_or(*options.inputs / 2);
}

double inputs_within(const Thresholds& calibrated, double loss) {
  double inputs = 1;
  for (std::size_t i = 0; i < calibrated.inputs.size() && calibrated.losses[i] <= loss; ++i)
    inputs = calibrated.inputs[i];
  return inputs;
}

double head_share(const TdaOptions& options) { return std::sqrt(*options.inputs); }

Scope scope_of(const TdaOptions& options) {
  if (options.predictor) return Scope::token;
  return options.scope.value_or(options.thresholds ? options.thresholds->scope : Scope::sequence);
}

TdaSetting resolve(const std::optional<TdaOptions>& asked, const TdaFacts& facts) {
  if (!asked) return {.options = {}, .words = "dense", .warnings = {}};
  asked->validate();
  std::optional<TdaOptions> options = *asked == TdaOptions{} ? recommended(facts) : asked;
  const bool by_input = in_bricks(facts.weights);
  if (options && (options->inputs || options->loss) && !by_input)
    throw OptionError(std::string("tda ") + (options->loss ? "loss" : "inputs") +
                      ": expected graded or int4 weights, found " +
                      std::string(name_of(facts.weights)));
  if (options && options->predictor) {
    if (facts.cuda) throw OptionError("tda predictor: expected device cpu, found cuda");
    if (by_input)
      throw OptionError("tda predictor: expected f32, bf16, bf16c or int8 weights, found " +
                        std::string(name_of(facts.weights)));
  }
  if (options && !options->inputs && !options->loss && by_input)
    throw OptionError(
        "tda with " + std::string(name_of(facts.weights)) +
        " weights: expected inputs (and active), which say how many inputs are read at 8 bits, or "
        "loss, or no option at all; masks and thresholds of neurons need other weights");
  if (!options) return {.options = {}, .words = why_dense(facts), .warnings = {}};
  if (options->loss) {
    if (!options->thresholds)
      throw OptionError(
          "tda loss: expected thresholds, or a file tda.json in the model's folder: run "
          "\"tdaengine calibrate MODEL --weights " +
          std::string(name_of(facts.weights)) + "\"");
    options->inputs = inputs_within(*options->thresholds, *options->loss);
    if (*options->inputs == 1) options->active = 1;  // dense
  }
  if (!options->inputs) options->scope = scope_of(*options);
  return {.options = options,
          .words = words_of(*options, facts),
          .warnings = warnings_of(*options, facts)};
}

void TdaOptions::validate() const {
  if (*this == TdaOptions{}) return;
  // Written so that NaN, for which every comparison is false, is out of range.
  const auto check = [](bool in_range, const char* name, double found, const char* expected) {
    if (in_range) return;
    throw OptionError(std::string("tda ") + name + " " + text_of(found) + ": expected " + expected);
  };
  if (loss) {
    check(*loss >= 0 && std::isfinite(*loss), "loss", *loss, "0 or more, as 0.02 for 2%");
    if (*this != TdaOptions{.loss = loss, .thresholds = thresholds})
      throw OptionError("tda loss: expected alone or with thresholds, found further options");
    return;
  }
  if (inputs) {
    const auto check_share = [&](const char* name, double share) {
      check(share >= 0 && share <= 1, name, share, "0 to 1");
    };
    check_share("inputs", *inputs);
    if (active) check_share("active", *active);
    if (*this != TdaOptions{.active = active, .inputs = inputs})
      throw OptionError("tda inputs: expected alone or with active, found further options");
    return;
  }
  if (predictor) return check_predicted(*this);
  if (experts) throw OptionError("tda experts: expected only with a predictor");
  const bool token = scope_of(*this) == Scope::token;
  const Estimate other = token ? Estimate::gate : Estimate::hidden;
  if (estimate != Estimate::contribution && estimate != other) {
    throw OptionError("tda estimate " + quoted(estimate) + " with scope " +
                      quoted(scope_of(*this)) + ": expected \"contribution\" or " + quoted(other));
  }
  std::vector<std::string> given;
  if (error) given.push_back("error");
  if (active) given.push_back("active");
  if (thresholds) given.push_back("thresholds");
  // A share by the prompt and the prior of the thresholds' text.
  const bool with_prior = active && thresholds && !error;
  if (with_prior && (token || estimate != Estimate::contribution || thresholds->prior.empty()))
    throw OptionError(
        "tda active with thresholds: expected scope \"sequence\", estimate \"contribution\" and "
        "thresholds with a prior, which calibrate writes for that scope");
  if (given.size() != 1 && !with_prior) {
    std::string found = given.empty() ? "none" : given[0];
    for (std::size_t i = 1; i < given.size(); ++i) found += " and " + given[i];
    throw OptionError("tda: found " + found +
                      ", expected exactly one of error, active and thresholds" +
                      (given.empty() ? ", or no option at all for the recommended setting" : ""));
  }
  if (error) check(*error >= 0 && *error < 1, "error", *error, "0 or more, less than 1");
  if (active) check(*active > 0 && *active <= 1, "active", *active, "more than 0, at most 1");
  if (estimate != Estimate::contribution && !active) {
    throw OptionError("tda estimate " + quoted(estimate) + ": expected with active only");
  }
  if (token && refresh > 0) {
    throw OptionError(
        "tda refresh: expected only with scope \"sequence\", scope \"token\" decides afresh for "
        "every token anyway");
  }
  if (token && compact) {
    throw OptionError(
        "tda compact: expected only with scope \"sequence\", which has a mask to copy");
  }
  check(refresh >= 0, "refresh", static_cast<double>(refresh),
        "0 (never) or a positive number of tokens");
}

}  // namespace tda
