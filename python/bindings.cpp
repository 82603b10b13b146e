// tdaengine._native: the public C++ headers in Python, one to one. Structs of options are made from
// keyword arguments that carry the C++ field names.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <tda/engine.h>
#include <tda/version.h>

#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

namespace nb = nanobind;
using namespace nb::literals;

namespace {

std::string name_of_type(nb::handle value) {
  return nb::cast<std::string>(nb::str(value.type().attr("__name__")));
}

/// Any sequence of integers. Throws OptionError naming the element that is none.
std::vector<tda::Token> to_tokens(nb::handle sequence) {
  if (nb::isinstance<nb::str>(sequence) || nb::isinstance<nb::bytes>(sequence) ||
      !nb::hasattr(sequence, "__iter__")) {
    throw tda::OptionError("tokens: found " + name_of_type(sequence) +
                           ", expected a sequence of ids");
  }
  std::vector<tda::Token> tokens;
  for (nb::handle item : nb::iter(sequence)) {
    const nb::object integer = nb::steal(PyNumber_Index(item.ptr()));
    long long id = -1;
    if (integer.is_valid()) id = PyLong_AsLongLong(integer.ptr());
    const bool failed = PyErr_Occurred() != nullptr;
    PyErr_Clear();
    if (failed || id < 0 || id > std::numeric_limits<tda::Token>::max()) {
      throw tda::OptionError("tokens[" + std::to_string(tokens.size()) + "]: found " +
                             nb::cast<std::string>(nb::repr(item)) + ", expected a token id");
    }
    tokens.push_back(static_cast<tda::Token>(id));
  }
  return tokens;
}

/// A NumPy array that takes over the vector's memory.
template <typename T>
nb::ndarray<nb::numpy, T> to_array(std::vector<T> values, std::vector<std::size_t> shape) {
  auto* owned = new std::vector<T>(std::move(values));
  const nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return {owned->data(), shape.size(), shape.data(), owner};
}

template <typename T>
nb::ndarray<nb::numpy, T> to_array(std::vector<T> values) {
  const std::size_t size = values.size();
  return to_array(std::move(values), {size});
}

/// Binds a struct whose Python constructor takes its fields as keyword arguments. A name or type
/// that does not fit is an OptionError.
template <typename Options>
class OptionsClass {
 public:
  OptionsClass(nb::module_& module, const char* name, const char* doc) : class_(module, name, doc) {
    class_.def("__init__", [](Options* self, const nb::kwargs& arguments) {
      Options options;
      for (const auto& [key, value] : arguments) set(options, nb::cast<std::string>(key), value);
      options.validate();
      new (self) Options(std::move(options));
    });
    class_.def_prop_ro_static("fields", [](nb::handle) {
      nb::list names;
      for (const auto& [name, setter] : setters()) names.append(name);
      return names;
    });
  }

  template <typename Member>
  OptionsClass& field(const char* name, Member Options::* member) {
    class_.def_ro(name, member);
    setters()[name] = [member](Options& options, nb::handle value) {
      options.*member = nb::cast<Member>(value);
    };
    return *this;
  }

  template <typename Make, typename... Extra>
  OptionsClass& preset(const char* name, Make make, const Extra&... extra) {
    class_.def_static(name, make, extra...);
    return *this;
  }

 private:
  using Setter = std::function<void(Options&, nb::handle)>;
  static std::map<std::string, Setter>& setters() {
    static std::map<std::string, Setter> table;
    return table;
  }

  static void set(Options& options, const std::string& name, nb::handle value) {
    const auto setter = setters().find(name);
    if (setter == setters().end()) {
      std::string known;
      for (const auto& entry : setters()) known += (known.empty() ? "" : ", ") + entry.first;
      throw tda::OptionError("unknown option \"" + name + "\": expected one of " + known);
    }
    try {
      setter->second(options, value);
    } catch (const std::bad_cast&) {
      throw tda::OptionError("option " + name + ": found " +
                             nb::cast<std::string>(nb::repr(value)) + " of type " +
                             name_of_type(value) + ", which does not fit");
    }
  }

