#include "weights/layout.h"

#include <tda/error.h>

#include <algorithm>

#include "checkpoint/quantization.h"

namespace tda {
namespace {

std::int64_t round_up(std::int64_t value, std::int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

/// Rows [first, first + count).
TensorView part_of(TensorView view, std::int64_t first, std::int64_t count) {
  const std::int64_t row_bytes = view.bytes / view.shape.front();
  view.shape.front() = count;
  view.begin += first * row_bytes;
  view.bytes = count * row_bytes;
  if (view.sorted)
    view.sorted = std::make_shared<const TensorView>(part_of(*view.sorted, first, count));
  return view;
}

std::span<const std::int32_t> order_of(const TensorView& view) {
  return view.quantized ? view.quantized->order() : std::span<const std::int32_t>();
}

/// Replaces tensors by their sorted ones, if all have the same order, which their x then gets.
void sort_alike(std::vector<const TensorView*>& sources) {
  const auto alike = [&](const TensorView* source) {
    return source->sorted &&
           std::ranges::equal(order_of(*source->sorted), order_of(*sources.front()->sorted));
  };
  if (std::ranges::all_of(sources, alike))
    for (const TensorView*& source : sources) source = source->sorted.get();
}

}  // namespace

/// A size that overflows can only occur while measuring: no memory is ever allocated for it.
std::byte* Layout::allocate(Size count, std::int64_t each) {
  const Size offset = used_, end = offset + count * each;
  used_ = end.rounded_up(64);
  if (!memory_) return nullptr;
  // Clears the padding, so that an engine folder's bytes depend on the checkpoint alone.
  if (!checkpoint_.packed()) std::fill(memory_ + end.value(), memory_ + used_.value(), std::byte{});
  return memory_ + offset.value();
}

void Layout::allocate(Matrix& matrix) { matrix.data = allocate(matrix.rows, matrix.row_bytes()); }

/// The FFN matrices, [F, H] each (see LayerWeights).
void Layout::allocate_neurons(LayerWeights& w, std::int64_t neurons, std::int64_t hidden) {
  for (Matrix* m : {&w.gate, &w.up, &w.down}) *m = {format_, neurons, hidden};
  if (format_ != WeightFormat::int8) {
    for (Matrix* m : {&w.gate, &w.up, &w.down}) allocate(*m);
    return;
  }
  const std::int64_t row = w.gate.row_bytes();
  w.gate.gap = w.up.gap = row;
  w.gate.data = allocate(neurons, 2 * row);
  w.up.data = w.gate.data ? w.gate.data + row : nullptr;
  allocate(w.down);
  w.down.outliers = reinterpret_cast<const Outlier*>(allocate(neurons, sizeof(Outlier)));
}

const TensorView& Layout::find(const Source& source, std::int64_t rows, std::int64_t cols) {
  const TensorView& whole = checkpoint_.tensor(source.name, {source.all ? source.all : rows, cols});
  return source.all ? parts_.emplace_back(part_of(whole, source.first, rows)) : whole;
}

Matrix Layout::bricks(WeightFormat format, const std::vector<Source>& sources,
                      const std::vector<std::int64_t>& rows, std::int64_t cols, bool in_turn,
                      bool by_block, float* lengths) {
  Matrix result{format, 0, cols};
  BrickCopy copy{{}, rows, {}, in_turn, lengths};
  for (std::size_t i = 0; i < sources.size() && !checkpoint_.packed(); ++i)
    copy.sources.push_back(&find(sources[i], rows[i], cols));
  if (format == WeightFormat::int4) {
    sort_alike(copy.sources);
    result.kind = int4_kind(copy.sources);
  }
  Size size = 0;
  for (std::int64_t n : rows) {
    result.rows += in_turn ? round_up(n, kStripRows / 2) : n;
    size = size + Size(n) * cols;
  }
  result.by_block = by_block;
  result.data = size.too_large() ? allocate(size, 2) : allocate(1, result.bytes());
  // That by block is down: its inputs are neurons, and the rows of gate and up have their order.
  if (format == WeightFormat::int4 && !by_block)
    result.input_order = input_order(checkpoint_.packed() ? nullptr : copy.sources.front(), cols);
  if (checkpoint_.packed()) return result;
  copy.target = result;
  if (memory_) brick_copies_.push_back(std::move(copy));
  return result;
}

/// Of the next matrix. Lines if its tensors had 4 bits before, as their types or samples of them
/// tell. Files that mix types gave the others more than 4 bits for a reason: these keep 8.
BrickKind Layout::int4_kind(const std::vector<const TensorView*>& sources) {
  const std::size_t i = kinds_++;
  if (checkpoint_.packed()) {
    const std::string& name = checkpoint_.packed()->matrices[i];
    const auto known = std::ranges::find(kBrickKinds, name == kOrderedLines ? "lines" : name);
    return static_cast<BrickKind>(known - std::begin(kBrickKinds));
  }
  const auto had_four = [](const TensorView* tensor) { return had_four_bits(*tensor); };
  if (std::ranges::all_of(sources, had_four)) return BrickKind::lines;
  return checkpoint_.has_four_bits() ? BrickKind::graded : BrickKind::int4;
}

/// Of the latest int4 matrix. source: any of its tensors; null if packed
std::span<const std::int32_t> Layout::input_order(const TensorView* source, std::int64_t cols) {
  const auto order = source ? order_of(*source) : std::span<const std::int32_t>();
  const bool ordered =
      source ? !order.empty() : checkpoint_.packed()->matrices[kinds_ - 1] == kOrderedLines;
  if (!ordered) return {};
  auto* const data = reinterpret_cast<std::int32_t*>(allocate(cols, 4));
  if (source && data) std::ranges::copy(order, data);
  return {data, data ? static_cast<std::size_t>(cols) : 0};
}

/// Whether int4 keeps the 4 bits of the embedding: of one that is no head, which TDA reads by input.
bool Layout::has_lines(const char* embedding) {
  const ModelConfig& config = checkpoint_.config();
  if (format_ != WeightFormat::int4) return false;
  const bool found =
      checkpoint_.packed()
          ? checkpoint_.packed()->matrices[kinds_] ==
                kBrickKinds[static_cast<int>(BrickKind::lines)]
          : !config.tied_embeddings && had_four_bits(checkpoint_.tensor(
                                           embedding, {config.vocab_size, config.hidden_size}));
  if (!found) ++kinds_;
  return found;
}

void Layout::fill(const Matrix& target, const Source& source) {
  if (checkpoint_.packed()) return;
  const TensorView& tensor = find(source, target.rows, target.cols);
  if (memory_) copies_.push_back({&tensor, target, false, nullptr});
}

void Layout::fill_transposed(const Matrix& target, const std::string& name, float* row_lengths) {
  if (checkpoint_.packed()) return;
  const TensorView& source = checkpoint_.tensor(name, {target.cols, target.rows});
  if (memory_) copies_.push_back({&source, target, true, row_lengths});
}

Matrix Layout::matrix(WeightFormat format, const std::vector<std::string>& names,
                      const std::vector<std::int64_t>& rows, std::int64_t cols) {
  if (in_bricks(format))
    return bricks(format, std::vector<Source>(names.begin(), names.end()), rows, cols);
  Matrix result{format, 0, cols};
  for (std::int64_t n : rows) result.rows += n;
  allocate(result);
  std::int64_t row = 0;
  for (std::size_t i = 0; i < names.size(); row += rows[i++]) {
    Matrix part = result;
    part.rows = rows[i];
    if (memory_) part.data = result.row(row);  // without memory no row has an address
    fill(part, names[i]);
  }
  return result;
}

std::span<const float> Layout::vector(const std::vector<std::string>& names,
                                      const std::vector<std::int64_t>& sizes) {
  std::int64_t total = 0;
  for (std::int64_t n : sizes) total += n;
  float* const data = floats(total);
  float* next = data;
  for (std::size_t i = 0; i < names.size() && !checkpoint_.packed(); ++i) {
    const TensorView& source = checkpoint_.tensor(names[i], {sizes[i]});
    if (!memory_) continue;
    const auto* bytes = reinterpret_cast<const std::byte*>(next);
    copies_.push_back({&source, {WeightFormat::f32, 1, sizes[i], bytes}, false, nullptr});
    next += sizes[i];
  }
  return {data, data ? static_cast<std::size_t>(total) : 0};
}

std::span<const float> Layout::norm(const std::string& name, std::int64_t size, float factor) {
  const std::span<const float> result = vector(name, size);
  if (memory_ && !checkpoint_.packed()) {
    copies_.back().offset = checkpoint_.config().norm_offset;
    copies_.back().factor = factor;
  }
  return result;
}

LayerWeights Layout::layer(const std::string& prefix) {
  const ModelConfig& config = checkpoint_.config();
  const std::int64_t hidden = config.hidden_size, neurons = config.intermediate_size;
  const std::string attention = prefix + "self_attn.", ffn = prefix + "mlp.";
  const auto qkv = [&](const char* kind) {
    return std::vector{attention + "q_proj." + kind, attention + "k_proj." + kind,
                       attention + "v_proj." + kind};
  };
  const std::vector qkv_rows{config.q_size(), config.kv_size(), config.kv_size()};

  LayerWeights w;
  if (config.pre_norms) w.attention_norm = norm(prefix + "input_layernorm.weight", hidden);
  w.qkv = config.fused_matrices ? matrix(attention + "qkv_proj.weight",
                                         config.q_size() + 2 * config.kv_size(), hidden)
                                : matrix(qkv("weight"), qkv_rows, hidden);
  if (config.qkv_bias) w.qkv_bias = vector(qkv("bias"), qkv_rows);
  if (config.qk_norm) {
    w.q_norm = norm(attention + "q_norm.weight", config.head_dim);
    w.k_norm = norm(attention + "k_norm.weight", config.head_dim);
  } else if (config.qk_norm_of_all_heads) {
    w.q_norm = norm(attention + "q_norm.weight", config.q_size());
    w.k_norm = norm(attention + "k_norm.weight", config.kv_size());
  }
  w.output = matrix(attention + "o_proj.weight", hidden, config.q_size());
  if (config.output_bias) w.output_bias = vector(attention + "o_proj.bias", hidden);
  // Without norms behind, the one before the feed-forward network is named after its place.
  const std::string behind = prefix + "post_attention_layernorm.weight";
  if (config.post_norms) w.attention_post_norm = norm(behind, hidden);
  if (config.pre_norms)
    w.ffn_norm =
        norm(config.post_norms ? prefix + "pre_feedforward_layernorm.weight" : behind, hidden);
  if (config.post_norms)
    w.ffn_post_norm = norm(prefix + "post_feedforward_layernorm.weight", hidden);
  float* const lengths = floats(neurons);
  const bool fused = config.fused_matrices;
  const std::string both = ffn + "gate_up_proj.weight", down = ffn + "down_proj.weight";
  const Source gate = fused ? Source(both, 0, 2 * neurons) : Source(ffn + "gate_proj.weight");
  const Source up = fused ? Source(both, neurons, 2 * neurons) : Source(ffn + "up_proj.weight");
  if (in_bricks(format_)) {
    w.gate_up = bricks(format_, {gate, up}, {neurons, neurons}, hidden, true);
    w.down = bricks(format_, {down}, {hidden}, neurons, false, true, lengths);
    if (memory_ && !checkpoint_.packed())
      brick_copies_.end()[-2].row_order = order_of(*brick_copies_.back().sources.front());
  } else {
    allocate_neurons(w, neurons, hidden);
    fill(w.gate, gate);
    fill(w.up, up);
    fill_transposed(w.down, down, lengths);
  }
  w.down_lengths = {lengths, lengths ? static_cast<std::size_t>(neurons) : 0};
  return w;
}

Model Layout::model() {
  const ModelConfig& config = checkpoint_.config();
  Model model;
  model.config = config;
  model.name = checkpoint_.name();
  model.fingerprint = checkpoint_.fingerprint();
  model.format = format_;
  model.parameters = checkpoint_.parameters();
  // The vocabulary's rows stay at 8 bits: at 4 they lose more quality than the saved bytes are
  // worth (tools/bench).
  const WeightFormat outer = format_ == WeightFormat::int4 ? WeightFormat::graded : format_;
  const auto vocabulary = [&](WeightFormat format, const char* name) {
    return matrix(format, {name}, {config.vocab_size}, config.hidden_size);
  };
  const char* const embedding = "model.embed_tokens.weight";
  model.embedding = vocabulary(has_lines(embedding) ? WeightFormat::int4 : outer, embedding);
  for (std::int64_t i = 0; i < config.num_layers; ++i)
    model.layers.push_back(layer("model.layers." + std::to_string(i) + "."));
  const std::string beyond =
      "model.layers." + std::to_string(config.num_layers) +
      (config.pre_norms ? ".input_layernorm.weight" : ".post_attention_layernorm.weight");
  if (checkpoint_.contains(beyond))
    throw CheckpointError("checkpoint " + checkpoint_.name() + ": num_hidden_layers is " +
                          std::to_string(config.num_layers) +
                          ", expected more: there is a tensor \"" + beyond + "\"");
  model.final_norm = norm("model.norm.weight", config.hidden_size, config.logit_scale);
  model.head = config.tied_embeddings ? model.embedding : vocabulary(outer, "lm_head.weight");
  model.weight_bytes = used_.value();
  return model;
}

}  // namespace tda
