#include "weights/copy.h"

#include <tda/error.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <exception>
#include <utility>

#include "base/buffer.h"
#include "base/half.h"
#include "checkpoint/ggml_types.h"

namespace tda {
namespace {

/// Removes a row's largest value if it is so much larger than the rest of its group that the
/// group's scale would leave the others few codes or none. A few neurons have such a value: they
/// write and cancel the residual stream's massive activations, and rounding it costs as much as all
/// other rounding of the model together (docs/notebook/2026-11-26-weight-formats.md).
Outlier take_outlier(float* values, std::int64_t cols) {
  constexpr float kRatio = 8;
  constexpr std::int64_t kScaleGroup = kGroup / kInt8Scales;
  const auto size = [](float a, float b) { return std::abs(a) < std::abs(b); };
  float* const largest = std::max_element(values, values + cols, size);
  const std::int64_t column = largest - values, first = column / kScaleGroup * kScaleGroup;
  float* const end = values + std::min(first + kScaleGroup, cols);
  const float value = std::exchange(*largest, 0.0f);
  const float next = std::abs(*std::max_element(values + first, end, size));
  if (next > 0 && std::isfinite(value) && std::abs(value) > kRatio * next)
    return {static_cast<std::int32_t>(column), value};
  *largest = value;
  return {0, 0.0f};
}

/// Sets the top bit for NaN and infinity, whose exponents of all ones carry into it.
std::uint32_t overflow_of(float value) {
  return (std::bit_cast<std::uint32_t>(value) & 0x7fffffffu) + 0x00800000u;
}

bool all_finite(const float* values, std::int64_t count) {
  std::uint32_t overflow = 0;
  for (std::int64_t i = 0; i < count; ++i) overflow |= overflow_of(values[i]);
  return (overflow & 0x80000000u) == 0;
}

enum class Stored { ok, not_finite, not_compressible };

/// Stores a row in the target's format. Overwrites `values`.
Stored store_row(const Matrix& target, std::int64_t row, float* values) {
  if (target.outliers)
    const_cast<Outlier&>(target.outliers[row]) = take_outlier(values, target.cols);
  auto* const data = const_cast<std::byte*>(target.row(row));
  const std::int64_t cols = target.cols;
  std::uint32_t overflow = 0;
  const bool as_bf16 = target.format == WeightFormat::bf16 || target.format == WeightFormat::bf16c;
  std::vector<std::uint16_t> halves(target.format == WeightFormat::bf16c ? cols : 0);
  auto* const rounded = halves.empty() ? reinterpret_cast<std::uint16_t*>(data) : halves.data();
  for (std::int64_t i = 0; i < cols; ++i) {
    if (as_bf16) rounded[i] = f32_to_bf16(values[i]);
    overflow |= overflow_of(as_bf16 ? bf16_to_f32(rounded[i]) : values[i]);
  }
  if ((overflow & 0x80000000u) != 0) return Stored::not_finite;
  switch (target.format) {
    case WeightFormat::f32:
      std::memcpy(data, values, static_cast<std::size_t>(4 * cols));
      break;
    case WeightFormat::bf16c:
      if (!compress_bf16(rounded, cols, data)) return Stored::not_compressible;
      break;
    case WeightFormat::int8:
      quantize_int8(values, cols, data);
      break;
    default:
      break;
  }
  return Stored::ok;
}

CheckpointError not_finite(const TensorView& tensor, WeightFormat format) {
  return CheckpointError(tensor.file->name() + ": tensor \"" + tensor.name +
                         "\" holds NaN or infinity as " + std::string(name_of(format)) +
                         ", expected finite values only");
}

/// The same for a copy. Throws CheckpointError naming the tensor.
void store_row(const Copy& copy, std::int64_t row, float* values) {
  const Stored stored = store_row(copy.target, row, values);
  if (stored == Stored::ok) return;
  const std::string tensor = copy.source->file->name() + ": tensor \"" + copy.source->name + "\"";
  if (stored == Stored::not_finite) throw not_finite(*copy.source, copy.target.format);
  throw CheckpointError(tensor + ": " + (copy.transposed ? "column " : "row ") +
                        std::to_string(row) + " has more than " +
                        std::to_string(bf16c_exceptions(copy.target.cols)) +
                        " values whose upper byte is not among its 15 most frequent ones, the "
                        "most that bf16c can store; use bf16");
}

void copy_rows(const Copy& copy, std::int64_t begin, std::int64_t end) {
  const DType dtype = copy.source->dtype;
  const std::int64_t cols = copy.target.cols, row_bytes = stored_bytes(dtype, cols);
  std::vector<std::byte> data((end - begin) * row_bytes);
  copy.source->read_rows(begin, end - begin, data.data());
  std::vector<float> values(cols);
  for (std::int64_t r = begin; r < end; ++r) {
    dequantize(dtype, data.data() + (r - begin) * row_bytes, cols, values.data());
    const float offset = copy.offset - copy.source->added;
    if (offset != 0 || copy.factor != 1)
      for (float& value : values) value = (value + offset) * copy.factor;
    store_row(copy, r, values.data());
  }
}

/// Columns transposed at a time, in elements: 64, or a block of the source. A tile of f32 is 16 KiB,
/// half an L1 data cache.
std::int64_t tile_of(const TensorView& source) {
  return std::max<std::int64_t>(64, block_of(source.dtype).values);
}

/// Writes target rows [begin, end), at most a tile, which are columns of the source. Reads a tile's
/// elements of each source row at a time, so that both sides move whole cache lines. data: all of
/// the source
void copy_transposed(const Copy& copy, const std::byte* data, std::int64_t begin,
                     std::int64_t end) {
  const Matrix& target = copy.target;
  const DType dtype = copy.source->dtype;
  std::vector<float> rows((end - begin) * target.cols), column(end - begin);
  for (std::int64_t c = 0; c < target.cols; ++c) {
    dequantize(dtype, data + stored_bytes(dtype, c * target.rows + begin), end - begin,
               column.data());
    for (std::int64_t r = begin; r < end; ++r)
      rows[(r - begin) * target.cols + c] = column[r - begin];
  }
  for (std::int64_t r = begin; r < end; ++r) {
    float* const row = rows.data() + (r - begin) * target.cols;
    store_row(copy, r, row);
    read_row(target, r, 0, target.cols, row);  // with the format's rounding
    double squares = 0;
    for (std::int64_t i = 0; i < target.cols; ++i) squares += double{row[i]} * row[i];
    copy.lengths[r] = static_cast<float>(std::sqrt(squares));
  }
}

// ---- bricks -------------------------------------------------------------------------------------

/// A tensor and a row of it; no tensor where the matrix pads.
struct RowSource {
  const TensorView* tensor;
  std::int64_t row;
};
RowSource source_of(const BrickCopy& copy, std::int64_t row) {
  constexpr std::int64_t kTurn = kStripRows / 2;
  const std::int64_t sources = std::ssize(copy.sources);
  if (copy.in_turn) {
    const std::int64_t turn = row / kTurn, i = turn % sources;
    const std::int64_t at = turn / sources * kTurn + row % kTurn;
    if (at >= copy.rows[i]) return {nullptr, at};
    return {copy.sources[i], copy.row_order.empty() ? at : copy.row_order[at]};
  }
  for (std::int64_t i = 0; i < sources; row -= copy.rows[i++])
    if (row < copy.rows[i]) return {copy.sources[i], row};
  return {nullptr, 0};
}

/// Calls body(row of the strip, tensor, its data there) for the rows that do not pad. Rows that are
/// neighbours in their tensor are read together.
template <class Body>
void each_row(const BrickCopy& copy, std::int64_t strip, const Body& body) {
  std::vector<std::byte> data;
  for (std::int64_t r = 0, count = 1; r < kStripRows; r += count) {
    const RowSource from = source_of(copy, strip * kStripRows + r);
    count = 1;
    if (!from.tensor) continue;
    const auto follows = [&](std::int64_t n) {
      const RowSource next = source_of(copy, strip * kStripRows + r + n);
      return next.tensor == from.tensor && next.row == from.row + n;
    };
    while (r + count < kStripRows && follows(count)) ++count;
    const std::int64_t row_bytes = stored_bytes(from.tensor->dtype, copy.target.cols);
    data.resize(count * row_bytes);
    from.tensor->read_rows(from.row, count, data.data());
    for (std::int64_t i = 0; i < count; ++i) body(r + i, *from.tensor, data.data() + i * row_bytes);
  }
}

/// Stores rows that have 4 bits in the file, with the codes that they have there.
void copy_lines(const BrickCopy& copy, std::int64_t strip) {
  const Bricks target = copy.target.bricks();
  std::vector<LineGroup> groups(kStripRows * target.blocks);
  each_row(copy, strip, [&](std::int64_t r, const TensorView& tensor, const std::byte* data) {
    for (std::int64_t b = 0; b < target.blocks; ++b) {
      LineGroup& group = groups[r * target.blocks + b];
      four_bit_groups(tensor.dtype, data, b, group.codes, group.scale, group.minimum);
      if (!std::isfinite(group.scale) || !std::isfinite(group.minimum))
        throw not_finite(tensor, copy.target.format);
    }
  });
  store_lines(target, strip, groups.data());
}

void copy_strip(const BrickCopy& copy, std::int64_t strip, const InputFactor* inputs) {
  const auto has_codes = [](const TensorView* tensor) { return has_four_bits(tensor->dtype); };
  if (copy.target.kind == BrickKind::lines && std::ranges::all_of(copy.sources, has_codes))
    return copy_lines(copy, strip);
  const Bricks target = copy.target.bricks();
  const std::int64_t stride = target.blocks * kBlockInputs;
  std::vector<float> values(kStripRows * stride);
  each_row(copy, strip, [&](std::int64_t r, const TensorView& tensor, const std::byte* data) {
    float* const row = values.data() + r * stride;
    dequantize(tensor.dtype, data, target.cols, row);
    if (!all_finite(row, target.cols)) throw not_finite(tensor, copy.target.format);
  });
  quantize_bricks(target, strip, values.data(), inputs);
}

void measure_block(const BrickCopy& copy, std::int64_t block) {
  const Bricks target = copy.target.bricks();
  if (target.has_rests()) measure_rests(target, block, block + 1);
  if (!copy.lengths) return;
  float lengths[kBlockInputs];
  measure_columns(target, block, lengths);
  const std::int64_t first = block * kBlockInputs;
  std::copy_n(lengths, std::min(kBlockInputs, target.cols - first), copy.lengths + first);
}

/// Runs body(begin, end) over [0, n) in parts of `step` on the pool. Calls report(end) from time to
/// time, when everything before `end` is done. Rethrows the error of the first part that failed.
template <class Body, class Report>
void in_parts(ThreadPool& pool, std::int64_t n, std::int64_t step, const Body& body,
              const Report& report) {
  const std::int64_t portion = 16 * pool.threads();  // parts between reports
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

}  // namespace

bool had_four_bits(const TensorView& tensor) {
  constexpr std::int64_t kRows = 8;
  if (block_of(tensor.dtype).values > 1) return has_four_bits(tensor.dtype);
  const std::int64_t rows = tensor.shape[0], cols = tensor.shape[1];
  std::vector<float> row(cols);
  std::vector<std::byte> data(stored_bytes(tensor.dtype, cols));
  std::int64_t groups = 0;
  const std::shared_ptr<const void> kept = tensor.keep();
  for (std::int64_t k = 0; k < std::min(kRows, rows); ++k) {
    tensor.read_rows(k * rows / std::min(kRows, rows), 1, data.data());
    dequantize(tensor.dtype, data.data(), cols, row.data());
    for (std::int64_t first = 0; first + kBlockInputs <= cols; first += kBlockInputs, ++groups)
      if (!on_a_line(row.data() + first)) return false;
  }
  return groups > 0;
}

void run_copies(const std::vector<Copy>& copies, const std::vector<BrickCopy>& bricks,
                ThreadPool& pool, const Progress& progress, const FactorOf& factor_of) {
  constexpr std::int64_t kPartElements = 1 << 18, kPartBytes = 1 << 21;
  std::int64_t done = 0, total = 0;
  for (const Copy& copy : copies) total += copy.target.bytes();
  for (const BrickCopy& copy : bricks) total += copy.target.bytes();
  for (const BrickCopy& copy : bricks) {
    const Bricks target = copy.target.bricks();
    const auto report = [&](std::int64_t strips) {
      if (progress) progress(done + copy.target.bytes() / target.strips * strips, total);
    };
    const InputFactor* const inputs = factor_of(copy.target);
    const auto strips = [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t s = begin; s < end; ++s) copy_strip(copy, s, inputs);
    };
    std::vector<std::shared_ptr<const void>> kept;
    for (const TensorView* source : copy.sources) kept.push_back(source->keep());
    auto* const memory = const_cast<std::byte*>(copy.target.data);
    const auto clear = [&](std::int64_t begin, std::int64_t end) {
      std::fill(memory + begin, memory + end, std::byte{});
    };
    in_parts(pool, copy.target.bytes(), kPartBytes, clear, [](std::int64_t) {});
    in_parts(pool, target.strips, 1, strips, report);
    const auto block = [&](std::int64_t b, std::int64_t) { measure_block(copy, b); };
    in_parts(pool, target.blocks, 1, block, [](std::int64_t) {});
    done += copy.target.bytes();
  }
  Buffer<std::byte> whole;  // the source of a transposed copy
  for (const Copy& copy : copies) {
    const TensorView& source = *copy.source;
    const Matrix& target = copy.target;
    const std::shared_ptr<const void> kept = source.keep();
    const auto report = [&](std::int64_t rows) {
      if (progress) progress(done + target.bytes() / target.rows * rows, total);
    };
    if (copy.transposed) {
      std::byte* const data = whole.reserve(source.bytes, "a tensor to transpose");
      const auto read = [&](std::int64_t begin, std::int64_t end) {
        source.read(begin, end - begin, data + begin);
      };
      in_parts(pool, source.bytes, kPartElements, read, [](std::int64_t) {});
      const auto body = [&](std::int64_t begin, std::int64_t end) {
        copy_transposed(copy, data, begin, end);
      };
      in_parts(pool, target.rows, tile_of(source), body, report);
    } else {
      const auto body = [&](std::int64_t begin, std::int64_t end) { copy_rows(copy, begin, end); };
      // A few parts per thread, or small matrices would leave threads idle.
      const std::int64_t rows =
          std::min(kPartElements / target.cols, target.rows / (4 * pool.threads()));
      in_parts(pool, target.rows, std::max<std::int64_t>(1, rows), body, report);
    }
    done += target.bytes();
  }
}

}  // namespace tda
