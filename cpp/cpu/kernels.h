// The compute kernels of the CPU backend: one table of functions per instruction set.
//
// Activations of a step are stored in panels: token t is lane t % P of panel t / P, and a panel of
// vectors of length n is [n, P] f32. For prefill P is Kernels::panel: tokens fill the vector lanes,
// and one weight is broadcast to all of them. For decode P is 1, a row. If the instruction set has
// dot products of bytes or bf16, activations are first converted to these: see `prepare`.
#pragma once

#include <tda/model_config.h>

#include <cstddef>
#include <cstdint>

namespace tda {

/// Weight rows (or keys, or values) that prefill kernels convert together, and so the smallest
/// useful task.
inline constexpr std::int64_t kBlockRows = 48;
/// Rows or neurons that decode kernels process together; calls of whole batches are the fastest.
inline constexpr std::int64_t kDecodeBatch = 16;
/// The maximum number of keys of one `attend` call.
inline constexpr std::int64_t kAttendKeys = 128;

/// Panels `stride` floats apart.
struct Panels {
  float* data;
  std::int64_t stride;
};
struct ConstPanels {
  const float* data;
  std::int64_t stride;
};

/// The output of PanelKernels::prepare or, if the format has none, the panels themselves; `stride`
/// bytes apart.
struct PreparedPanels {
  const void* data;
  std::int64_t stride;

  PreparedPanels(const void* prepared, std::int64_t bytes) : data(prepared), stride(bytes) {}
  PreparedPanels(ConstPanels panels) : data(panels.data), stride(panels.stride * 4) {}
  PreparedPanels from(std::int64_t panel) const {
    return {static_cast<const std::byte*>(data) + panel * stride, stride};
  }
};

/// Weight rows of n values each, from some row on. For int8 and bf16c `stride` is the number of
/// bytes from row to row; rows of f32 and bf16 are contiguous.
struct Rows {
  const std::byte* data;
  std::int64_t n;
  std::int64_t stride = 0;
};

/// A layer's feed-forward rows: row j of the three is neuron j.
struct NeuronRows {
  Rows gate, up, down;
};

/// What this thread reads after a kernel call: the kernel prefetches its beginning while it works on
/// its last rows. Null if unknown.
struct NextRead {
  const std::byte* data = nullptr;

  NextRead() = default;
  NextRead(const Rows& rows) : data(rows.data) {}
};

/// Neurons of one kernel call. Another `more` ids follow them in `data`, whose rows a later call is
/// likely to read: the kernel may prefetch those, or `next` if there are none.
struct NeuronIds {
  const std::int32_t* data;
  std::int64_t count;
  std::int64_t more = 0;
  NextRead next = {};
  std::int32_t operator[](std::int64_t i) const { return data[i]; }
};

/// Which neurons a token uses: those whose contribution |h[j]| * lengths[j] reaches the threshold.
struct Selection {
  float threshold = 0;
  bool by_gate = false;            // compare |act(gate)| alone: the estimate of CATS
  const float* lengths = nullptr;  // [F] ||down[j]||
};

/// Vectors of several sequences that meet the same rows.
struct Vectors {
  static constexpr std::int64_t kMost = 16;
  std::int64_t count;    // 1 to kMost
  const void* const* x;  // [count] prepared
  float* const* y;       // [count]
  float* const* h = {};  // [count]
};

/// Kernels for weight rows of one format. Those with x of type `void` need it prepared.
struct RowKernels {
  /// The size of a prepared x of length n, and the function that writes it, to an address that is a
  /// multiple of 64. Null if kernels use x itself, [n] f32.
  std::int64_t (*prepared_bytes)(std::int64_t n);
  void (*prepare)(const float* x, std::int64_t n, void* prepared);

