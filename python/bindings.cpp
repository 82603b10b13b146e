// tdaengine._native: the public C++ headers in Python, one to one. Option structs are constructed
// from keyword arguments with the C++ field names.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <tda/engine.h>
#include <tda/version.h>

#include <filesystem>
#include <string>
#include <vector>

#include "arrays.h"
#include "bind.h"
#include "gil.h"
#include "records.h"

using namespace nb::literals;

namespace {

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
      .field("cached_tokens", &GenerationStats::cached_tokens,
             "Of them, those that a PrefixCache had.")
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
      .field("ffn_coarse_by_layer", &GenerationStats::ffn_coarse_by_layer, "ffn_coarse per layer.")
      .field("ffn_bytes", &GenerationStats::ffn_bytes,
             "Feed-forward weight bytes read while decoding, as counted.")
      .field("ffn_bytes_fraction", &GenerationStats::ffn_bytes_fraction,
             "ffn_bytes relative to dense decoding in the same format.")
      .field("head_bytes_fraction", &GenerationStats::head_bytes_fraction,
             "Bytes of the output head read while decoding, relative to all of it.")
      .field("bytes_per_token", &GenerationStats::bytes_per_token,
             "Mean of all weight and KV bytes read per decoded token.")
      .field("mean_batch", &GenerationStats::mean_batch,
             "Sequences per step of decoding, this one included; a step reads the weights once for "
             "all, and the bytes above are those of this one.")
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
  using Mask = nb::ndarray<const std::uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
  nb::class_<Generation>(m, "Generation", "One generation under way.")
      .def(
          "next",
          [](Generation& generation, std::optional<Mask> allowed) {
            const tda::TokenMask mask =
                allowed ? tda::TokenMask(allowed->data(), allowed->size()) : tda::TokenMask();
            const GilReleased released;
            return generation.next(mask);
          },
          "allowed"_a.none() = nb::none(),
          "The next token id, or None at the end. allowed: bit t % 32 of word t / 32 tells "
          "whether\n"
          "token t may come.")
      .def_prop_ro(
          "logprobs",
          [](const Generation& generation) {
            const tda::Logprobs& last = generation.logprobs();
            std::vector<std::pair<tda::Token, float>> top;
            for (const auto& [token, logprob] : last.top) top.emplace_back(token, logprob);
            return std::pair(last.chosen.logprob, top);
          },
          "Of the last token: its log-probability, and the likeliest tokens with theirs.")
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
          "ffn_inputs",
          [](const Session& session, std::int64_t layer) {
            std::vector<float> values = session.ffn_inputs(layer);
            const std::size_t tokens =
                session.contributions(layer).size() / session.statistic(layer).size();
            const std::size_t width = values.size() / tokens;
            return to_array(std::move(values), {tokens, width});
          },
          "layer"_a,
          "x, the feed-forward network's normed input, of layer `layer` for the same tokens, [T, "
          "H].")
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
  bind_gguf(m);
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
