// Puts a GGUF model together: its tensors get the names and the row order of Hugging Face checkpoints.
#include <tda/error.h>

#include <utility>

#include "base/json.h"
#include "checkpoint/gguf.h"
#include "checkpoint/gguf_keys.h"

namespace tda {
namespace {

using nlohmann::json;

constexpr const char* gguf_architectures[] = {"llama", "qwen2", "qwen3", "gemma2", "gemma3"};

/// Keys without an effect on the logits of these architectures.
constexpr const char* without_effect[] = {
    "attention.layer_norm_epsilon",  // of norms with a mean
    "pooling_type",                  // of embeddings of whole texts
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",  // as the next two honoured with YaRN
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
};

enum class Extent { none, hidden, vocabulary, neurons, head, q, kv };

struct Part {
  const char* gguf;  // after "blk.<layer>."
  const char* name;  // after "model.layers.<layer>."
  Extent rows, cols;
};
constexpr Part block_parts[] = {
    {"attn_norm", "input_layernorm", Extent::hidden, Extent::none},
    {"attn_q", "self_attn.q_proj", Extent::q, Extent::hidden},
    {"attn_k", "self_attn.k_proj", Extent::kv, Extent::hidden},
    {"attn_v", "self_attn.v_proj", Extent::kv, Extent::hidden},
    {"attn_output", "self_attn.o_proj", Extent::hidden, Extent::q},
    {"attn_q_norm", "self_attn.q_norm", Extent::head, Extent::none},
    {"attn_k_norm", "self_attn.k_norm", Extent::head, Extent::none},
    {"ffn_norm", "post_attention_layernorm", Extent::hidden, Extent::none},
    {"ffn_gate", "mlp.gate_proj", Extent::neurons, Extent::hidden},
    {"ffn_up", "mlp.up_proj", Extent::neurons, Extent::hidden},
    {"ffn_down", "mlp.down_proj", Extent::hidden, Extent::neurons},
};

// Gemma has norms behind attention and feed-forward, too.
constexpr Part gemma_norms[] = {
    {"post_attention_norm", "post_attention_layernorm", Extent::hidden, Extent::none},
    {"ffn_norm", "pre_feedforward_layernorm", Extent::hidden, Extent::none},
    {"post_ffw_norm", "post_feedforward_layernorm", Extent::hidden, Extent::none},
};
constexpr float kGemmaNormAdded = 1;  // GGUF adds it to the weights of all norms

std::string text_of(const std::vector<std::int64_t>& shape) { return json(shape).dump(); }

/// Takes the tensors that a model has from those of the files, under their new names.
class Renaming {
 public:
  Renaming(const GgufKeys& keys, const ModelConfig& config, TensorMap stored)
      : file_(keys.file()),
        llama_(keys.architecture() == "llama"),
        gemma_(keys.architecture().starts_with("gemma")),
        config_(config),
        stored_(std::move(stored)) {}

  /// Throws CheckpointError if one is missing, of another shape, or left over.
  TensorMap run() {
    take("token_embd.weight", "model.embed_tokens.weight", {Extent::vocabulary, Extent::hidden});
    take("output_norm.weight", "model.norm.weight", {Extent::hidden});
    if (!config_.tied_embeddings)
      take("output.weight", "lm_head.weight", {Extent::vocabulary, Extent::hidden});
    for (std::int64_t i = 0; i < config_.num_layers; ++i) {
      for (const Part& part : block_parts)
        if (!gemma_ || std::string_view(part.gguf) != "ffn_norm") take_block(i, part);
      if (gemma_)
        for (const Part& part : gemma_norms) take_block(i, part);
    }
    if (llama_) stored_.erase(kRopeFactors);
    if (!stored_.empty())
      throw CheckpointError(stored_.begin()->second.file->name() + ": tensor " +
                            describe(stored_.begin()->first) + " is unknown, expected those of a " +
                            "dense " + config_.model_type + " model");
    return std::move(taken_);
  }

