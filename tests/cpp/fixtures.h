// Files for tests: safetensors, and the checkpoint of a tiny model.
#pragma once

#include <unistd.h>

#include <bit>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

namespace fixtures {

namespace fs = std::filesystem;
using nlohmann::json;

/// A new temporary folder, deleted by the destructor.
struct Folder {
  fs::path path;
  Folder() {
    static int count = 0;
    path = fs::temp_directory_path() /
           ("tda-test-" + std::to_string(::getpid()) + "-" + std::to_string(count++));
    fs::create_directories(path);
  }
  ~Folder() { fs::remove_all(path); }
  fs::path write(const std::string& name, const std::string& content) const {
    std::ofstream(path / name, std::ios::binary) << content;
    return path / name;
  }
};

inline std::string with_length(const std::string& header, const std::string& data) {
  const std::uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + header + data;
}

using Values = std::vector<float>;

inline std::string encode(const std::string& dtype, const Values& values) {
  std::string data;
  for (float value : values) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    // Exact for the values used here: f16 conversion handles only normal numbers.
    const std::uint16_t half =
        dtype == "BF16" || value == 0
            ? bits >> 16
            : (bits >> 16 & 0x8000) | (((bits & 0x7fffffff) >> 13) - (112 << 10));
    if (dtype == "F32")
      data.append(reinterpret_cast<const char*>(&bits), 4);
    else
      data.append(reinterpret_cast<const char*>(&half), 2);
  }
  return data;
}

struct Tensor {
  std::vector<std::int64_t> shape;
  Values values;
};
using Tensors = std::map<std::string, Tensor>;

/// The header is padded so that data begins at an odd address: loading must not need alignment.
inline std::string safetensors(const Tensors& tensors, const std::string& dtype) {
  json header = {{"__metadata__", {{"format", "pt"}}}};
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    const std::size_t begin = data.size();
    data += encode(dtype, tensor.values);
    header[name] = {
        {"dtype", dtype}, {"shape", tensor.shape}, {"data_offsets", {begin, data.size()}}};
  }
  std::string text = header.dump();
  return with_length(text.size() % 2 ? text : text + " ", data);
}

/// The same bytes under another name of the same length.
inline std::string relabelled(std::string file, const std::string& from, const std::string& to) {
  for (std::size_t at = 0; (at = file.find(from, at)) != file.npos;)
    file.replace(at, from.size(), to);
  return file;
}

inline json updated(json base, const json& changes) {
  base.update(changes);
  return base;
}

// H and F are just above a group of 64.
inline const json tiny = {{"model_type", "llama"},
                          {"architectures", {"LlamaForCausalLM"}},
                          {"vocab_size", 7},
                          {"hidden_size", 72},
                          {"intermediate_size", 70},
                          {"num_hidden_layers", 2},
                          {"num_attention_heads", 6},
                          {"num_key_value_heads", 2},
                          {"max_position_embeddings", 64}};

/// Multiples of 1/64 within [-2, 2): exact in every format.
inline Tensor pattern(std::vector<std::int64_t> shape) {
  static unsigned seed = 1;
  std::int64_t count = 1;
  for (std::int64_t size : shape) count *= size;
  Tensor tensor{shape, {}};
  for (std::int64_t i = 0; i < count; ++i) {
    seed = seed * 1664525 + 1013904223;
    tensor.values.push_back(static_cast<float>(static_cast<int>(seed >> 24) - 128) / 64);
  }
  return tensor;
}

inline Tensors tensors_of(const json& config) {
  const auto size = [&](const char* key) { return config[key].get<std::int64_t>(); };
  const std::int64_t h = size("hidden_size"), f = size("intermediate_size");
  const std::int64_t d = h / size("num_attention_heads"), kv = d * size("num_key_value_heads");
  const bool qwen3 = config["model_type"] == "qwen3", qwen2 = config["model_type"] == "qwen2";
  const bool bias = config.value("attention_bias", false);
  Tensors result{{"model.embed_tokens.weight", pattern({size("vocab_size"), h})},
                 {"model.norm.weight", pattern({h})}};
  if (!config.value("tie_word_embeddings", false))
    result["lm_head.weight"] = pattern({size("vocab_size"), h});
  for (int i = 0; i < size("num_hidden_layers"); ++i) {
    const std::string p = "model.layers." + std::to_string(i) + ".", a = p + "self_attn.";
    result[p + "input_layernorm.weight"] = pattern({h});
    result[p + "post_attention_layernorm.weight"] = pattern({h});
    for (const auto& [name, rows] : {std::pair("q", h), std::pair("k", kv), std::pair("v", kv)}) {
      result[a + name + "_proj.weight"] = pattern({rows, h});
      if (bias || qwen2) result[a + name + "_proj.bias"] = pattern({rows});
    }
    result[a + "o_proj.weight"] = pattern({h, h});
    if (bias) result[a + "o_proj.bias"] = pattern({h});
    if (qwen3)
      for (const char* name : {"q_norm", "k_norm"}) result[a + name + ".weight"] = pattern({d});
    for (const char* name : {"gate", "up"})
      result[p + "mlp." + name + "_proj.weight"] = pattern({f, h});
    result[p + "mlp.down_proj.weight"] = pattern({h, f});
  }
  return result;
}

inline void write_model(const Folder& folder, const json& config, const Tensors& tensors,
                        const std::string& dtype) {
  folder.write("config.json", config.dump());
  folder.write("model.safetensors", safetensors(tensors, dtype));
}

}  // namespace fixtures
