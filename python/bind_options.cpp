#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <tda/engine.h>

#include <filesystem>
#include <string>

#include "bind.h"
#include "gil.h"
#include "records.h"

using namespace nb::literals;

namespace {

const char* to_string(tda::Activation activation) {
  switch (activation) {
    case tda::Activation::silu:
      return "silu";
    case tda::Activation::gelu:
      return "gelu";
    case tda::Activation::gelu_tanh:
      return "gelu_tanh";
    case tda::Activation::relu:
      return "relu";
  }
  return nullptr;
}

const char* to_string(tda::RopeConfig::Scaling scaling) {
  using Scaling = tda::RopeConfig::Scaling;
  switch (scaling) {
    case Scaling::none:
      return "default";
    case Scaling::linear:
      return "linear";
    case Scaling::dynamic:
      return "dynamic";
    case Scaling::llama3:
      return "llama3";
    case Scaling::yarn:
      return "yarn";
    case Scaling::longrope:
      return "longrope";
  }
  return nullptr;
}

void bind_thresholds(nb::module_& m) {
  using tda::Thresholds;
  RecordClass<Thresholds>(
      m, "Thresholds",
      "What Engine.calibrate found, for TDA(thresholds=...): one threshold per layer on what\n"
      "neurons contribute, or, for graded weights, what fewer inputs at 8 bits cost.")
      .field("model", &Thresholds::model, "Folder name of the model, for messages.")
      .field("fingerprint", &Thresholds::fingerprint,
             "Of the checkpoint's tensors; must be that of the model they are used with.")
      .field("weights", &Thresholds::weights, "Format of the weights, \"int8\": must match, too.")
      .field("scope", &Thresholds::scope, "\"sequence\" or \"token\".")
      .field("error", &Thresholds::error, "The error that was asked for; 0 if bytes were.")
      .field("bytes", &Thresholds::bytes, "The share of FFN bytes that was asked for, or 0.")
      .field("values", &Thresholds::values, "The thresholds, one per layer.")
      .field("reached", &Thresholds::reached,
             "Per layer the error, or share of bytes, on the calibration text.")
      .field("inputs", &Thresholds::inputs,
             "graded weights, instead of the above: values of TDA's inputs, descending,")
      .field("losses", &Thresholds::losses, "by how much perplexity rose with each, 0.02 for 2%,")
      .field("loss_errors", &Thresholds::loss_errors, "and the standard errors of that.")
      .field(
          "prior", &Thresholds::prior,
          "Scope \"sequence\": the texts' mean squared relative magnitude of every neuron, layer\n"
          "by layer, which a prompt's own is joined with; or none.")
      .field("source", &Thresholds::source, "\"texts\" or \"self-generated\".")
      .field("texts", &Thresholds::texts, "How many texts were used.")
      .field("tokens", &Thresholds::tokens, "How many tokens they had.")
      .def(
          "save", [](const Thresholds& t, const std::filesystem::path& path) { t.save(path); },
          "path"_a, nb::sig("def save(self, path: str | os.PathLike[str]) -> None"),
          "Writes JSON to the file `path`, atomically. Raises CheckpointError.")
      .def_static(
          "load", [](const std::filesystem::path& path) { return Thresholds::load(path); },
          "path"_a, nb::sig("def load(path: str | os.PathLike[str]) -> Thresholds"),
          "Reads what `save` wrote to the file `path`. Raises CheckpointError for anything else.");
}

void bind_predictor(nb::module_& m) {
  using tda::Predictor;
  nb::class_<Predictor>(
      m, "Predictor",
      "What `tdaengine train-predictor` or `train-experts` has learnt about a model: small "
      "matrices\n"
      "that tell which neurons matter to a token, for TDA(predictor=...). Pickled as its file's "
      "name.")
      .def_static(
          "load", [](const std::filesystem::path& path) { return Predictor::load(path); }, "path"_a,
          nb::sig("def load(path: str | os.PathLike[str]) -> Predictor"),
          "Reads the file `path`. Raises CheckpointError.")
      .def_ro("file", &Predictor::file, "Its path.")
      .def_ro("model", &Predictor::model, "Folder name of the model, for messages.")
      .def_ro("fingerprint", &Predictor::fingerprint,
              "Of the checkpoint's tensors; must be that of the model it is used with.")
      .def_ro("rank", &Predictor::rank, "How many rows the first of a layer's matrices has.")
      .def_ro("experts", &Predictor::experts,
              "How many groups of neurons each layer has; 0: neurons are predicted one by one.")
      .def_ro("bytes", &Predictor::bytes, "Read for each token, of all layers.")
      .def("__repr__",
           [](const Predictor& p) {
             return "Predictor(file='" + p.file + "', rank=" + std::to_string(p.rank) +
                    (p.experts ? ", experts=" + std::to_string(p.experts) : "") + ")";
           })
      .def("__getstate__", [](const Predictor& p) { return p.file; })
      .def("__setstate__", [](Predictor& p, const std::string& file) {
        new (&p) Predictor(*Predictor::load(file));
      });
}

void bind_prefix_cache(nb::module_& m) {
  using tda::PrefixCache;
  nb::class_<PrefixCache>(m, "PrefixCache", "The beginnings of prompts.")
      .def(nb::init<std::int64_t>(), "limit"_a)
      .def_prop_ro("limit", &PrefixCache::limit, "The most memory it takes, in bytes.")
      .def_prop_ro("bytes", &PrefixCache::bytes, "The memory in use.")
      .def_prop_ro("prompts", &PrefixCache::prompts, "How many it has.")
      .def("clear", &PrefixCache::clear, "Forgets all of them.")
      .def("__repr__",
           [](const PrefixCache& cache) {
             return "PrefixCache(" + std::to_string(cache.prompts()) + " prompts, " +
                    std::to_string(cache.bytes()) + " of " + std::to_string(cache.limit()) +
                    " bytes)";
           })
      .def(
          "save", [](const PrefixCache& c, const std::filesystem::path& path) { c.save(path); },
          "path"_a, nb::call_guard<GilReleased>(),
          nb::sig("def save(self, path: str | os.PathLike[str]) -> None"),
          "Writes all prompts to the file `path`, atomically. Raises CheckpointError, and "
          "OptionError\nif there are none.")
      .def(
          "load", [](PrefixCache& c, const std::filesystem::path& path) { c.load(path); }, "path"_a,
          nb::call_guard<GilReleased>(),
          nb::sig("def load(self, path: str | os.PathLike[str]) -> None"),
          "Adds the prompts that `save` wrote to the file `path`. Raises CheckpointError if it is\n"
          "damaged or of another model, OptionError if it exceeds the limit.");
}

void bind_generate_options(nb::module_& m) {
  using tda::GenerateOptions;
  RecordClass<GenerateOptions>(
      m, "GenerateOptions",
      "How to generate. Sampling follows the order logit_bias, repetition_penalty, "
      "presence_penalty\n"
      "and frequency_penalty, mask, temperature, top_k, top_p, min_p. Raises OptionError.")
      .field("max_new_tokens", &GenerateOptions::max_new_tokens, "1 or more.")
      .field("temperature", &GenerateOptions::temperature, "0: greedy.")
      .field("top_k", &GenerateOptions::top_k, "So many most likely tokens; 0: off.")
      .field("top_p", &GenerateOptions::top_p,
             "The fewest tokens that have this probability together; 1: off.")
      .field("min_p", &GenerateOptions::min_p,
             "Tokens at least this likely relative to the likeliest; 0: off.")
      .field("repetition_penalty", &GenerateOptions::repetition_penalty,
             "Over prompt and generated tokens; 1: off.")
      .field("presence_penalty", &GenerateOptions::presence_penalty,
             "-2 to 2, taken from the logits of tokens generated before; 0: off.")
      .field("frequency_penalty", &GenerateOptions::frequency_penalty,
             "The same times how often they were generated.")
      .field("logit_bias", &GenerateOptions::logit_bias,
             "{token id: bias} added to logits, -100 to 100; a token at -100 never comes.")
      .field("logprobs", &GenerateOptions::logprobs,
             "Output.logprobs tells each token's log-probability and so many of the likeliest\n"
             "ones, 0 to 100; None: no Output.logprobs.")
      .field("seed", &GenerateOptions::seed, "0 to 2**64 - 1; None: a fresh one.")
      .field("ignore_eos", &GenerateOptions::ignore_eos, "Go on after an end-of-text token.")
      .field("prefix_cache", &GenerateOptions::prefix_cache,
             "A PrefixCache to use instead of the engine's, or None.")
      .from_keywords(
          "def __init__(self, *, max_new_tokens: int = 128, temperature: float = 0.0, top_k: int = "
          "0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0, "
          "presence_penalty: float = 0.0, frequency_penalty: float = 0.0, logit_bias: dict[int, "
          "float] = {}, logprobs: int | None = None, seed: int | None = None, ignore_eos: bool = "
          "False, prefix_cache: PrefixCache | None = None) -> None");
}

/// Other methods, to compare TDA with.
void bind_comparators(RecordClass<tda::TdaOptions>& tda) {
  using tda::TdaOptions;
  tda.def_static(
         "griffin",
         [](double active) {
           TdaOptions options{.estimate = tda::Estimate::hidden, .active = active};
           options.validate();
           return options;
         },
         "active"_a,
         "For comparison: a share `active` of neurons by their activations in the prompt, as in\n"
         "GRIFFIN (arXiv 2404.01365). Raises OptionError.")
      .def_static(
          "cats",
          [](double active) {
            TdaOptions options{
                .scope = tda::Scope::token, .estimate = tda::Estimate::gate, .active = active};
            options.validate();
            return options;
          },
          "active"_a,
          "For comparison: per token the share `active` of neurons with the widest open gate, as "
          "in\n"
          "CATS (arXiv 2404.08763). Raises OptionError.")
      .def_static(
          "dejavu",
          [](const std::filesystem::path& file, double active) {
            TdaOptions options{.active = active, .predictor = tda::Predictor::load(file)};
            options.validate();
            return options;
          },
          "file"_a, "active"_a,
          nb::sig("def dejavu(file: str | os.PathLike[str], active: float) -> TDA"),
          "For comparison: per token the share `active` of neurons that the predictor in `file`, "
          "from\n"
          "`tdaengine train-predictor`, expects to matter most, as in DejaVu (arXiv 2310.17157).\n"
          "Raises OptionError or CheckpointError.")
      .def_static(
          "moefication",
          [](const std::filesystem::path& file, std::int64_t experts) {
            TdaOptions options{.predictor = tda::Predictor::load(file), .experts = experts};
            options.validate();
            return options;
          },
          "file"_a, "experts"_a,
          nb::sig("def moefication(file: str | os.PathLike[str], experts: int) -> TDA"),
          "For comparison: per token the neurons of so many `experts`, groups that `tdaengine\n"
          "train-experts` wrote to `file`, as in MoEfication (arXiv 2110.01786). Raises "
          "OptionError or\n"
          "CheckpointError.");
}

void bind_tda(nb::module_& m) {
  using tda::TdaOptions;
  RecordClass<TdaOptions> tda(
      m, "TDA",
      "Threshold-based dynamic activation: which feed-forward neurons decoding skips.\n\n"
      "TDA() is the recommended setting for the model and weights at hand: with graded and int4\n"
      "weights TDA(inputs=0.2), else dense, since nothing is faster there at little loss.\n"
      "Output.stats.tda says what was used.\n\n"
      "TDA(loss=0.02), with graded or int4 weights, is the cheapest that cost at most 2% "
      "perplexity on\n"
      "the text that the model was calibrated on.\n"
      "For a setting by hand with such weights inputs is given, and active at will; with other\n"
      "weights exactly one of error, active and thresholds.\n"
      "scope=\"token\": every token has its own neurons, by their contributions' size.\n"
      "scope=\"sequence\": a mask made from the prompt serves the whole generation.\n"
      "Raises OptionError.");
  tda.field("scope", &TdaOptions::scope,
            "\"sequence\" or \"token\"; None: that of thresholds, or else \"sequence\".")
      .field("estimate", &TdaOptions::estimate,
             "\"contribution\"; \"hidden\" and \"gate\" serve TDA.griffin and TDA.cats.")
      .field("error", &TdaOptions::error,
             "0 <= error < 1, target for the relative error of each layer's FFN on the prompt\n"
             "(CETT); thresholds are searched on the prompt itself.")
      .field("active", &TdaOptions::active,
             "0 < active <= 1, share of neurons kept in every layer.")
      .field("inputs", &TdaOptions::inputs,
             "graded weights: the share of inputs read at 8 bits in q, k, v, output, gate and up;\n"
             "the head, where they count most, has its square root. active, 0 to 1, is then the\n"
             "share of down's inputs, by default half of inputs. int4 weights have 8 bits in the\n"
             "head, and where a GGUF file of mixed types has more than 4.")
      .field("loss", &TdaOptions::loss,
             "graded or int4 weights, instead of inputs: the fewest inputs whose calibrated loss, "
             "the rise\n"
             "of perplexity, is at most this; 0.02: 2%. Needs thresholds, or the file tda.json in\n"
             "the model's folder that `tdaengine calibrate` writes.")
      .field("thresholds", &TdaOptions::thresholds,
             "Thresholds, from Engine.calibrate or Thresholds.load; for scope \"sequence\" also\n"
             "together with active, which then says how many neurons stay.")
      .field("refresh", &TdaOptions::refresh,
             "Scope \"sequence\": renew the mask every so many generated tokens; 0: never.")
      .field("compact", &TdaOptions::compact,
             "Scope \"sequence\", CPU: copy the mask's rows to one place, to be read as fast as\n"
             "dense ones; takes their memory once more.")
      .field(
          "predictor", &TdaOptions::predictor,
          "Predictor, trained beforehand, that chooses each token's neurons (CPU, weights other\n"
          "than graded and int4); with active, or with experts if it predicts experts.")
      .field("experts", &TdaOptions::experts, "Of a predictor of experts: how many a token uses.")
      .from_keywords(
          "def __init__(self, *, scope: str | None = None, error: float | None = None, active: "
          "float | None = None, thresholds: Thresholds | None = None, refresh: int = 0, estimate: "
          "str = 'contribution', compact: bool = False, inputs: float | None = None, loss: float "
          "| None = None, predictor: Predictor | None = None, experts: int = 0) -> None");
  bind_comparators(tda);
}

void bind_calibrate_options(nb::module_& m) {
  using tda::CalibrateOptions;
  RecordClass<CalibrateOptions>(m, "CalibrateOptions",
                                "How to search thresholds. Raises OptionError.")
      .field("scope", &CalibrateOptions::scope, "\"sequence\" or \"token\".")
      .field("error", &CalibrateOptions::error, "0 <= error < 1, the CETT to meet in every layer.")
      .field("bytes", &CalibrateOptions::bytes,
             "Instead of error, with scope \"token\": the share of FFN bytes to read, spent over\n"
             "the layers where it helps most.")
      .field("max_tokens", &CalibrateOptions::max_tokens, "Of each text.")
      .field("sample_tokens", &CalibrateOptions::sample_tokens,
             "Of each text, on which CETT is measured.")
      .field("self_texts", &CalibrateOptions::self_texts,
             "How many texts the model writes if none are given,")
      .field("self_tokens", &CalibrateOptions::self_tokens, "each so long,")
      .field("seed", &CalibrateOptions::seed, "sampled from this seed on.")
      .from_keywords(
          "def __init__(self, *, scope: str = 'sequence', error: float = 0.1, bytes: float | None "
          "= "
          "None, max_tokens: int = 512, sample_tokens: int = 32, self_texts: int = 16, "
          "self_tokens: "
          "int = 128, seed: int = 0) -> None");
}

}  // namespace

