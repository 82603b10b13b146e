#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <tda/engine.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arrays.h"
#include "bind.h"
#include "gil.h"

using namespace nb::literals;

namespace {

std::optional<tda::TdaOptions> to_optional(const tda::TdaOptions* tda) {
  return tda ? std::optional(*tda) : std::nullopt;
}

std::vector<std::vector<tda::Token>> to_texts(nb::handle texts) {
  std::vector<std::vector<tda::Token>> tokens;
  for (nb::handle text : nb::iter(texts)) tokens.push_back(to_tokens(text));
  return tokens;
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

/// A getter that hands on what an engine's own returns.
template <auto kGetter>
auto value_of(const ClosableEngine& engine) {
  return (*engine.get().*kGetter)();
}

std::shared_ptr<const tda::Engine> open_engine(const std::string& path, const std::string& device,
                                               const std::string& weights, const std::string& kv,
                                               int threads, std::int64_t max_context,
                                               std::int64_t max_batch, std::int64_t cache_memory,
                                               std::shared_ptr<tda::PrefixCache> prefix_cache,
                                               PyProgress progress) {
  tda::EngineOptions options;
  options.device = tda::parse_device(device);
  options.weights = tda::parse_weight_format(weights);
  options.kv = tda::parse_kv_format(kv);
  options.threads = threads;
  options.max_context = max_context;
  options.max_batch = max_batch;
  options.cache_memory = cache_memory;
  options.prefix_cache = std::move(prefix_cache);
  options.progress = reporting(std::move(progress));
  options.before_step = [main = main_thread()] {
    if (PyThread_get_thread_ident() == main) check_signals();
  };
  const GilReleased released;
  return std::make_shared<const tda::Engine>(path, options);
}

void bind_opening(nb::class_<ClosableEngine>& engine) {
  using Engine = ClosableEngine;
  engine
      .def(
          "__init__",
          [](Engine* self, const std::string& path, const std::string& device,
             const std::string& weights, const std::string& kv, int threads,
             std::int64_t max_context, std::int64_t max_batch, std::int64_t cache_memory,
             std::shared_ptr<tda::PrefixCache> prefix_cache, PyProgress progress) {
            new (self)
                Engine(open_engine(path, device, weights, kv, threads, max_context, max_batch,
                                   cache_memory, std::move(prefix_cache), std::move(progress)));
          },
          "path"_a, "device"_a = "auto", "weights"_a = "auto", "kv"_a = "auto", "threads"_a = 0,
          "max_context"_a = 0, "max_batch"_a = 0, "cache_memory"_a = 0,
          "prefix_cache"_a.none() = nb::none(), "progress"_a.none() = nb::none())
      .def("close", &Engine::close,
           "Gives up the engine; a later use is an OptionError. The weights are freed when no "
           "stream\n"
           "or session uses them any more.")
      .def_prop_ro("closed", &Engine::closed, "Whether `close` was called.")
      .def_prop_ro("config", value_of<&tda::Engine::config>,
                   "What the checkpoint's config.json says.")
      .def_prop_ro("parameters", value_of<&tda::Engine::parameters>,
                   "How many numbers the checkpoint has.")
      .def_prop_ro("fingerprint", value_of<&tda::Engine::fingerprint>,
                   "Of the checkpoint's tensors.")
      .def_prop_ro(
          "weights", [](const Engine& e) { return std::string(name_of(e.get()->weights())); },
          "Their format: \"f32\", \"bf16\", \"int8\", \"int4\",\n\"bf16c\" or \"graded\".")
      .def_prop_ro(
          "kv", [](const Engine& e) { return std::string(name_of(e.get()->kv())); },
          "Format of the cached keys and values: \"f32\", \"bf16\" or \"int8\".")
      .def_prop_ro("kv_bytes_per_token", value_of<&tda::Engine::kv_bytes_per_token>,
                   "Of a token's keys and values in a KV cache. A generation's has room for its "
                   "prompt and\nmax_new_tokens from its first step to its end.")
      .def_prop_ro(
          "cache_memory",
          [](const Engine& e) {
            const std::int64_t limit = e.get()->cache_memory();
            return limit ? std::optional(limit) : std::nullopt;
          },
          "The limit on the KV caches of what is computed, in bytes, or None.")
      .def_prop_ro("max_context", value_of<&tda::Engine::max_context>,
                   "How many tokens a prompt and what follows may have together.")
      .def_prop_ro("max_batch", value_of<&tda::Engine::max_batch>,
                   "How many sequences are decoded together at most.")
      .def_prop_ro("notices", value_of<&tda::Engine::notices>,
                   "What to know of choices left to the engine, a sentence each.")
      .def_prop_ro("weight_bytes", value_of<&tda::Engine::weight_bytes>,
                   "Of all weights, as they lie in memory.")
      .def_prop_ro(
          "matrices",
          [](const Engine& e) {
            std::vector<std::tuple<std::string, std::string, std::int64_t, double>> result;
            for (const tda::MatrixFormat& each : e.get()->matrices())
              result.emplace_back(each.matrices, each.format, each.layers, each.bits);
            return result;
          },
          "What each kind of matrix is in memory: (matrices, format, in how many layers or 0, bits "
          "per\nweight).")
      .def_prop_ro("threads", value_of<&tda::Engine::threads>, "How many threads compute.")
      .def_prop_ro("device", value_of<&tda::Engine::device>, "What computes, as \"cpu (avx2)\".");
}

void bind_computing(nb::class_<ClosableEngine>& engine) {
  using Engine = ClosableEngine;
  engine
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
          "score_each",
          [](const Engine& engine, nb::handle prompt, nb::handle continuations,
             const tda::TdaOptions* tda) {
            const auto open = engine.get();
            const std::vector<tda::Token> tokens = to_tokens(prompt);
            std::vector<std::vector<tda::Token>> each;
            for (nb::handle ids : nb::iter(continuations)) each.push_back(to_tokens(ids));
            const auto options = to_optional(tda);
            const GilReleased released;
            return open->score_each(tokens, each, options);
          },
          nb::arg("prompt").none(), nb::arg("continuations").none(), "tda"_a.none() = nb::none())
      .def(
          "calibrate",
          [](const Engine& engine, nb::handle texts, const tda::CalibrateOptions& options,
             PyProgress progress) {
            const auto open = engine.get();
            const std::vector<std::vector<tda::Token>> tokens = to_texts(texts);
            const tda::Progress report = reporting(std::move(progress));
            const GilReleased released;
            return open->calibrate(tokens, options, report);
          },
          "texts"_a, "options"_a, "progress"_a.none() = nb::none());
}

void bind_research(nb::class_<ClosableEngine>& engine) {
  using Engine = ClosableEngine;
  engine
      .def(
          "gate",
          [](const Engine& engine, std::int64_t layer) {
            const auto open = engine.get();
            std::vector<float> values = open->gate(layer);
            const auto neurons = static_cast<std::size_t>(open->config().intermediate_size);
            const std::size_t width = values.size() / neurons;
            return to_array(std::move(values), {neurons, width});
          },
          "layer"_a,
          "The weights of the gate in layer `layer`, f32 [F, H], of other weights than graded and "
          "int4.\nRaises OptionError.")
      .def(
          "session",
          [](const Engine& engine, std::int64_t capacity, std::int64_t sample_tokens) {
            return engine.get()->session(capacity, sample_tokens);
          },
          "capacity"_a, "sample_tokens"_a = 0,
          "A Session that can hold `capacity` tokens and remembers `sample_tokens` of each prefill "
          "for\nTDA(error=...). Raises OptionError or ContextOverflow.");
}

}  // namespace