  nb::class_<Options> class_;
};

std::optional<tda::TdaOptions> to_optional(const tda::TdaOptions* tda) {
  return tda ? std::optional(*tda) : std::nullopt;
}

const char* to_string(tda::FinishReason reason) {
  switch (reason) {
    case tda::FinishReason::stop:
      return "stop";
    case tda::FinishReason::length:
      return "length";
    case tda::FinishReason::none:
      break;
  }
  return nullptr;
}

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
  }
  return nullptr;
}

void bind_errors(nb::module_& m) {
  const nb::exception<tda::Error> error(m, "Error");
  nb::exception<tda::CheckpointError>(m, "CheckpointError", error);
  nb::exception<tda::OptionError>(m, "OptionError", error);
  nb::exception<tda::DeviceError>(m, "DeviceError", error);
  nb::exception<tda::ContextOverflow>(m, "ContextOverflow", error);
}

void bind_config(nb::module_& m) {
  using tda::ModelConfig;
  using tda::RopeConfig;
  nb::class_<RopeConfig>(m, "RopeConfig", "Rotary position embedding and how it is stretched.")
      .def_prop_ro("scaling", [](const RopeConfig& c) { return to_string(c.scaling); })
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
      .def_ro("tied_embeddings", &ModelConfig::tied_embeddings)
      .def_ro("qkv_bias", &ModelConfig::qkv_bias)
      .def_ro("output_bias", &ModelConfig::output_bias)
      .def_ro("qk_norm", &ModelConfig::qk_norm)
      .def_ro("sliding_window", &ModelConfig::sliding_window)
      .def_ro("bos_token", &ModelConfig::bos_token)
      .def_ro("eos_tokens", &ModelConfig::eos_tokens);
}

