// Where each weight lies in a model's arena.
#pragma once

#include <deque>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/size.h"
#include "checkpoint/checkpoint.h"
#include "weights/copy.h"
#include "weights/model.h"

namespace tda {

/// Places a model's weights in one arena, in the order in which a forward pass reads them. Without
/// memory it only measures. With memory it also lists the copies that fill it, unless the
/// checkpoint is packed and the memory holds the weights already.
class Layout {
 public:
  Layout(const Checkpoint& checkpoint, WeightFormat format, std::byte* memory)
      : checkpoint_(checkpoint), format_(format), memory_(memory) {}

  Model model();
  Size bytes() const { return used_; }
  const std::vector<Copy>& copies() const { return copies_; }
  const std::vector<BrickCopy>& brick_copies() const { return brick_copies_; }

 private:
  /// A tensor, or a part of one of `all` rows, from row `first` on.
  struct Source {
    Source(std::string tensor, std::int64_t from = 0, std::int64_t of = 0)
        : name(std::move(tensor)), first(from), all(of) {}
    std::string name;
    std::int64_t first, all;  // 0: the whole tensor
  };
  const TensorView& find(const Source& source, std::int64_t rows, std::int64_t cols);

  std::byte* allocate(Size count, std::int64_t each);
  void allocate(Matrix& matrix);
  void allocate_neurons(LayerWeights& w, std::int64_t neurons, std::int64_t hidden);
  float* floats(std::int64_t count) { return reinterpret_cast<float*>(allocate(count, 4)); }

  /// A matrix in bricks of the tensors' rows, one tensor after the other or, `in_turn`, 32 of each.
  Matrix bricks(WeightFormat format, const std::vector<Source>& sources,
                const std::vector<std::int64_t>& rows, std::int64_t cols, bool in_turn = false,
                bool by_block = false, float* lengths = nullptr);
  BrickKind int4_kind(const std::vector<const TensorView*>& sources);
  std::span<const std::int32_t> input_order(const TensorView* source, std::int64_t cols);
  bool has_lines(const char* embedding);
  void fill(const Matrix& target, const Source& source);
  void fill_transposed(const Matrix& target, const std::string& name, float* row_lengths);

  /// One matrix of the tensors' rows, one tensor after the other. rows: of each tensor
  Matrix matrix(WeightFormat format, const std::vector<std::string>& names,
                const std::vector<std::int64_t>& rows, std::int64_t cols);
  Matrix matrix(const std::vector<std::string>& names, const std::vector<std::int64_t>& rows,
                std::int64_t cols) {
    return matrix(format_, names, rows, cols);
  }
  Matrix matrix(const std::string& name, std::int64_t rows, std::int64_t cols) {
    return matrix(std::vector{name}, {rows}, cols);
  }
  /// The tensors' values one after the other, as f32. sizes: of each tensor
  std::span<const float> vector(const std::vector<std::string>& names,
                                const std::vector<std::int64_t>& sizes);
  std::span<const float> vector(const std::string& name, std::int64_t size) {
    return vector(std::vector{name}, {size});
  }
  /// A norm's weights as they are multiplied with: with the family's offset, then times `factor`.
  std::span<const float> norm(const std::string& name, std::int64_t size, float factor = 1);
  LayerWeights layer(const std::string& prefix);

  const Checkpoint& checkpoint_;
  const WeightFormat format_;
  std::byte* const memory_;
  Size used_ = 0;
  std::deque<TensorView> parts_;  // of tensors
  std::size_t kinds_ = 0;         // of int4 matrices so far, and of the embedding
  std::vector<Copy> copies_;
  std::vector<BrickCopy> brick_copies_;
};

}  // namespace tda
