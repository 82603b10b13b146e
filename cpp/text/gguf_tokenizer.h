// The tokenizer inside a GGUF file.
#pragma once

#include <map>
#include <string>

#include "checkpoint/gguf.h"

namespace tda {

/// The files that a Hugging Face folder has for it: tokenizer.json for vocabularies of kind gpt2 or
/// tokenizer.model for llama, tokenizer_config.json with the chat template, and
/// generation_config.json. Throws CheckpointError, also for kinds that are not supported.
std::map<std::string, std::string> gguf_tokenizer_files(const GgufModel& model);

}  // namespace tda
