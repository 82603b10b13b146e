// Packs a checkpoint into engine layout: one arena, filled by copies that run in parallel, or
// mapped.
#include <sys/mman.h>
#include <tda/error.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "checkpoint/checkpoint.h"
#include "cpu/thread_pool.h"
#include "model/half.h"
#include "model/model.h"

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
  std::int64_t bytes() const { return used_; }
  const std::vector<Copy>& copies() const { return copies_; }

 private:
  std::byte* allocate(std::int64_t bytes) {
    const std::int64_t offset = used_, end = offset + bytes;
    used_ = round_up(end, 64);
    if (!memory_) return nullptr;
    // The gap: what pack_checkpoint writes is to depend on the checkpoint alone.
    if (!checkpoint_.packed()) std::fill(memory_ + end, memory_ + used_, std::byte{});
    return memory_ + offset;
  }

  void allocate(Matrix& matrix) {
    matrix.data = allocate(matrix.rows * matrix.row_bytes());
    if (matrix.low_row_bytes()) matrix.low = allocate(matrix.rows * matrix.low_row_bytes());
  }

  /// The FFN matrices, [F, H] each; int8 and int4 rows side by side (see LayerWeights).
  void allocate_neurons(LayerWeights& w, std::int64_t neurons, std::int64_t hidden) {
    for (Matrix* m : {&w.gate, &w.up, &w.down}) *m = {format_, neurons, hidden};
    if (format_ == WeightFormat::int4) {
      const std::int64_t row = int4_row_bytes(hidden);
      const std::byte* data = allocate(neurons * 3 * row);
      for (Matrix* m : {&w.gate, &w.up, &w.down}) {
        m->data = data;
        m->gap = 2 * row;
        if (memory_) data += row;
      }
      return;
    }
    if (format_ != WeightFormat::int8) {
      for (Matrix* m : {&w.gate, &w.up, &w.down}) allocate(*m);
      return;
    }
    const std::int64_t high = high_row_bytes(hidden), low = low_row_bytes(hidden);
    const std::byte* const always = allocate(neurons * 2 * high);
    // Lines of memory that a selection reads begin with the down row's high plane.
    const std::int64_t record = round_up(high + 3 * low, 64);
    std::byte* const sometimes = allocate(neurons * record);
    if (memory_ && !checkpoint_.packed())
      for (std::int64_t j = 0; j < neurons; ++j)
        std::fill(sometimes + j * record + high + 3 * low, sometimes + (j + 1) * record,
                  std::byte{});
    const auto place = [&](Matrix& m, const std::byte* data, std::int64_t stride,
                           std::int64_t low_offset) {
      if (!memory_) return;
      m.data = data;
      m.gap = stride - high;
      m.low = sometimes + low_offset;
      m.low_gap = record - low;
    };
    place(w.down, sometimes, record, high);
    place(w.gate, always, 2 * high, high + low);
    place(w.up, always + high, 2 * high, high + 2 * low);
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
      part.data = result.row(row);
      part.low = result.low_row(row);
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

  float* floats(std::int64_t count) { return reinterpret_cast<float*>(allocate(count * 4)); }

  LayerWeights layer(const std::string& prefix);

  const Checkpoint& checkpoint_;
  const WeightFormat format_;
  std::byte* const memory_;
  std::int64_t used_ = 0;
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
  model.final_norm = vector("model.norm.weight", config.hidden_size);
  model.head = config.tied_embeddings ? model.embedding : vocabulary("lm_head.weight");
  model.weight_bytes = used_;
  return model;
}

// ---- copying ------------------------------------------------------------------------------------

constexpr std::int64_t tile = 64;  // elements; a tile of f32 is 16 KiB, half a first-level cache

/// Elements [first, first + count) of a tensor. memcpy, for its data may have any alignment.
void read_elements(const TensorView& source, std::int64_t first, std::int64_t count, float* out) {
  if (source.dtype == DType::f32) {
    std::memcpy(out, source.data + 4 * first, static_cast<std::size_t>(4 * count));
    return;
  }
  const std::byte* data = source.data + 2 * first;
  const auto half = [data](std::int64_t i) {
    std::uint16_t bits;
    std::memcpy(&bits, data + 2 * i, 2);
    return bits;
  };
  if (source.dtype == DType::f16)
    for (std::int64_t i = 0; i < count; ++i) out[i] = f16_to_f32(half(i));
  else
    for (std::int64_t i = 0; i < count; ++i) out[i] = bf16_to_f32(half(i));
}

/// Stores a row, rounded to the format. False if one of the values is not finite (any more).
bool write_row(const Matrix& target, std::int64_t row, const float* values) {
  auto* const data = const_cast<std::byte*>(target.row(row));
  const std::int64_t cols = target.cols;
  std::uint32_t overflow = 0;  // the top bit is set where an all-ones exponent carries into it
  const auto check = [&](float value) {
    overflow |= (std::bit_cast<std::uint32_t>(value) & 0x7fffffffu) + 0x00800000u;
  };
  if (target.format == WeightFormat::bf16) {
    auto* out = reinterpret_cast<std::uint16_t*>(data);
    for (std::int64_t i = 0; i < cols; ++i) {
      out[i] = f32_to_bf16(values[i]);
      check(bf16_to_f32(out[i]));
    }
    return (overflow & 0x80000000u) == 0;
  }
  for (std::int64_t i = 0; i < cols; ++i) check(values[i]);
  const bool finite = (overflow & 0x80000000u) == 0;
  if (target.format == WeightFormat::f32)
    std::memcpy(data, values, static_cast<std::size_t>(4 * cols));
  else if (finite && target.format == WeightFormat::int4)
    quantize_int4(values, cols, data);
  else if (finite)
    quantize_int8(values, cols, data, const_cast<std::byte*>(target.low_row(row)));
  return finite;
}

