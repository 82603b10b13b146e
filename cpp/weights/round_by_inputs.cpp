// How weights are rounded to int4 where the products of their inputs are known: by LDLQ, which
// gives what GPTQ gives, with scales chosen on the way.
#include <algorithm>
#include <cmath>
#include <vector>

#include "weights/brick_places.h"
#include "weights/centred.h"
#include "weights/input_factor.h"

namespace tda {
namespace {

using Lanes = float[kStripRows];  // a value of each row

/// Transposes a strip's rows to [n] in this order, in steps of the rows, and sets these.
void set_steps(const Bricks& target, std::int64_t strip, const float* values,
               const std::vector<std::int64_t>& order, Lanes* columns) {
  const std::int64_t n = target.blocks * kBlockInputs;
  for (std::int64_t r = 0; r < kStripRows; ++r) {
    const float* const row = values + r * n;
    float most = 0;
    for (std::int64_t i = 0; i < n; ++i) most = std::max(most, std::abs(row[i]));
    const float step = step_of_row(most);
    const_cast<float*>(target.steps)[strip * kStripRows + r] = most > 0 ? step : 0;
    for (std::int64_t k = 0; k < n; ++k)
      columns[k][r] = most > 0 ? row[order[k]] / most * (most / step) : 0;
  }
}

/// wanted[r] += the sum of feedback[i] * missed[i][r]
void add_missed(Lanes& wanted, const float* feedback, const Lanes* missed, std::int64_t first,
                std::int64_t end) {
  for (std::int64_t i = first; i < end; ++i)
    for (std::int64_t r = 0; r < kStripRows; ++r) wanted[r] += feedback[i] * missed[i][r];
}

/// The scales of least squared error, each square times the input's importance, for 16 values of
/// each row; 0 if none is better than zeros.
void choose_scales(const Lanes* values, const float* importance, Lanes& scales) {
  for (std::int64_t r = 0; r < kStripRows; r += 4) {
    Four groups[kScaleInputs];
    for (std::int64_t i = 0; i < kScaleInputs; ++i) groups[i] = load_four(values[i] + r);
    const auto weighted = [=](std::int64_t i, Four v) { return importance[i] * v; };
    store_four(scales + r, search_scales(groups, kAlone, weighted).scales);
  }
}

/// The codes, 0 to 15 for -8 to 7, nearest to `wanted`, and what they miss of `values`. Zeros stay.
void encode(const Lanes& values, const Lanes& wanted, const Lanes& scales, std::uint8_t* codes,
            Lanes& missed) {
  for (std::int64_t r = 0; r < kStripRows; r += 4) {
    const Four v = load_four(values + r), scale = load_four(scales + r);
    const Four nearest = codes_of(load_four(wanted + r), scale == 0 ? Four{} : 1 / scale);
    const Four code = v == 0 ? Four{} : nearest;
    store_four(missed + r, v - scale * code);
    for (int i = 0; i < 4; ++i) codes[r + i] = static_cast<std::uint8_t>(code[i] + 8);
  }
}

}  // namespace

/// From the last input of the order to the first, each weight is rounded after adding what those
/// behind it miss, times how far their inputs follow its own. Without clipping and for given scales,
/// no rule of this order has a smaller expected squared error of the product.
void round_by_inputs(const Bricks& target, std::int64_t strip, const float* values,
                     const InputFactor& inputs) {
  const std::int64_t n = inputs.n;
  std::vector<float> of_columns(n * kStripRows), of_missed(n * kStripRows);
  std::vector<std::uint8_t> codes(n * kStripRows);  // [n][64], by input
  auto* const columns = reinterpret_cast<Lanes*>(of_columns.data());
  auto* const missed = reinterpret_cast<Lanes*>(of_missed.data());
  set_steps(target, strip, values, inputs.order, columns);
  for (std::int64_t first = n - kScaleInputs; first >= 0; first -= kScaleInputs) {
    const std::int64_t end = first + kScaleInputs;
    Lanes wanted[kScaleInputs], scales;
    for (std::int64_t k = 0; k < kScaleInputs; ++k) {
      std::copy_n(columns[first + k], kStripRows, wanted[k]);
      add_missed(wanted[k], inputs.feedback.data() + (first + k) * n, missed, end, n);
    }
    choose_scales(wanted, inputs.importance.data() + first, scales);
    const std::int64_t group = inputs.order[first] / kScaleInputs;
    auto& brick = const_cast<CentredBrick&>(target.brick<CentredBrick>(strip, group / 2));
    for (std::int64_t r = 0; r < kStripRows; ++r)
      brick.scales[group % 2][r] = static_cast<std::int8_t>(scales[r]);
    for (std::int64_t k = kScaleInputs - 1; k >= 0; --k) {
      const std::int64_t i = first + k;
      add_missed(wanted[k], inputs.feedback.data() + i * n, missed, i + 1, end);
      encode(columns[i], wanted[k], scales, codes.data() + inputs.order[i] * kStripRows, missed[i]);
    }
  }
  for (std::int64_t block = 0; block < target.blocks; ++block)
    for (std::int64_t r = 0; r < kStripRows; ++r) {
      std::uint8_t row[kBlockInputs];
      for (std::int64_t i = 0; i < kBlockInputs; ++i)
        row[i] = codes[(block * kBlockInputs + i) * kStripRows + r];
      auto& brick = const_cast<CentredBrick&>(target.brick<CentredBrick>(strip, block));
      set_codes(brick.codes, r, row);
    }
}

}  // namespace tda