void bind_options(nb::module_& m) {
  using tda::CalibrateOptions;
  using tda::GenerateOptions;
  using tda::TdaOptions;
  using tda::Thresholds;
  nb::class_<Thresholds>(m, "Thresholds",
                         "One threshold per layer on the neurons' relative magnitudes, and where "
                         "it came from. Made by Engine.calibrate.")
      .def(
          "save", [](const Thresholds& t, const std::string& path) { t.save(path); }, "path"_a,
          "Writes JSON, atomically. Raises CheckpointError.")
      .def_static(
          "load", [](const std::string& path) { return Thresholds::load(path); }, "path"_a,
          "Raises CheckpointError.")
      .def_ro("model", &Thresholds::model)
      .def_ro("fingerprint", &Thresholds::fingerprint)
      .def_ro("weights", &Thresholds::weights)
      .def_ro("scope", &Thresholds::scope)
      .def_ro("error", &Thresholds::error)
      .def_ro("bytes", &Thresholds::bytes)
      .def_ro("values", &Thresholds::values)
      .def_ro("coarse", &Thresholds::coarse)
      .def_ro("reached", &Thresholds::reached)
      .def_ro("source", &Thresholds::source)
      .def_ro("texts", &Thresholds::texts)
      .def_ro("tokens", &Thresholds::tokens);

  OptionsClass<GenerateOptions>(
      m, "GenerateOptions",
      "max_new_tokens=128, temperature=0.0 (greedy), top_k=0 (off), top_p=1.0 (off), min_p=0.0 "
      "(off),\nrepetition_penalty=1.0 (off), seed=None (a fresh one), ignore_eos=False.\n"
      "Raises OptionError.")
      .field("max_new_tokens", &GenerateOptions::max_new_tokens)
      .field("temperature", &GenerateOptions::temperature)
      .field("top_k", &GenerateOptions::top_k)
      .field("top_p", &GenerateOptions::top_p)
      .field("min_p", &GenerateOptions::min_p)
      .field("repetition_penalty", &GenerateOptions::repetition_penalty)
      .field("seed", &GenerateOptions::seed)
      .field("ignore_eos", &GenerateOptions::ignore_eos);

  OptionsClass<TdaOptions>(
      m, "TDA",
      "Threshold-based dynamic activation: which feed-forward neurons decoding skips.\n\n"
      "scope=\"sequence\": a mask made from the prompt serves the whole generation.\n"
      "scope=\"token\": every token has its own neurons, by their contributions' size.\n"
      "Exactly one of\n"
      "  error: 0 <= error < 1, target for the relative error of each layer's FFN on the prompt\n"
      "         (CETT); thresholds are searched on the prompt itself;\n"
      "  active: 0 < active <= 1, share of neurons kept in every layer;\n"
      "  thresholds: from Engine.calibrate or Thresholds.load.\n"
      "coarse=0: scope \"token\" with int8 weights and active: a further share kept at 4 bits.\n"
      "refresh=0: scope \"sequence\": renew the mask every so many generated tokens; 0: never.\n"
      "estimate=\"contribution\"; \"hidden\" and \"gate\" serve TDA.griffin and TDA.cats.\n"
      "Raises OptionError.")
      .field("scope", &TdaOptions::scope)
      .field("error", &TdaOptions::error)
      .field("active", &TdaOptions::active)
      .field("thresholds", &TdaOptions::thresholds)
      .field("coarse", &TdaOptions::coarse)
      .field("estimate", &TdaOptions::estimate)
      .field("refresh", &TdaOptions::refresh)
      .preset(
          "griffin",
          [](double active) {
            TdaOptions options{.estimate = "hidden", .active = active};
            options.validate();
            return options;
          },
          "active"_a,
          "For comparison: a share of neurons by their activations in the prompt, as in GRIFFIN\n"
          "(arXiv 2404.01365).")
      .preset(
          "cats",
          [](double active) {
            TdaOptions options{.scope = "token", .estimate = "gate", .active = active};
            options.validate();
            return options;
          },
          "active"_a,
          "For comparison: per token those neurons whose gate is open widest, as in CATS\n"
          "(arXiv 2404.08763).");

  OptionsClass<CalibrateOptions>(
      m, "CalibrateOptions",
      "scope=\"sequence\" or \"token\"; error=0.1: the CETT to meet in every layer; bytes: instead "
      "of\n"
      "it, with scope \"token\", the share of FFN bytes to read, spent over the layers where it "
      "helps\n"
      "most; max_tokens=512 of each text; sample_tokens=32 of each text on\n"
      "which CETT is measured; self_texts=16 of self_tokens=128 that the model writes from\n"
      "seed=0 on if no texts are given. Raises OptionError.")
      .field("scope", &CalibrateOptions::scope)
      .field("error", &CalibrateOptions::error)
      .field("bytes", &CalibrateOptions::bytes)
      .field("max_tokens", &CalibrateOptions::max_tokens)
      .field("sample_tokens", &CalibrateOptions::sample_tokens)
      .field("self_texts", &CalibrateOptions::self_texts)
      .field("self_tokens", &CalibrateOptions::self_tokens)
      .field("seed", &CalibrateOptions::seed);
}