bool copy_rows(const Copy& copy, std::int64_t begin, std::int64_t end) {
  const std::int64_t cols = copy.target.cols;
  std::vector<float> values(cols);
  bool finite = true;
  for (std::int64_t r = begin; r < end; ++r) {
    read_elements(*copy.source, r * cols, cols, values.data());
    finite &= write_row(copy.target, r, values.data());
  }
  return finite;
}

/// Rows [begin, end), at most `tile` of them, are columns of the source, which is read `tile`
/// elements at a time, so that both sides move in whole cache lines.
bool copy_transposed(const Copy& copy, std::int64_t begin, std::int64_t end) {
  const Matrix& target = copy.target;
  std::vector<float> rows(tile * target.cols);
  float column[tile];
  for (std::int64_t c = 0; c < target.cols; ++c) {
    read_elements(*copy.source, c * target.rows + begin, end - begin, column);
    for (std::int64_t r = begin; r < end; ++r)
      rows[(r - begin) * target.cols + c] = column[r - begin];
  }
  bool finite = true;
  for (std::int64_t r = begin; r < end; ++r) {
    float* const row = rows.data() + (r - begin) * target.cols;
    finite &= write_row(target, r, row);
    if (!finite) return false;
    read_row(target, r, 0, target.cols, row);  // as stored
    double squares = 0;
    for (std::int64_t i = 0; i < target.cols; ++i) squares += double{row[i]} * row[i];
    copy.lengths[r] = static_cast<float>(std::sqrt(squares));
  }
  return finite;
}

struct WorkItem {
  std::size_t copy;
  std::int64_t begin, end;  // rows of its target
};

std::vector<WorkItem> split(const std::vector<Copy>& copies) {
  constexpr std::int64_t elements = 1 << 18;
  std::vector<WorkItem> items;
  for (std::size_t i = 0; i < copies.size(); ++i) {
    const Matrix& target = copies[i].target;
    const std::int64_t step =
        copies[i].transposed ? tile : std::max<std::int64_t>(1, elements / target.cols);
    for (std::int64_t row = 0; row < target.rows; row += step)
      items.push_back({i, row, std::min(row + step, target.rows)});
  }
  return items;
}

void run(const std::vector<Copy>& copies, ThreadPool& pool, const Progress& progress) {
  const std::vector<WorkItem> items = split(copies);
  std::vector<std::uint8_t> finite(items.size());
  const auto bytes = [&](std::int64_t first, std::int64_t last) {
    std::int64_t sum = 0;
    for (std::int64_t i = first; i < last; ++i) {
      const Matrix& target = copies[items[i].copy].target;
      sum += target.bytes() / target.rows * (items[i].end - items[i].begin);
    }
    return sum;
  };
  const std::int64_t count = std::ssize(items), total = bytes(0, count);
  const std::int64_t portion = 16 * pool.threads();  // between two reports
  std::int64_t done = 0;
  for (std::int64_t first = 0; first < count; first += portion) {
    const std::int64_t last = std::min(first + portion, count);
    pool.run(last - first, [&](std::int64_t i, int) {
      const auto [index, begin, end] = items[first + i];
      const Copy& copy = copies[index];
      finite[first + i] =
          copy.transposed ? copy_transposed(copy, begin, end) : copy_rows(copy, begin, end);
    });
    done += bytes(first, last);
    if (progress) progress(done, total);
  }
  const auto bad = std::find(finite.begin(), finite.end(), 0);
  if (bad == finite.end()) return;
  const Copy& copy = copies[items[bad - finite.begin()].copy];
  throw CheckpointError(copy.source->file + ": tensor \"" + copy.source->name +
                        "\" holds NaN or infinity as " + std::string(name_of(copy.target.format)) +
                        ", expected finite values only");
}

std::shared_ptr<std::byte> allocate_arena(std::int64_t bytes) {
  constexpr std::size_t huge_page = 2 << 20;
  const auto size = static_cast<std::size_t>(round_up(bytes, huge_page));
  void* const memory = std::aligned_alloc(huge_page, size);
  if (!memory)
    throw DeviceError("cpu: no memory for the weights, " + std::to_string(bytes) +
                      " bytes expected to be free");
#ifdef MADV_HUGEPAGE
  ::madvise(memory, size, MADV_HUGEPAGE);  // fewer page faults now, fewer TLB misses later
#endif
  return {static_cast<std::byte*>(memory), std::free};
}

/// The data stays in the file's pages, which processes share and which are read when first used.
/// Of it only the size is checked: its values were when they were packed, and looking for those
/// that are not finite would read every page.
std::shared_ptr<const Model> map_model(const Checkpoint& checkpoint, WeightFormat format) {
  const PackedWeights& packed = *checkpoint.packed();
  const std::string& file = packed.arena.file;
  if (format != WeightFormat::automatic && format != packed.format)
    throw OptionError("weights is \"" + std::string(name_of(format)) + "\", but " + file +
                      " is packed as " + std::string(name_of(packed.format)) +
                      ", expected that or auto");
  Layout measured(checkpoint, packed.format, nullptr);
  measured.model();
  if (measured.bytes() != packed.arena.bytes)
    throw CheckpointError(file + ": the arena has " + std::to_string(packed.arena.bytes) +
                          " bytes, expected " + std::to_string(measured.bytes()) +
                          " by config.json");
  Layout layout(checkpoint, packed.format, const_cast<std::byte*>(packed.arena.data));
  auto model = std::make_shared<Model>(layout.model());
  model->storage = {packed.mapping, packed.arena.data};
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
  return model;
}

}  // namespace tda