void bind_config(nb::module_& m) {
  using tda::ModelConfig;
  using tda::RopeConfig;
  nb::class_<RopeConfig>(m, "RopeConfig", "Rotary position embedding and how it is stretched.")
      .def_prop_ro("scaling",
                   [](const RopeConfig& c) { return c.off ? "off" : to_string(c.scaling); })
      .def_ro("theta", &RopeConfig::theta)
      .def_ro("factor", &RopeConfig::factor)
      .def_ro("original_max_position", &RopeConfig::original_max_position);
  nb::class_<ModelConfig>(m, "ModelConfig", "What a checkpoint's config.json says.")
      .def_ro("model_type", &ModelConfig::model_type)
      .def_ro("vocab_size", &ModelConfig::vocab_size)
      .def_ro("hidden_size", &ModelConfig::hidden_size)
      .def_ro("intermediate_size", &ModelConfig::intermediate_size)
      .def_ro("num_layers", &ModelConfig::num_layers)
      .def_ro("num_heads", &ModelConfig::num_heads)
      .def_ro("num_kv_heads", &ModelConfig::num_kv_heads)
      .def_ro("head_dim", &ModelConfig::head_dim)
      .def_ro("max_position", &ModelConfig::max_position)
      .def_ro("rms_norm_eps", &ModelConfig::rms_norm_eps)
      .def_prop_ro("activation", [](const ModelConfig& c) { return to_string(c.activation); })
      .def_ro("rope", &ModelConfig::rope)
      .def_ro("other_rope", &ModelConfig::other_rope, "Of the layers that uses_other_rope names.")
      .def_ro("uses_other_rope", &ModelConfig::uses_other_rope)
      .def_ro("tied_embeddings", &ModelConfig::tied_embeddings)
      .def_ro("qkv_bias", &ModelConfig::qkv_bias)
      .def_ro("output_bias", &ModelConfig::output_bias)
      .def_ro("qk_norm", &ModelConfig::qk_norm)
      .def_ro("qk_norm_of_all_heads", &ModelConfig::qk_norm_of_all_heads)
      .def_ro("pre_norms", &ModelConfig::pre_norms)
      .def_ro("post_norms", &ModelConfig::post_norms)
      .def_ro("embedding_scale", &ModelConfig::embedding_scale)
      .def_ro("residual_scale", &ModelConfig::residual_scale)
      .def_ro("logit_scale", &ModelConfig::logit_scale)
      .def_ro("score_cap", &ModelConfig::score_cap)
      .def_ro("logit_cap", &ModelConfig::logit_cap)
      .def_prop_ro("attention_scale", &ModelConfig::attention_scale)
      .def_ro("sliding_window", &ModelConfig::sliding_window)
      .def_ro("bos_token", &ModelConfig::bos_token)
      .def_ro("eos_tokens", &ModelConfig::eos_tokens);
}

void bind_options(nb::module_& m) {
  bind_thresholds(m);
  bind_predictor(m);
  bind_prefix_cache(m);
  bind_generate_options(m);
  bind_tda(m);
  bind_calibrate_options(m);
}