void bind_results(nb::module_& m) {
  using tda::GenerationStats;
  using tda::ScoreResult;
  nb::class_<GenerationStats>(m, "GenerationStats",
                              "Seconds, tokens, and what decoding read; see <tda/engine.h>.")
      .def_ro("prompt_tokens", &GenerationStats::prompt_tokens)
      .def_ro("new_tokens", &GenerationStats::new_tokens)
      .def_ro("prefill_seconds", &GenerationStats::prefill_seconds)
      .def_ro("mask_seconds", &GenerationStats::mask_seconds)
      .def_ro("decode_seconds", &GenerationStats::decode_seconds)
      .def_ro("tokens_per_second", &GenerationStats::tokens_per_second)
      .def_ro("ffn_active", &GenerationStats::ffn_active)
      .def_ro("ffn_coarse", &GenerationStats::ffn_coarse)
      .def_ro("ffn_active_by_layer", &GenerationStats::ffn_active_by_layer)
      .def_ro("ffn_bytes", &GenerationStats::ffn_bytes)
      .def_ro("ffn_bytes_fraction", &GenerationStats::ffn_bytes_fraction)
      .def_ro("bytes_per_token", &GenerationStats::bytes_per_token);
  nb::class_<ScoreResult>(m, "ScoreResult")
      .def_prop_ro(
          "log_probabilities", [](const ScoreResult& r) { return to_array(r.log_probabilities); },
          nb::rv_policy::move)
      .def_prop_ro(
          "top_tokens", [](const ScoreResult& r) { return to_array(r.top_tokens); },
          nb::rv_policy::move)
      .def_ro("stats", &ScoreResult::stats);

  using tda::Generation;
  nb::class_<Generation>(m, "Generation", "One generation under way.")
      .def("next", &Generation::next, nb::call_guard<nb::gil_scoped_release>(),
           "The next token id, or None at the end.")
      .def_prop_ro("finish_reason",
                   [](const Generation& g) { return to_string(g.finish_reason()); })
      .def_prop_ro("stats", &Generation::stats);
}

void bind_session(nb::module_& m) {
  using tda::Session;
  nb::class_<Session>(m, "Session", "All that changes while a model runs, for stepwise use.")
      .def_prop_ro("position", &Session::position)
      .def_prop_ro("capacity", &Session::capacity)
      .def_prop_ro("ffn_bytes", &Session::ffn_bytes)
      .def(
          "prefill",
          [](Session& session, nb::handle ids) {
            const std::vector<tda::Token> tokens = to_tokens(ids);
            std::vector<float> logits;
            {
              const nb::gil_scoped_release released;
              logits = session.prefill(tokens);
            }
            return to_array(std::move(logits));
          },
          nb::arg("tokens").none(), "Appends tokens, dense; logits [V] of the last one.")
      .def(
          "decode",
          [](Session& session, tda::Token token) {
            std::vector<float> logits;
            {
              const nb::gil_scoped_release released;
              logits = session.decode(token);
            }
            return to_array(std::move(logits));
          },
          "token"_a, "Appends one token through the masks; its logits [V].")
      .def(
          "statistic",
          [](const Session& session, std::int64_t layer) {
            return to_array(session.statistic(layer));
          },
          "layer"_a, "R [F] of everything prefilled.")
      .def(
          "mask",
          [](const Session& session, std::int64_t layer) { return to_array(session.mask(layer)); },
          "layer"_a, "The layer's active neurons, ascending.")
      .def(
          "set_mask",
          [](Session& session, std::int64_t layer, nb::handle ids) {
            session.set_mask(layer, to_tokens(ids));
          },
          "layer"_a, "neurons"_a)
      .def("apply", &Session::apply, "tda"_a, nb::call_guard<nb::gil_scoped_release>(),
           "Makes the masks of all layers from the prompt seen so far.");
}

using PyProgress = std::optional<std::function<void(std::int64_t, std::int64_t)>>;

/// Also what lets Ctrl-C end the work.
tda::Progress reporting(PyProgress progress) {
  return [progress = std::move(progress)](std::int64_t done, std::int64_t total) {
    const nb::gil_scoped_acquire acquired;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
    if (progress) (*progress)(done, total);
  };
}

