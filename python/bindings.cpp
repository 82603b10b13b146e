// tdaengine._native: the public C++ headers in Python, one to one. Option structs are constructed
// from keyword arguments with the C++ field names.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <tda/engine.h>
#include <tda/version.h>

#include <filesystem>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "bind_options.h"
#include "gil.h"
#include "records.h"

using namespace nb::literals;

namespace {

/// Converts any sequence of integers. Throws OptionError naming the element that is not one.
std::vector<tda::Token> to_tokens(nb::handle sequence) {
  if (nb::isinstance<nb::str>(sequence) || nb::isinstance<nb::bytes>(sequence) ||
      !nb::hasattr(sequence, "__iter__")) {
    throw tda::OptionError("tokens: found " + name_of_type(sequence) +
                           ", expected a sequence of ids");
  }
  std::vector<tda::Token> tokens;
  for (nb::handle item : nb::iter(sequence)) {
    const bool is_bool = PyBool_Check(item.ptr());
    const nb::object integer = is_bool ? nb::object() : nb::steal(PyNumber_Index(item.ptr()));
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

/// A NumPy array that takes ownership of the vector's memory.
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

std::optional<tda::TdaOptions> to_optional(const tda::TdaOptions* tda) {
  return tda ? std::optional(*tda) : std::nullopt;
}

const char* to_string(tda::FinishReason reason) {
  switch (reason) {
    case tda::FinishReason::stop:
      return "stop";
    case tda::FinishReason::length:
      return "length";
    case tda::FinishReason::cancelled:
      return "cancelled";
    case tda::FinishReason::none:
      break;
  }
  return nullptr;
}

void bind_errors(nb::module_& m) {
  const nb::exception<tda::Error> error(m, "Error");
  error.doc() =
      "Root of all errors. A message names the file, tensor or option, what was found there and "
      "what\nwas expected.";
  const auto bind = [&]<typename E>(const char* name, const char* doc) {
    nb::exception<E>(m, name, error).doc() = doc;
  };
  bind.operator()<tda::CheckpointError>(
      "CheckpointError",
      "A checkpoint, thresholds or tokenizer file is missing, damaged, unsupported or another "
      "model's.");
  bind.operator()<tda::OptionError>(
      "OptionError", "An option or argument is out of range, unknown, or contradicts another one.");
  bind.operator()<tda::DeviceError>("DeviceError",
                                    "The device asked for is absent, out of memory, or failed.");
  bind.operator()<tda::ContextOverflow>("ContextOverflow",
                                        "The tokens asked for do not fit into the context.");
}

void bind_results(nb::module_& m) {
  using tda::GenerationStats;
  using tda::ScoreResult;
  RecordClass<GenerationStats>(m, "GenerationStats",
                               "Seconds, tokens, and what decoding read of the weights.")
      .field("prompt_tokens", &GenerationStats::prompt_tokens, "Tokens of the prompt.")
      .field("new_tokens", &GenerationStats::new_tokens, "Tokens generated.")
      .field("prefill_seconds", &GenerationStats::prefill_seconds,
             "The prompt, up to the logits of the first new token.")
      .field("mask_seconds", &GenerationStats::mask_seconds,
             "TDA: thresholds and masks, part of neither of the others.")
      .field("decode_seconds", &GenerationStats::decode_seconds, "The other new tokens.")
      .field("tokens_per_second", &GenerationStats::tokens_per_second,
             "Decode steps / decode_seconds.")
      .field("ffn_active", &GenerationStats::ffn_active,
             "Mean share of feed-forward neurons used while decoding.")
      .field("ffn_coarse", &GenerationStats::ffn_coarse,
             "Of them those used at 4 bits, as a share of all neurons.")
      .field("ffn_active_by_layer", &GenerationStats::ffn_active_by_layer, "ffn_active per layer.")
      .field("ffn_bytes", &GenerationStats::ffn_bytes,
             "Feed-forward weight bytes read while decoding, as counted.")
      .field("ffn_bytes_fraction", &GenerationStats::ffn_bytes_fraction,
             "ffn_bytes relative to dense decoding in the same format.")
      .field("head_bytes_fraction", &GenerationStats::head_bytes_fraction,
             "Bytes of the output head read while decoding, relative to all of it.")
      .field("bytes_per_token", &GenerationStats::bytes_per_token,
             "Mean of all weight and KV bytes read per decoded token.")
      .field("tda", &GenerationStats::tda, "The TDA setting used, in words.")
      .field("warnings", &GenerationStats::warnings,
             "What to expect of that setting, this model and prompt; see TdaWarning.");
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
      .def("next", &Generation::next, nb::call_guard<GilReleased>(),
           "The next token id, or None at the end.")
      .def("cancel", &Generation::cancel, "From any thread: nothing more comes.")
      .def_prop_ro("finish_reason",
                   [](const Generation& g) { return to_string(g.finish_reason()); })
      .def_prop_ro("stats", &Generation::stats);
}

void bind_session(nb::module_& m) {
  using tda::Session;
  nb::class_<Session>(m, "Session", "All that changes while a model runs, for stepwise use.")
      .def_prop_ro("position", &Session::position, "Tokens in the cache.")
      .def_prop_ro("capacity", &Session::capacity, "Tokens that the cache can hold.")
      .def_prop_ro("ffn_bytes", &Session::ffn_bytes,
                   "Feed-forward weight bytes that decoding has read so far.")
      .def(
          "prefill",
          [](Session& session, nb::handle ids) {
            const std::vector<tda::Token> tokens = to_tokens(ids);
            std::vector<float> logits;
            {
              const GilReleased released;
              logits = session.prefill(tokens);
            }
            return to_array(std::move(logits));
          },
          nb::arg("tokens").none(), "Appends `tokens`, dense; logits [V] f32 of the last one.")
      .def(
          "decode",
          [](Session& session, tda::Token token) {
            std::vector<float> logits;
            {
              const GilReleased released;
              logits = session.decode(token);
            }
            return to_array(std::move(logits));
          },
          "token"_a, "Appends one `token` through the masks; its logits [V] f32.")
      .def(
          "statistic",
          [](const Session& session, std::int64_t layer) {
            return to_array(session.statistic(layer));
          },
          "layer"_a, "R [F] f32 of the `layer` over everything prefilled.")
      .def(
          "contributions",
          [](const Session& session, std::int64_t layer) {
            std::vector<float> values = session.contributions(layer);
            const std::size_t neurons = session.statistic(layer).size();
            return to_array(std::move(values), {values.size() / neurons, neurons});
          },
          "layer"_a,
          "|n[t,j]| of layer `layer` for the tokens remembered of the last prefill, [T, F].")
      .def(
          "mask",
          [](const Session& session, std::int64_t layer) { return to_array(session.mask(layer)); },
          "layer"_a, "The layer's active neurons, ascending, int32.")
      .def(
          "set_mask",
          [](Session& session, std::int64_t layer, nb::handle ids) {
            session.set_mask(layer, to_tokens(ids));
          },
          "layer"_a, "neurons"_a, "The layer's active neurons: strictly ascending ids.")
      .def("apply", &Session::apply, "tda"_a, nb::call_guard<GilReleased>(),
           "Makes the masks of all layers by `tda` from the prompt seen so far.");
}

using PyProgress = std::optional<std::function<void(std::int64_t, std::int64_t)>>;

/// Lets Ctrl-C end work that runs without the GIL.
void check_signals() {
  const GilAcquired acquired;
  if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

/// The thread in which Python handles signals.
unsigned long main_thread() {
  return nb::cast<unsigned long>(
      nb::module_::import_("threading").attr("main_thread")().attr("ident"));
}

tda::Progress reporting(PyProgress progress) {
  return [progress = std::move(progress)](std::int64_t done, std::int64_t total) {
    check_signals();
    const GilAcquired acquired;
    if (progress) (*progress)(done, total);
  };
}

/// An engine that Python can close. A call holds the engine itself for as long as it runs: it takes
/// `get` while it has the GIL, so that another thread's `close` comes before or after.
class ClosableEngine {
 public:
  explicit ClosableEngine(std::shared_ptr<const tda::Engine> engine) : engine_(std::move(engine)) {}
  std::shared_ptr<const tda::Engine> get() const {
    if (!engine_) throw tda::OptionError("engine: found it closed, expected an open one");
    return engine_;
  }
  void close() { engine_.reset(); }
  bool closed() const { return !engine_; }

 private:
  std::shared_ptr<const tda::Engine> engine_;
};

std::shared_ptr<const tda::Engine> open_engine(const std::string& path, const std::string& device,
                                               const std::string& weights, const std::string& kv,
                                               int threads, std::int64_t max_context,
                                               PyProgress progress) {
  tda::EngineOptions options;
  options.device = tda::parse_device(device);
  options.weights = tda::parse_weight_format(weights);
  options.kv = tda::parse_kv_format(kv);
  options.threads = threads;
  options.max_context = max_context;
  options.progress = reporting(std::move(progress));
  options.before_step = [main = main_thread()] {
    if (PyThread_get_thread_ident() == main) check_signals();
  };
  const GilReleased released;
  return std::make_shared<const tda::Engine>(path, options);
}

void bind_engine(nb::module_& m) {
  using Engine = ClosableEngine;
  nb::class_<Engine>(m, "Engine", "A loaded model; speaks token ids.")
      .def(
          "__init__",
          [](Engine* self, const std::string& path, const std::string& device,
             const std::string& weights, const std::string& kv, int threads,
             std::int64_t max_context, PyProgress progress) {
            new (self) Engine(
                open_engine(path, device, weights, kv, threads, max_context, std::move(progress)));
          },
          "path"_a, "device"_a = "auto", "weights"_a = "auto", "kv"_a = "auto", "threads"_a = 0,
          "max_context"_a = 0, "progress"_a.none() = nb::none())
      .def("close", &Engine::close,
           "Gives up the engine; a later use is an OptionError. The weights are freed as soon as "
           "no\n"
           "stream or session that is still there uses them.")
      .def_prop_ro("closed", &Engine::closed, "Whether `close` was called.")
      .def_prop_ro(
          "config", [](const Engine& e) { return e.get()->config(); },
          "What the checkpoint's config.json says.")
      .def_prop_ro(
          "parameters", [](const Engine& e) { return e.get()->parameters(); },
          "How many numbers the checkpoint has.")
      .def_prop_ro(
          "fingerprint", [](const Engine& e) { return e.get()->fingerprint(); },
          "Of the checkpoint's tensors.")
      .def_prop_ro(
          "weights", [](const Engine& e) { return std::string(name_of(e.get()->weights())); },
          "Their format: \"f32\", \"bf16\", \"int8\", \"int4\" or \"bf16c\".")
      .def_prop_ro(
          "kv", [](const Engine& e) { return std::string(name_of(e.get()->kv())); },
          "Format of the cached keys and values: \"f32\", \"bf16\" or \"int8\".")
      .def_prop_ro(
          "max_context", [](const Engine& e) { return e.get()->max_context(); },
          "How many tokens a prompt and what follows may have together.")
      .def_prop_ro(
          "notices", [](const Engine& e) { return e.get()->notices(); },
          "What to know of choices left to the engine, a sentence each.")
      .def_prop_ro(
          "weight_bytes", [](const Engine& e) { return e.get()->weight_bytes(); },
          "Of all weights, as they lie in memory.")
      .def_prop_ro(
          "threads", [](const Engine& e) { return e.get()->threads(); },
          "How many threads compute.")
      .def_prop_ro(
          "device", [](const Engine& e) { return e.get()->device(); },
          "What computes, as \"cpu (avx2)\".")
      .def(
          "start",
          [](const Engine& engine, nb::handle prompt, const tda::GenerateOptions& options,
             const tda::TdaOptions* tda) {
            return engine.get()->start(to_tokens(prompt), options, to_optional(tda));
          },
          nb::arg("prompt").none(), "options"_a, "tda"_a.none() = nb::none(),
          "Starts a generation after `prompt`, token ids, by the `options` and `tda`. Raises "
          "OptionError,\nCheckpointError or ContextOverflow.")
      .def(
          "logits",
          [](const Engine& engine, nb::handle ids) {
            const auto open = engine.get();
            const std::vector<tda::Token> tokens = to_tokens(ids);
            std::vector<float> logits;
            {
              const GilReleased released;
              logits = open->logits(tokens);
            }
            const auto vocab = static_cast<std::size_t>(open->config().vocab_size);
            return to_array(std::move(logits), {tokens.size(), vocab});
          },
          nb::arg("tokens").none(),
          "Dense logits of every position of `tokens` [T], f32 [T, V]. Raises OptionError or "
          "ContextOverflow.")
      .def(
          "score",
          [](const Engine& engine, nb::handle ids, std::int64_t prompt_tokens,
             const tda::TdaOptions* tda) {
            const auto open = engine.get();
            const std::vector<tda::Token> tokens = to_tokens(ids);
            const auto options = to_optional(tda);
            const GilReleased released;
            return open->score(tokens, prompt_tokens, options);
          },
          nb::arg("tokens").none(), "prompt_tokens"_a, "tda"_a.none() = nb::none())
      .def(
          "calibrate",
          [](const Engine& engine, nb::handle texts, const tda::CalibrateOptions& options,
             PyProgress progress) {
            const auto open = engine.get();
            std::vector<std::vector<tda::Token>> tokens;
            for (nb::handle text : nb::iter(texts)) tokens.push_back(to_tokens(text));
            const tda::Progress report = reporting(std::move(progress));
            const GilReleased released;
            return open->calibrate(tokens, options, report);
          },
          "texts"_a, "options"_a, "progress"_a.none() = nb::none())
      .def(
          "session",
          [](const Engine& engine, std::int64_t capacity, std::int64_t sample_tokens) {
            return engine.get()->session(capacity, sample_tokens);
          },
          "capacity"_a, "sample_tokens"_a = 0,
          "A Session that can hold `capacity` tokens and remembers `sample_tokens` of each prefill "
          "for\nTDA(error=...). Raises OptionError or ContextOverflow.");
  m.def(
      "pack_checkpoint",
      [](const std::string& source, const std::string& destination, const std::string& weights,
         PyProgress progress) {
        const tda::WeightFormat format = tda::parse_weight_format(weights);
        const tda::Progress report = reporting(std::move(progress));
        const GilReleased released;
        return tda::pack_checkpoint(source, destination, format, 0, report);
      },
      "source"_a, "destination"_a, "weights"_a = "auto", "progress"_a.none() = nb::none(),
      "Writes config.json and model.safetensors of an engine folder into an empty folder. Returns "
      "the\nnotices of an Engine with such weights.");
  m.def(
      "measure_read_bandwidth", &tda::measure_read_bandwidth, "threads"_a, "megabytes"_a = 512,
      nb::call_guard<GilReleased>(),
      "Bytes per second that `threads` (0: all) read of `megabytes` in one stream: the memory roof "
      "of\ndecoding.");
}

}  // namespace

// What NB_MODULE defines, for the main interpreter alone.
#define PyInit__native init_in_main_interpreter
NB_MODULE(_native, m) {
  m.attr("__version__") = std::string(tda::version());
  InterpreterEnd::watch();
  nb::set_leak_warnings(false);  // what daemon threads hold at the interpreter's end is no news
  bind_errors(m);
  bind_config(m);
  bind_options(m);
  bind_results(m);
  bind_session(m);
  bind_engine(m);
}
#undef PyInit__native

/// nanobind ties its state to the interpreter that imports a module first. Python refuses such
/// modules in other interpreters by itself only from 3.12 on.
extern "C" NB_EXPORT PyObject* PyInit__native() {
  if (PyInterpreterState_GetID(PyInterpreterState_Get()) == 0) return init_in_main_interpreter();
  PyErr_SetString(
      PyExc_ImportError,
      "tdaengine: found a subinterpreter, expected the main interpreter of the process");
  return nullptr;
}
