// GGUF files for tests, field by field, so that each can be made wrong.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fixtures.h"

namespace fixtures {

template <class T>
std::string raw(T value) {
  return {reinterpret_cast<const char*>(&value), sizeof value};
}
inline std::string u32(std::uint64_t value) { return raw(static_cast<std::uint32_t>(value)); }
inline std::string u64(std::uint64_t value) { return raw(value); }
inline std::string gguf_text(const std::string& text) { return u64(text.size()) + text; }

// The types of values.
enum : std::uint32_t { kU8 = 0, kU32 = 4, kF32 = 6, kBool = 7, kString = 8, kArray = 9, kU64 = 10 };

inline std::string entry(const std::string& key, std::uint32_t kind, const std::string& value) {
  return gguf_text(key) + u32(kind) + value;
}
inline std::string text_entry(const std::string& key, const std::string& value) {
  return entry(key, kString, gguf_text(value));
}
inline std::string array_entry(const std::string& key, std::uint32_t kind, std::uint64_t count,
                               const std::string& items = "") {
  return entry(key, kArray, u32(kind) + u64(count) + items);
}

/// shape: as in the file, the fastest dimension first
inline std::string described(const std::string& name, const std::vector<std::uint64_t>& shape,
                             std::uint32_t type = 0, std::uint64_t offset = 0) {
  std::string dimensions;
  for (const std::uint64_t size : shape) dimensions += u64(size);
  return gguf_text(name) + u32(shape.size()) + dimensions + u32(type) + u64(offset);
}

inline std::string gguf(std::uint64_t keys, std::uint64_t tensors, const std::string& rest,
                        std::uint32_t version = 3) {
  return "GGUF" + u32(version) + u64(tensors) + u64(keys) + rest;
}

/// A whole file: entries of keys, then tensors as f32 in the order of `tensors`.
struct GgufWriter {
  std::vector<std::string> entries;
  std::vector<std::pair<std::string, Tensor>> tensors;

  std::string file() const {
    std::string head, data;
    for (const std::string& each : entries) head += each;
    for (const auto& [name, tensor] : tensors) {
      data.resize((data.size() + 31) / 32 * 32);
      head += described(name, {tensor.shape.rbegin(), tensor.shape.rend()}, 0, data.size());
      data += encode("F32", tensor.values);
    }
    std::string result = gguf(entries.size(), tensors.size(), head);
    result.resize((result.size() + 31) / 32 * 32);
    return result + data;
  }
};

/// The keys of `config`, a config.json.
inline std::vector<std::string> gguf_entries(const json& config, const std::string& architecture) {
  const auto number = [&](const std::string& key, const char* of) {
    return entry(architecture + "." + key, kU32, u32(config[of].get<std::uint32_t>()));
  };
  return {text_entry("general.architecture", architecture),
          number("context_length", "max_position_embeddings"),
          number("embedding_length", "hidden_size"),
          number("feed_forward_length", "intermediate_size"),
          number("block_count", "num_hidden_layers"),
          number("attention.head_count", "num_attention_heads"),
          number("attention.head_count_kv", "num_key_value_heads"),
          entry(architecture + ".attention.layer_norm_rms_epsilon", kF32, raw(1e-5f))};
}

}  // namespace fixtures
