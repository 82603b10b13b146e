// Shared by all sessions of an engine: the backend with its model, and the lock for computing.
#pragma once

#include <tda/engine.h>

#include <cstdint>
#include <functional>
#include <memory>

#include "backend/backend.h"
#include "base/fork_safe.h"
#include "engine/cache_memory.h"
#include "engine/decode_queue.h"
#include "engine/prefixes.h"

namespace tda {

class Runtime {
 public:
  Runtime(std::unique_ptr<Backend> backend, KvFormat kv, const EngineOptions& options,
          const std::filesystem::path& checkpoint)
      : backend(std::move(backend)),
        kv(kv),
        max_context(options.max_context ? options.max_context : config().max_position),
        max_batch(options.max_batch ? options.max_batch : this->backend->max_batch()),
        before_step(options.before_step),
        cache_memory(options.cache_memory),
        calibration(calibration_of(std::filesystem::absolute(checkpoint))),
        decoding(*this->backend, computing, max_batch) {
    if (!options.prefix_cache) return;
    if (const std::string why = keeps_no_prefixes(); !why.empty())
      notices.push_back("prefix_cache: nothing is kept " + why);
    else
      serve(prefix_cache = options.prefix_cache);
  }

  const Model& model() const { return backend->model(); }
  const ModelConfig& config() const { return model().config; }
  /// Why prompts cannot be kept: empty if they can.
  std::string keeps_no_prefixes() const;
  /// Throws OptionError if the cache is another model's or prompts cannot be kept.
  void serve(const std::shared_ptr<PrefixCache>&) const;

  const std::unique_ptr<Backend> backend;
  const KvFormat kv;
  const std::int64_t max_context;
  const std::int64_t max_batch;
  const std::function<void()> before_step;    // see EngineOptions; may be empty
  mutable CacheMemory cache_memory;           // of the sessions that calls make for themselves
  std::shared_ptr<PrefixCache> prefix_cache;  // may be null
  std::vector<std::string> notices = model().notices;
  const std::filesystem::path calibration;  // the thresholds of TdaOptions::loss, if it exists
  mutable ForkSafeTurns prefilling;         // held during a prompt's step and while it waits for
  mutable ForkSafeTurns computing;          // this one, held during any step
  mutable DecodeQueue decoding;

 private:
  static std::filesystem::path calibration_of(const std::filesystem::path& checkpoint) {
    if (std::filesystem::is_directory(checkpoint)) return checkpoint / "tda.json";
    return std::filesystem::path(checkpoint).replace_extension(".tda.json");  // beside a GGUF file
  }
};

/// Throws OptionError if tokens is empty or an id is outside the vocabulary.
void check_tokens(const ModelConfig& config, Tokens tokens);
/// Throws OptionError if there is no such layer.
void check_layer(const ModelConfig& config, std::int64_t layer);

}  // namespace tda
