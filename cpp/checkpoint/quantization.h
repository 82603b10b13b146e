// Linear layers that a Hugging Face folder stores quantised: what quantization_config of
// config.json says of them, and the tensors of weights that their parts stand for.
//
// With codes q, scales s and zero points z of a group of inputs, every method means
//
//   weight[r, i] = s[r, group of i] * (q[r, i] - z[r, group of i])
//
// and they differ in how they store it, for N rows, K inputs and G groups (I32 holds 8 codes of 4
// bits or 4 of 8, from the lowest bits up):
//
//   gptq        qweight I32 [K / 8, N] of inputs, qzeros I32 [G, N / 8] of rows (z - 1 in its first
//               version), scales [G, N], g_idx I32 [K], the group of each input
//   awq         qweight I32 [K, N / 8] and qzeros I32 [G, N / 8] of rows in the order 0, 2, 4, 6, 1,
//               3, 5, 7, scales [G, N]
//   compressed-tensors
//     packed    weight_packed I32 [N, K / 8] of inputs, weight_zero_point I32 [N / 8, G] of rows, if
//               any, weight_scale [N, G], weight_shape I64 [2]
//     in bytes  weight I8 [N, K] and weight_zero_point I8 [N, G], if any, less 128, weight_scale
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "checkpoint/checkpoint.h"

namespace tda {

class Object;

/// What quantization_config says.
struct Quantization {
  enum class Method { gptq, awq, compressed_tensors };
  /// group: inputs that share a scale; 0: all of them
  struct Scheme {
    std::int64_t bits, group;
    bool has_zeros;  // else z is the middle of the codes
  };
  Method method;
  std::vector<Scheme> schemes;  // one but for compressed_tensors, where layers may differ
  bool zeros_less_one = false;
};

/// nullopt without a quantization_config. Throws CheckpointError, also for what is not supported.
std::optional<Quantization> read_quantization(const Object& config);

/// Puts a tensor LAYER.weight in the place of each quantised layer's parts. Throws CheckpointError
/// if they do not fit together.
void join_quantized(TensorMap& tensors, const Quantization& quantization);

/// The weights of a quantised layer, made when they are read.
class QuantizedMatrix {
 public:
  enum class Form { gptq, awq, packed, bytes };
  struct Parts {
    Form form;
    std::int64_t bits, rows, cols, groups;
    TensorView codes, scales;  // scales: [1] if all rows share one
    std::optional<TensorView> zeros;
    bool zeros_less_one;
    std::vector<std::int32_t> group_of;  // [cols], below `groups`
    std::vector<std::int32_t> order;     // [cols] the input of each column; empty: its own number
  };
  explicit QuantizedMatrix(Parts parts);

  /// `lines` if every 32 inputs share a scale and have 4 bits, else f32.
  DType dtype() const { return dtype_; }
  std::span<const std::int32_t> order() const { return parts_.order; }
  /// The same with the inputs of a group side by side, if every 32 then are `lines`; else null.
  std::shared_ptr<const QuantizedMatrix> sorted() const;
  std::int64_t row_bytes() const { return stored_bytes(dtype_, parts_.cols); }
  /// Bytes [first, first + count) of the rows as dtype(). Throws CheckpointError.
  void read(std::int64_t first, std::int64_t count, std::byte* out) const;

  struct Contents;
  /// The parts in memory, which every read() needs: whoever reads in pieces keeps them meanwhile.
  std::shared_ptr<const Contents> contents() const;

 private:
  void make_row(const Contents& contents, std::int64_t row, const std::uint8_t* codes,
                std::byte* out) const;

  const Parts parts_;
  DType dtype_;
  mutable std::mutex mutex_;
  mutable std::weak_ptr<const Contents> contents_;
};

}  // namespace tda