void bind_engine(nb::module_& m) {
  nb::class_<ClosableEngine> engine(m, "Engine", "A loaded model; speaks token ids.");
  bind_opening(engine);
  bind_computing(engine);
  bind_research(engine);
  m.def(
      "pack_checkpoint",
      [](const std::string& source, const std::string& destination, const std::string& weights,
         PyProgress progress, nb::handle texts) {
        const tda::WeightFormat format = tda::parse_weight_format(weights);
        const std::vector<std::vector<tda::Token>> tokens = to_texts(texts);
        const tda::Progress report = reporting(std::move(progress));
        const GilReleased released;
        return tda::pack_checkpoint(source, destination, format, 0, report, tokens);
      },
      "source"_a, "destination"_a, "weights"_a = "auto", "progress"_a.none() = nb::none(),
      "texts"_a = nb::tuple(),
      "Writes config.json and model.safetensors of an engine folder into an empty folder, int4 by "
      "the\ncalibration texts, token ids each. Returns the notices of an Engine with such "
      "weights.");
  m.def(
      "measure_read_bandwidth", &tda::measure_read_bandwidth, "threads"_a, "megabytes"_a = 512,
      nb::call_guard<GilReleased>(),
      "Bytes per second that `threads` (0: all) read of `megabytes` in one stream: the memory roof "
      "of\ndecoding.");
}
