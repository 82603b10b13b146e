// Packs a checkpoint into engine layout: one arena, filled by copies that run in parallel, or
// mapped.
#include <tda/error.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <utility>

#include "base/buffer.h"
#include "base/half.h"
#include "base/size.h"
#include "base/thread_pool.h"
#include "checkpoint/checkpoint.h"
#include "weights/model.h"

namespace tda {
namespace {

std::int64_t round_up(std::int64_t value, std::int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

/// A tensor's way into the arena. Target rows are the source's, or its columns if transposed.
struct Copy {
  const TensorView* source;
  Matrix target;  // writable: the arena is ours
  bool transposed;
  float* lengths;  // [rows] L2 norms of the target's rows; null if not transposed
};

/// Lays a model out. Without memory it only measures; with it, it also yields the copies to do,
/// unless the memory holds packed weights already.
class Layout {
 public:
  Layout(const Checkpoint& checkpoint, WeightFormat format, std::byte* memory)
      : checkpoint_(checkpoint), format_(format), memory_(memory) {}

  Model model();
  Size bytes() const { return used_; }
  const std::vector<Copy>& copies() const { return copies_; }

 private:
  /// Sizes can only be too large while measuring: then there is no memory for them.
  std::byte* allocate(Size count, std::int64_t each) {
    const Size offset = used_, end = offset + count * each;
    used_ = end.rounded_up(64);
    if (!memory_) return nullptr;
    // The gap: what pack_checkpoint writes is to depend on the checkpoint alone.
    if (!checkpoint_.packed())
      std::fill(memory_ + end.value(), memory_ + used_.value(), std::byte{});
    return memory_ + offset.value();
  }

  void allocate(Matrix& matrix) {
    matrix.data = allocate(matrix.rows, matrix.row_bytes());
    if (matrix.low_row_bytes()) matrix.low = allocate(matrix.rows, matrix.low_row_bytes());
  }

  /// The FFN matrices, [F, H] each; int8 and int4 rows side by side (see LayerWeights).
  void allocate_neurons(LayerWeights& w, std::int64_t neurons, std::int64_t hidden) {
    for (Matrix* m : {&w.gate, &w.up, &w.down}) *m = {format_, neurons, hidden};
    if (format_ == WeightFormat::int8) {
      // Rows that begin at a cache line: who reads one shall read no line of another.
      allocate_records({{w.gate}, {w.up}}, neurons, 64);
      allocate_records({{w.gate, true}, {w.up, true}}, neurons, 64);
      allocate_records({{w.down}, {w.down, true}}, neurons, 64);
    } else if (format_ == WeightFormat::int4) {
      allocate_records({{w.gate}, {w.up}}, neurons, 1);
      allocate_records({{w.down}}, neurons, 1);
    } else {
      for (Matrix* m : {&w.gate, &w.up, &w.down}) allocate(*m);
      return;
    }
    w.down.outliers = reinterpret_cast<const Outlier*>(allocate(neurons, sizeof(Outlier)));
  }

  struct Plane {
    Matrix& matrix;
    bool low = false;
    std::int64_t bytes() const { return low ? matrix.low_row_bytes() : matrix.row_bytes(); }
  };

  /// Row by row what some matrices have of it, each row rounded up to `alignment`.
  void allocate_records(std::initializer_list<Plane> planes, std::int64_t rows,
                        std::int64_t alignment) {
    std::int64_t record = 0;
    for (const Plane& p : planes) record += round_up(p.bytes(), alignment);
    std::byte* at = allocate(rows, record);
    for (const Plane& p : planes) {
      (p.low ? p.matrix.low : p.matrix.data) = at;
      (p.low ? p.matrix.low_gap : p.matrix.gap) = record - p.bytes();
      if (!memory_) continue;
      const std::int64_t padded = round_up(p.bytes(), alignment);
      if (!checkpoint_.packed() && padded > p.bytes())
        for (std::int64_t r = 0; r < rows; ++r)
          std::fill(at + r * record + p.bytes(), at + r * record + padded, std::byte{});
      at += padded;
    }
  }

  void fill(const Matrix& target, const std::string& name) {
    if (checkpoint_.packed()) return;
    const TensorView& source = checkpoint_.tensor(name, {target.rows, target.cols});
    if (memory_) copies_.push_back({&source, target, false, nullptr});
  }
  void fill_transposed(const Matrix& target, const std::string& name, float* row_lengths) {
    if (checkpoint_.packed()) return;
    const TensorView& source = checkpoint_.tensor(name, {target.cols, target.rows});
    if (memory_) copies_.push_back({&source, target, true, row_lengths});
  }

  /// Tensors [n, cols] one below the other.
  Matrix matrix(const std::vector<std::string>& names, const std::vector<std::int64_t>& rows,
                std::int64_t cols) {
    return matrix(format_, names, rows, cols);
  }
  Matrix matrix(WeightFormat format, const std::vector<std::string>& names,
                const std::vector<std::int64_t>& rows, std::int64_t cols) {
    Matrix result{format, 0, cols};
    for (std::int64_t n : rows) result.rows += n;
    allocate(result);
    std::int64_t row = 0;
    for (std::size_t i = 0; i < names.size(); row += rows[i++]) {
      Matrix part = result;
      part.rows = rows[i];
      if (memory_) {  // else there is no row to point to
        part.data = result.row(row);
        part.low = result.low_row(row);
      }
      fill(part, names[i]);
    }
    return result;
  }
  Matrix matrix(const std::string& name, std::int64_t rows, std::int64_t cols) {
    return matrix(std::vector{name}, {rows}, cols);
  }

  /// Tensors [n] one after the other, as f32.
  std::span<const float> vector(const std::vector<std::string>& names,
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
  std::span<const float> vector(const std::string& name, std::int64_t size) {
    return vector(std::vector{name}, {size});
  }

  float* floats(std::int64_t count) { return reinterpret_cast<float*>(allocate(count, 4)); }

  LayerWeights layer(const std::string& prefix);

  const Checkpoint& checkpoint_;
  const WeightFormat format_;
  std::byte* const memory_;
  Size used_ = 0;
  std::vector<Copy> copies_;
};

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
  w.attention_norm = vector(prefix + "input_layernorm.weight", hidden);
  w.qkv = matrix(qkv("weight"), qkv_rows, hidden);
  if (config.qkv_bias) w.qkv_bias = vector(qkv("bias"), qkv_rows);
  if (config.qk_norm) {
    w.q_norm = vector(attention + "q_norm.weight", config.head_dim);
    w.k_norm = vector(attention + "k_norm.weight", config.head_dim);
  }
  w.output = matrix(attention + "o_proj.weight", hidden, config.q_size());
  if (config.output_bias) w.output_bias = vector(attention + "o_proj.bias", hidden);
  w.ffn_norm = vector(prefix + "post_attention_layernorm.weight", hidden);
  float* const lengths = floats(neurons);
  allocate_neurons(w, neurons, hidden);
  fill(w.gate, ffn + "gate_proj.weight");
  fill(w.up, ffn + "up_proj.weight");
  fill_transposed(w.down, ffn + "down_proj.weight", lengths);
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
  // 4 bits would cost the vocabulary's rows more quality than they save bytes (tools/bench).
  const WeightFormat outer = format_ == WeightFormat::int4 ? WeightFormat::int8 : format_;
  const auto vocabulary = [&](const char* name) {
    return matrix(outer, {name}, {config.vocab_size}, config.hidden_size);
  };
  model.embedding = vocabulary("model.embed_tokens.weight");
  for (std::int64_t i = 0; i < config.num_layers; ++i)
    model.layers.push_back(layer("model.layers." + std::to_string(i) + "."));
  const std::string beyond =
      "model.layers." + std::to_string(config.num_layers) + ".input_layernorm.weight";
  if (checkpoint_.contains(beyond))
    throw CheckpointError("checkpoint " + checkpoint_.name() + ": num_hidden_layers is " +
                          std::to_string(config.num_layers) +
                          ", expected more: there is a tensor \"" + beyond + "\"");
  model.final_norm = vector("model.norm.weight", config.hidden_size);
  model.head = config.tied_embeddings ? model.embedding : vocabulary("lm_head.weight");
  model.weight_bytes = used_.value();
  return model;
}

// ---- copying ------------------------------------------------------------------------------------

constexpr std::int64_t tile = 64;  // elements; a tile of f32 is 16 KiB, half a first-level cache

std::int64_t element_bytes(const TensorView& tensor) { return tensor.dtype == DType::f32 ? 4 : 2; }

/// memcpy, for data may have any alignment.
void to_f32(DType dtype, const std::byte* data, std::int64_t count, float* out) {
  if (dtype == DType::f32) {
    std::memcpy(out, data, static_cast<std::size_t>(4 * count));
    return;
  }
  const auto half = [data](std::int64_t i) {
    std::uint16_t bits;
    std::memcpy(&bits, data + 2 * i, 2);
    return bits;
  };
  if (dtype == DType::f16)
    for (std::int64_t i = 0; i < count; ++i) out[i] = f16_to_f32(half(i));
  else
    for (std::int64_t i = 0; i < count; ++i) out[i] = bf16_to_f32(half(i));
}

/// Takes a row's largest value out of it if it is so much larger than all others of its group that
/// these would be left with few of the codes, or none. In a few neurons, those that make the
/// residual stream's massive activations and take them back, what such a value rounds away counts
/// as much as all other rounding of the model together (tools/bench/RESULTS-cpu.md).
Outlier take_outlier(float* values, std::int64_t cols) {
  constexpr float kTimes = 8;
  constexpr std::int64_t kTogether = kGroup / kInt8Scales;
  const auto size = [](float a, float b) { return std::abs(a) < std::abs(b); };
  float* const largest = std::max_element(values, values + cols, size);
  const std::int64_t column = largest - values, first = column / kTogether * kTogether;
  float* const end = values + std::min(first + kTogether, cols);
  const float value = std::exchange(*largest, 0.0f);
  const float next = std::abs(*std::max_element(values + first, end, size));
  if (next > 0 && std::isfinite(value) && std::abs(value) > kTimes * next)
    return {static_cast<std::int32_t>(column), value};
  *largest = value;
  return {0, 0.0f};
}

enum class Written { well, not_finite, not_compressed };

/// Stores a row, rounded to the format; `values` are not needed any more.
Written write_row(const Matrix& target, std::int64_t row, float* values) {
  if (target.outliers)
    const_cast<Outlier&>(target.outliers[row]) = take_outlier(values, target.cols);
  auto* const data = const_cast<std::byte*>(target.row(row));
  const std::int64_t cols = target.cols;
  std::uint32_t overflow = 0;  // the top bit is set where an all-ones exponent carries into it
  const auto check = [&](float value) {
    overflow |= (std::bit_cast<std::uint32_t>(value) & 0x7fffffffu) + 0x00800000u;
  };
  const bool as_bf16 = target.format == WeightFormat::bf16 || target.format == WeightFormat::bf16c;
  std::vector<std::uint16_t> halves(target.format == WeightFormat::bf16c ? cols : 0);
  auto* const rounded = halves.empty() ? reinterpret_cast<std::uint16_t*>(data) : halves.data();
  for (std::int64_t i = 0; i < cols; ++i) {
    if (as_bf16) rounded[i] = f32_to_bf16(values[i]);
    check(as_bf16 ? bf16_to_f32(rounded[i]) : values[i]);
  }
  if ((overflow & 0x80000000u) != 0) return Written::not_finite;
  switch (target.format) {
    case WeightFormat::f32:
      std::memcpy(data, values, static_cast<std::size_t>(4 * cols));
      break;
    case WeightFormat::bf16c:
      if (!compress_bf16(rounded, cols, data)) return Written::not_compressed;
      break;
    case WeightFormat::int4:
      quantize_int4(values, cols, data);
      break;
    case WeightFormat::int8:
      quantize_int8(values, cols, data, const_cast<std::byte*>(target.low_row(row)));
      break;
    default:
      break;
  }
  return Written::well;
}

/// Writes a row of the copy's target, or says why that is not possible.
void write_row(const Copy& copy, std::int64_t row, float* values) {
  const Written written = write_row(copy.target, row, values);
  if (written == Written::well) return;
  const std::string tensor = copy.source->file->name() + ": tensor \"" + copy.source->name + "\"";
  if (written == Written::not_finite)
    throw CheckpointError(tensor + " holds NaN or infinity as " +
                          std::string(name_of(copy.target.format)) +
                          ", expected finite values only");
  throw CheckpointError(tensor + " has more values that bf16c has no code for than fit beside " +
                        (copy.transposed ? "column " : "row ") + std::to_string(row) +
                        ", expected at most " + std::to_string(apart_of(copy.target.cols)) +
                        "; use bf16");
}

void copy_rows(const Copy& copy, std::int64_t begin, std::int64_t end) {
  const std::int64_t cols = copy.target.cols, row_bytes = cols * element_bytes(*copy.source);
  std::vector<std::byte> data((end - begin) * row_bytes);
  copy.source->read(begin * row_bytes, std::ssize(data), data.data());
  std::vector<float> values(cols);
  for (std::int64_t r = begin; r < end; ++r) {
    to_f32(copy.source->dtype, data.data() + (r - begin) * row_bytes, cols, values.data());
    write_row(copy, r, values.data());
  }
}

/// Rows [begin, end), at most `tile` of them, are columns of the source, all of whose `data` is
/// read `tile` elements at a time, so that both sides move in whole cache lines.
void copy_transposed(const Copy& copy, const std::byte* data, std::int64_t begin,
                     std::int64_t end) {
  const Matrix& target = copy.target;
  const std::int64_t size = element_bytes(*copy.source);
  std::vector<float> rows((end - begin) * target.cols);
  float column[tile];
  for (std::int64_t c = 0; c < target.cols; ++c) {
    to_f32(copy.source->dtype, data + (c * target.rows + begin) * size, end - begin, column);
    for (std::int64_t r = begin; r < end; ++r)
      rows[(r - begin) * target.cols + c] = column[r - begin];
  }
  for (std::int64_t r = begin; r < end; ++r) {
    float* const row = rows.data() + (r - begin) * target.cols;
    write_row(copy, r, row);
    read_row(target, r, 0, target.cols, row);  // as stored
    double squares = 0;
    for (std::int64_t i = 0; i < target.cols; ++i) squares += double{row[i]} * row[i];
    copy.lengths[r] = static_cast<float>(std::sqrt(squares));
  }
}

/// body(begin, end) for [0, n) in parts of `step` on the pool. `report(end)`, now and then, says
/// that all before `end` is done. Throws what the first part that failed has thrown.
template <class Body, class Report>
void in_parts(ThreadPool& pool, std::int64_t n, std::int64_t step, const Body& body,
              const Report& report) {
  const std::int64_t portion = 16 * pool.threads();  // parts between two reports
  std::vector<std::exception_ptr> errors(portion);
  for (std::int64_t first = 0; first < n; first += portion * step) {
    const std::int64_t last = std::min(first + portion * step, n);
    pool.run((last - first + step - 1) / step, [&](std::int64_t i, int) {
      try {
        const std::int64_t begin = first + i * step;
        body(begin, std::min(begin + step, last));
      } catch (...) {
        errors[i] = std::current_exception();
      }
    });
    for (const std::exception_ptr& error : errors)
      if (error) std::rethrow_exception(error);
    report(last);
  }
}

void run(const std::vector<Copy>& copies, ThreadPool& pool, const Progress& progress) {
  constexpr std::int64_t part_elements = 1 << 18;
  std::int64_t done = 0, total = 0;
  for (const Copy& copy : copies) total += copy.target.bytes();
  Buffer<std::byte> whole;  // the source of a transposed copy
  for (const Copy& copy : copies) {
    const TensorView& source = *copy.source;
    const Matrix& target = copy.target;
    const auto report = [&](std::int64_t rows) {
      if (progress) progress(done + target.bytes() / target.rows * rows, total);
    };
    if (copy.transposed) {
      std::byte* const data = whole.reserve(source.bytes, "a tensor that is transposed");
      const auto read = [&](std::int64_t begin, std::int64_t end) {
        source.read(begin, end - begin, data + begin);
      };
      in_parts(pool, source.bytes, part_elements, read, [](std::int64_t) {});
      const auto body = [&](std::int64_t begin, std::int64_t end) {
        copy_transposed(copy, data, begin, end);
      };
      in_parts(pool, target.rows, tile, body, report);
    } else {
      const auto body = [&](std::int64_t begin, std::int64_t end) { copy_rows(copy, begin, end); };
      in_parts(pool, target.rows, std::max<std::int64_t>(1, part_elements / target.cols), body,
               report);
    }
    done += target.bytes();
  }
}

std::shared_ptr<std::byte> allocate_arena(Size bytes) {
  constexpr std::int64_t huge_page = 2 << 20;
  const Size padded = bytes.rounded_up(huge_page);
  const auto size = static_cast<std::size_t>(padded.value());
  void* const memory = padded.too_large() ? nullptr : std::aligned_alloc(huge_page, size);
  if (!memory)
    throw DeviceError("cpu: no memory for the weights, " + std::to_string(bytes.value()) +
                      " bytes expected to be free");
  advise_huge_pages(memory, padded.value());
  return {static_cast<std::byte*>(memory), std::free};
}

/// Of all down rows; their columns are checked, for kernels will write there.
void list_outliers(Model& model) {
  for (std::size_t l = 0; l < model.layers.size(); ++l) {
    LayerWeights& layer = model.layers[l];
    const Matrix& down = layer.down;
    for (std::int64_t j = 0; down.outliers && j < down.rows; ++j) {
      const Outlier& outlier = down.outliers[j];
      if (outlier.value == 0) continue;
      if (outlier.column < 0 || outlier.column >= down.cols)
        throw CheckpointError(model.name + ": layer " + std::to_string(l) + ", neuron " +
                              std::to_string(j) + " has an outlier in column " +
                              std::to_string(outlier.column) + ", expected 0 to " +
                              std::to_string(down.cols - 1));
      layer.outlier_neurons.push_back(static_cast<std::int32_t>(j));
    }
  }
}

/// The data stays in the file's pages, which processes share and which are read when first used.
/// Of it only the size is checked: its values were when they were packed, and looking for those
/// that are not finite would read every page.
std::shared_ptr<const Model> map_model(const Checkpoint& checkpoint, WeightFormat format) {
  const PackedWeights& packed = *checkpoint.packed();
  const std::string& file = packed.arena.file->name();
  if (format != WeightFormat::automatic && format != packed.format)
    throw OptionError("weights is \"" + std::string(name_of(format)) + "\", but " + file +
                      " is packed as " + std::string(name_of(packed.format)) +
                      ", expected that or auto");
  Layout measured(checkpoint, packed.format, nullptr);
  measured.model();
  const std::int64_t expected = measured.bytes().value();
  if (expected != packed.arena.bytes)
    throw CheckpointError(file + ": the arena has " + std::to_string(packed.arena.bytes) +
                          " bytes, expected " + std::to_string(expected) + " by config.json");
  Layout layout(checkpoint, packed.format, const_cast<std::byte*>(packed.data.get()));
  auto model = std::make_shared<Model>(layout.model());
  model->storage = packed.data;
  list_outliers(*model);
  return model;
}

}  // namespace

std::shared_ptr<const Model> load_model(const Checkpoint& checkpoint, WeightFormat format,
                                        int threads, const Progress& progress) {
  if (checkpoint.packed()) return map_model(checkpoint, format);
  ThreadPool pool(threads);
  if (format == WeightFormat::automatic) format = checkpoint.natural_format();

  Layout measured(checkpoint, format, nullptr);
  measured.model();
  const std::shared_ptr<std::byte> arena = allocate_arena(measured.bytes());
  Layout layout(checkpoint, format, arena.get());
  auto model = std::make_shared<Model>(layout.model());
  model->storage = arena;
  run(layout.copies(), pool, progress);
  list_outliers(*model);
  return model;
}

}  // namespace tda