void bind_engine(nb::module_& m) {
  using tda::Engine;
  nb::class_<Engine>(m, "Engine", "A loaded model; speaks token ids.")
      .def(
          "__init__",
          [](Engine* self, const std::string& path, const std::string& device,
             const std::string& weights, const std::string& kv, int threads,
             std::int64_t max_context, PyProgress progress) {
            tda::EngineOptions options;
            options.device = tda::parse_device(device);
            options.weights = tda::parse_weight_format(weights);
            options.kv = tda::parse_kv_format(kv);
            options.threads = threads;
            options.max_context = max_context;
            options.progress = reporting(std::move(progress));
            const nb::gil_scoped_release released;
            new (self) Engine(path, options);
          },
          "path"_a, "device"_a = "auto", "weights"_a = "auto", "kv"_a = "auto", "threads"_a = 0,
          "max_context"_a = 0, "progress"_a.none() = nb::none())
      .def_prop_ro("config", &Engine::config, nb::rv_policy::reference_internal)
      .def_prop_ro("parameters", &Engine::parameters)
      .def_prop_ro("fingerprint", &Engine::fingerprint)
      .def_prop_ro("weights", [](const Engine& e) { return std::string(name_of(e.weights())); })
      .def_prop_ro("kv", [](const Engine& e) { return std::string(name_of(e.kv())); })
      .def_prop_ro("max_context", &Engine::max_context)
      .def_prop_ro("weight_bytes", &Engine::weight_bytes)
      .def_prop_ro("threads", &Engine::threads)
      .def_prop_ro("device", &Engine::device)
      .def(
          "start",
          [](const Engine& engine, nb::handle prompt, const tda::GenerateOptions& options,
             const tda::TdaOptions* tda) {
            return engine.start(to_tokens(prompt), options, to_optional(tda));
          },
          nb::arg("prompt").none(), "options"_a, "tda"_a.none() = nb::none())
      .def(
          "logits",
          [](const Engine& engine, nb::handle ids) {
            const std::vector<tda::Token> tokens = to_tokens(ids);
            std::vector<float> logits;
            {
              const nb::gil_scoped_release released;
              logits = engine.logits(tokens);
            }
            const auto vocab = static_cast<std::size_t>(engine.config().vocab_size);
            return to_array(std::move(logits), {tokens.size(), vocab});
          },
          nb::arg("tokens").none(), "Dense logits of every position, [T, V].")
      .def(
          "score",
          [](const Engine& engine, nb::handle ids, std::int64_t prompt_tokens,
             const tda::TdaOptions* tda) {
            const std::vector<tda::Token> tokens = to_tokens(ids);
            const auto options = to_optional(tda);
            const nb::gil_scoped_release released;
            return engine.score(tokens, prompt_tokens, options);
          },
          nb::arg("tokens").none(), "prompt_tokens"_a, "tda"_a.none() = nb::none())
      .def(
          "calibrate",
          [](const Engine& engine, nb::handle texts, const tda::CalibrateOptions& options,
             PyProgress progress) {
            std::vector<std::vector<tda::Token>> tokens;
            for (nb::handle text : nb::iter(texts)) tokens.push_back(to_tokens(text));
            const tda::Progress report = reporting(std::move(progress));
            const nb::gil_scoped_release released;
            return engine.calibrate(tokens, options, report);
          },
          "texts"_a, "options"_a, "progress"_a.none() = nb::none())
      .def("session", &Engine::session, "capacity"_a, "sample_tokens"_a = 0);
  m.def(
      "pack_checkpoint",
      [](const std::string& source, const std::string& destination, const std::string& weights,
         PyProgress progress) {
        const tda::WeightFormat format = tda::parse_weight_format(weights);
        const tda::Progress report = reporting(std::move(progress));
        const nb::gil_scoped_release released;
        tda::pack_checkpoint(source, destination, format, 0, report);
      },
      "source"_a, "destination"_a, "weights"_a = "auto", "progress"_a.none() = nb::none(),
      "Writes config.json and model.safetensors of an engine folder into an empty folder.");
  m.def("measure_read_bandwidth", &tda::measure_read_bandwidth, "threads"_a, "megabytes"_a = 512,
        nb::call_guard<nb::gil_scoped_release>(),
        "Bytes per second of a streaming read: the memory roof of decoding.");
}

}  // namespace

NB_MODULE(_native, m) {
  m.attr("__version__") = std::string(tda::version());
  bind_errors(m);
  bind_config(m);
  bind_options(m);
  bind_results(m);
  bind_session(m);
  bind_engine(m);
}
