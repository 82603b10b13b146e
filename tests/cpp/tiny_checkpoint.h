// A tiny random Llama checkpoint folder, removed with its owner.
#pragma once

#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

class TinyCheckpoint {
 public:
  static constexpr int kVocab = 61, kHidden = 24, kNeurons = 50, kLayers = 2, kHeads = 4,
                       kKvHeads = 2;

  explicit TinyCheckpoint(unsigned seed = 1) : random_(seed) {
    static int count = 0;
    folder_ = std::filesystem::temp_directory_path() /
              ("tda-test-" + std::to_string(getpid()) + "-" + std::to_string(count++));
    std::filesystem::create_directories(folder_);
    const int head = kHidden / kHeads;
    add("model.embed_tokens.weight", {kVocab, kHidden}, 1.0f);
    add("model.norm.weight", {kHidden}, 1.0f);
    add("lm_head.weight", {kVocab, kHidden}, 1.0f);
    for (int layer = 0; layer < kLayers; ++layer) {
      const std::string prefix = "model.layers." + std::to_string(layer) + ".";
      add(prefix + "input_layernorm.weight", {kHidden}, 1.0f);
      add(prefix + "post_attention_layernorm.weight", {kHidden}, 1.0f);
      add(prefix + "self_attn.q_proj.weight", {kHidden, kHidden}, 0.3f);
      add(prefix + "self_attn.k_proj.weight", {kKvHeads * head, kHidden}, 0.3f);
      add(prefix + "self_attn.v_proj.weight", {kKvHeads * head, kHidden}, 0.3f);
      add(prefix + "self_attn.o_proj.weight", {kHidden, kHidden}, 0.3f);
      add(prefix + "mlp.gate_proj.weight", {kNeurons, kHidden}, 0.3f);
      add(prefix + "mlp.up_proj.weight", {kNeurons, kHidden}, 0.3f);
      add(prefix + "mlp.down_proj.weight", {kHidden, kNeurons}, 0.3f);
    }
    write();
  }
  ~TinyCheckpoint() { std::filesystem::remove_all(folder_); }
  TinyCheckpoint(const TinyCheckpoint&) = delete;
  TinyCheckpoint& operator=(const TinyCheckpoint&) = delete;

  const std::filesystem::path& folder() const { return folder_; }

 private:
  void add(const std::string& name, std::vector<int> shape, float scale) {
    std::normal_distribution<float> normal(0, scale);
    std::size_t size = 1;
    for (const int n : shape) size *= static_cast<std::size_t>(n);
    const std::size_t begin = data_.size();
    for (std::size_t i = 0; i < size; ++i) data_.push_back(normal(random_));
    header_[name] = {{"dtype", "F32"},
                     {"shape", shape},
                     {"data_offsets", {begin * sizeof(float), data_.size() * sizeof(float)}}};
  }

  void write() const {
    const nlohmann::json config = {{"model_type", "llama"},
                                   {"architectures", {"LlamaForCausalLM"}},
                                   {"vocab_size", kVocab},
                                   {"hidden_size", kHidden},
                                   {"intermediate_size", kNeurons},
                                   {"num_hidden_layers", kLayers},
                                   {"num_attention_heads", kHeads},
                                   {"num_key_value_heads", kKvHeads},
                                   {"max_position_embeddings", 256},
                                   {"rms_norm_eps", 1e-5},
                                   {"rope_theta", 10000.0},
                                   {"hidden_act", "silu"},
                                   {"tie_word_embeddings", false},
                                   {"bos_token_id", 1},
                                   {"eos_token_id", 2}};
    std::ofstream(folder_ / "config.json") << config;
    const std::string header = header_.dump();
    const std::uint64_t length = header.size();
    std::ofstream file(folder_ / "model.safetensors", std::ios::binary);
    file.write(reinterpret_cast<const char*>(&length), sizeof length);
    file << header;
    file.write(reinterpret_cast<const char*>(data_.data()),
               static_cast<std::streamsize>(data_.size() * sizeof(float)));
  }

  std::filesystem::path folder_;
  std::mt19937 random_;
  nlohmann::json header_ = nlohmann::json::object();
  std::vector<float> data_;
};