  /// out[i * stride] = w[0][i], i < n
  void (*load)(const Rows& w, float* out, std::int64_t stride);
  /// y[r] = w[r]·x, or += with `add`, r < rows. x: [n]
  void (*dot)(const Rows& w, std::int64_t rows, const void* x, float* y, bool add, NextRead next);
  /// h[i] = act(gate[j]·x) * (up[j]·x), y = sum_i h[i] down[j], for j = ids[i], i < ids.count.
  /// x: [n], y: [n], padded to whole groups of 64
  void (*ffn_fused)(const NeuronRows&, Activation, const NeuronIds& ids, const void* x, float* h,
                    float* y);
  /// `dot` and `ffn_fused` of several vectors, which read each row once. Each result is that of a
  /// vector alone, bit for bit.
  void (*dot_each)(const Rows& w, std::int64_t rows, const Vectors&, bool add);
  void (*ffn_each)(const NeuronRows&, Activation, const NeuronIds& ids, const Vectors&);
  /// The same for those of the neurons that are selected; h is 0 for the others. Returns how many.
  /// With a threshold of 0 the result is that of `ffn_fused`, bit for bit.
  std::int64_t (*ffn_selected)(const NeuronRows&, Activation, const Selection&,
                               const NeuronIds& ids, const void* x, float* h, float* y);
};

/// What is made of q k before softmax: s = scale q k or, if `cap` is not 0, cap tanh(s / cap).
struct ScoreScale {
  float scale, cap;
};

/// Kernels for keys and values in one format.
struct CacheKernels {
  /// row[i] = in[i * stride], i < n
  void (*store)(const float* in, std::int64_t stride, std::int64_t n, void* row);
  /// Attention of `queries` heads over one chunk of keys. q: [queries, n]. partial: [queries, 2 + n],
  /// of each query the largest score m, sum_i e^(s_i - m) and sum_i e^(s_i - m) v[i].
  void (*attend)(const void* k, const void* v, std::int64_t keys, std::int64_t n, const float* q,
                 std::int64_t queries, ScoreScale, float* partial);
};

/// Matrix products of rows (weights, keys or values) and `count` panels.
struct PanelKernels {
  /// The size of a prepared panel b: [n, P], and the function that writes it, to an address that is
  /// a multiple of 64. Null if `multiply` uses b itself.
  std::int64_t (*prepared_bytes)(std::int64_t n);
  void (*prepare)(const float* b, std::int64_t n, void* prepared);

  /// c = w b, or += with `add`. w: [rows, n], b: [n, P], prepared, c: [rows, P]
  void (*multiply)(const Rows& w, std::int64_t rows, PreparedPanels b, Panels c, std::int64_t count,
                   bool add);
  /// c += wᵀ b for the columns first <= i < first + columns, `first` a multiple of block_columns.
  /// w: [rows, n], b: [rows, P], c: [columns, P]
  void (*multiply_transposed)(const Rows& w, std::int64_t rows, std::int64_t first,
                              std::int64_t columns, ConstPanels b, Panels c, std::int64_t count);
  std::int64_t block_columns;  // the smallest useful task
};

/// A block of keys in the online softmax of one panel of queries.
struct SoftmaxBlock {
  std::int64_t keys;
  std::int64_t first;   // position of the first key relative to the panel's first query
  std::int64_t window;  // lane t sees keys at relative positions t - window < i <= t
  std::int64_t n;       // length of an output vector
};

struct Bricks;
/// Decode kernels of the formats in bricks.
struct BrickKernels;

struct Kernels {
  const char* name;
  std::int64_t panel;      // P of prefill
  RowKernels rows[4];      // f32, bf16, int8, bf16c
  PanelKernels panels[4];  // f32, bf16, int8, bf16c
  const BrickKernels* bricks;
  /// c = a strip of w times b, or += with `add`. b: [w.cols, P], prepared as for rows of bf16,
  /// c: [64, P]; past w.rows nothing is written.
  void (*multiply_bricks)(const Bricks& w, std::int64_t strip, PreparedPanels b, Panels c,
                          std::int64_t count, bool add);
  CacheKernels caches[3];        // f32, bf16, int8
  PanelKernels cache_panels[3];  // f32, bf16, int8; without `prepare`

  /// out = x / sqrt(mean(x²) + eps) * weight; x, out: [n], may be the same
  void (*rms_norm)(const float* x, const float* weight, float eps, std::int64_t n, float* out);
  /// The same for each lane of a panel; x, out: [n, P]
  void (*rms_norm_panel)(const float* x, const float* weight, float eps, std::int64_t n,
                         float* out);
  /// Rotates each pair (x[i], x[i + n]) by angle i. x: [2n]
  void (*rotate)(float* x, const float* cos, const float* sin, std::int64_t n);
  /// h[i] = act(gate[i]) * up[i]; h may be gate
  void (*gated)(Activation, const float* gate, const float* up, float* h, std::int64_t n);
  /// x[i] = cap tanh(x[i] / cap); NaN for what is not finite
  void (*soft_cap)(float cap, float* x, std::int64_t n);
  /// One step of online softmax: updates the maximum m: [P], replaces q k, s: [keys, P], by
  /// e^(score - m), rescales the sum l: [P] and the output o: [n, P] to the new maximum, and adds
  /// s to l.
  void (*softmax)(const SoftmaxBlock&, ScoreScale, float* s, float* m, float* l, float* o);
  /// Reads `bytes` bytes, a multiple of 1024. The result depends on each of them.
  std::uint64_t (*read)(const void* data, std::int64_t bytes);
};

}  // namespace tda