 private:
  void take_block(std::int64_t layer, const Part& part) {
    const std::string number = std::to_string(layer) + ".", gguf = part.gguf;
    const std::string from = "blk." + number + gguf, to = "model.layers." + number + part.name;
    if (config_.qk_norm || part.rows != Extent::head) {
      std::vector<Extent> shape{part.rows};
      if (part.cols != Extent::none) shape.push_back(part.cols);
      take(from + ".weight", to + ".weight", shape);
    }
    const bool qkv = gguf == "attn_q" || gguf == "attn_k" || gguf == "attn_v";
    if ((qkv && config_.qkv_bias) || (gguf == "attn_output" && config_.output_bias))
      take(from + ".bias", to + ".bias", {part.rows});
  }

  void take(const std::string& from, const std::string& to, const std::vector<Extent>& extents) {
    const auto found = stored_.find(from);
    if (found == stored_.end())
      throw CheckpointError(file_ + ": tensor " + describe(from) +
                            " is missing, expected all of a model");
    TensorView& view = found->second;
    std::vector<std::int64_t> shape;
    for (const Extent extent : extents) shape.push_back(size_of(extent));
    if (view.shape != shape)
      throw CheckpointError(view.file->name() + ": tensor " + describe(from) + " has shape " +
                            text_of(view.shape) + ", expected " + text_of(shape));
    if (llama_ && from.find(".attn_q.") != from.npos) view.rotary_heads = config_.num_heads;
    if (llama_ && from.find(".attn_k.") != from.npos) view.rotary_heads = config_.num_kv_heads;
    if (view.rotary_heads != 0 && shape.size() == 1 && block_of(view.dtype).values != 1)
      throw CheckpointError(view.file->name() + ": tensor " + describe(from) + " has type " +
                            view.dtype_name + ", expected F32, F16 or BF16 of a bias");
    if (gemma_ && from.ends_with("norm.weight")) view.added = kGemmaNormAdded;
    view.name = to;
    taken_.emplace(to, std::move(view));
    stored_.erase(found);
  }

  std::int64_t size_of(Extent extent) const {
    switch (extent) {
      case Extent::hidden:
        return config_.hidden_size;
      case Extent::vocabulary:
        return config_.vocab_size;
      case Extent::neurons:
        return config_.intermediate_size;
      case Extent::head:
        return config_.head_dim;
      case Extent::q:
        return config_.q_size();
      case Extent::kv:
        return config_.kv_size();
      case Extent::none:
        break;
    }
    return 0;
  }

  const std::string& file_;
  const bool llama_, gemma_;
  const ModelConfig& config_;
  TensorMap stored_, taken_;
};

}  // namespace

GgufModel::GgufModel(const std::filesystem::path& path) : files_(read_gguf_parts(path)) {
  TensorMap stored;
  for (const GgufFile& file : files_) {
    TensorMap more = file.tensors();
    stored.merge(more);
    if (!more.empty())  // merge() leaves the names that are already there
      throw CheckpointError(file.name() + ": tensor " + describe(more.begin()->first) +
                            " is also in " + stored.at(more.begin()->first).file->name() +
                            ", expected in one file");
  }
  GgufKeys keys(first());
  keys.check_architecture(gguf_architectures);
  if (const json total = first().value("split.tensors.count");
      !total.is_null() && total != stored.size())
    keys.fail("split.tensors.count", total, std::to_string(stored.size()) + ", the tensors found");
  if (!stored.contains("token_embd.weight"))
    throw CheckpointError(keys.file() + ": tensor \"token_embd.weight\" is missing, expected all " +
                          "of a model");
  json config = gguf_config(keys, stored);
  const json generation = generation_ids(keys, stored.at("token_embd.weight").shape[0]);
  // A config.json without these would mean the defaults of its family.
  for (const char* key : {"bos_token_id", "eos_token_id"})
    config[key] = generation.value(key, json());
  keys.refuse_unread(without_effect);
  parsed_ = parse_config(config, &generation, path);
  tensors_ = Renaming(keys, parsed_, std::move(stored)).run();
  config_ = std::make_shared<const json>(std::move(config));
  generation_ = std::make_shared<const json>(generation);
}

}  // namespace tda
