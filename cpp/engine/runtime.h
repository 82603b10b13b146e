// What all sessions of one engine share: the model on its backend, and the right to compute.
#pragma once

#include <tda/engine.h>

#include <cstdint>
#include <memory>
#include <mutex>

#include "backend/backend.h"

namespace tda {

class Runtime {
 public:
  Runtime(std::unique_ptr<Backend> backend, KvFormat kv, std::int64_t max_context)
      : backend(std::move(backend)), kv(kv), max_context(max_context) {}

  const Model& model() const { return backend->model(); }
  const ModelConfig& config() const { return model().config; }

  const std::unique_ptr<Backend> backend;
  const KvFormat kv;
  const std::int64_t max_context;
  mutable std::mutex computing;  // held for the length of one forward pass
};

/// Throws OptionError if tokens is empty or an id is outside the vocabulary.
void check_tokens(const ModelConfig& config, Tokens tokens);

}  // namespace tda
