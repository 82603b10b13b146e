// The compute kernels of the CPU backend: one table of functions per instruction set.
//
// Activations of a step lie in panels: token t is lane t % P of panel t / P, and a panel of vectors
// of length n is [n, P] f32. For prefill P is Kernels::panel, so tokens fill the vector lanes, one
// weight is broadcast to all of them. For decode P is 1: a row. Where a machine multiplies bytes or
// bf16 several at a time, activations are rounded to these for int8 and bf16 weights: see
// `prepare`.
#pragma once

#include <tda/model_config.h>

#include <cstddef>
#include <cstdint>

namespace tda {

/// Weight rows (or keys, or values) that one kernel call converts at a time, and so the finest
/// useful split of a matrix between threads.
inline constexpr std::int64_t kBlockRows = 48;
/// Rows or neurons that decode kernels take at a time: calls of whole batches are the fastest.
inline constexpr std::int64_t kDecodeBatch = 16;
/// Most keys of one `attend` call.
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

/// Panels as PanelKernels::prepare leaves them, or as they are where there is none; `stride` bytes
/// apart.
struct PreparedPanels {
  const void* data;
  std::int64_t stride;

  PreparedPanels(const void* prepared, std::int64_t bytes) : data(prepared), stride(bytes) {}
  PreparedPanels(ConstPanels panels) : data(panels.data), stride(panels.stride * 4) {}
  PreparedPanels from(std::int64_t panel) const {
    return {static_cast<const std::byte*>(data) + panel * stride, stride};
  }
};

/// Weight rows from some row on, n values each. Those of int8, int4 and bf16c are `stride` bytes
/// apart, int8's low ones `low_stride`; others follow each other.
struct Rows {
  const std::byte* data;
  const std::byte* low;
  std::int64_t n;
  std::int64_t stride = 0, low_stride = 0;
};

/// A layer's feed-forward rows: row j of the three is neuron j.
struct NeuronRows {
  Rows gate, up, down;
};

/// Where the caller's thread reads on behind the last row of a kernel call, per plane: kernels ask
/// memory for the beginning while they finish. Null where it is not known.
struct ReadOn {
  const std::byte *data = nullptr, *low = nullptr;

  ReadOn() = default;
  ReadOn(const Rows& rows) : data(rows.data), low(rows.low) {}
};

/// Neurons of one kernel call. Behind their ids stand `next` more of which a later call is likely
/// to read the rows: the kernel may ask memory for them, or, where there are none, for `then`.
struct NeuronIds {
  const std::int32_t* data;
  std::int64_t count;
  std::int64_t next = 0;
  ReadOn then = {};
  std::int32_t operator[](std::int64_t i) const { return data[i]; }
};

/// Which neurons a token uses: those whose estimated contribution |h[j]| * lengths[j] reaches
/// `exact` are computed exactly, those that reach only `coarse` from the high planes alone (formats
/// with one plane know no difference, they need coarse == exact), the others are left out.
struct Selection {
  float exact = 0, coarse = 0;
  bool by_gate = false;            // compare |act(gate)| alone: the estimate of CATS
  const float* lengths = nullptr;  // [F] ||down[j]||
};

struct SelectedCounts {
  std::int64_t exact = 0, coarse = 0;
};

/// Kernels for rows of weights in one format. Those that take x as `void` want it prepared.
struct RowKernels {
  /// Bytes of a prepared x of length n, and its making, on a multiple of 64; null where x itself,
  /// [n] f32, is what the kernels want.
  std::int64_t (*prepared_bytes)(std::int64_t n);
  void (*prepare)(const float* x, std::int64_t n, void* prepared);

  /// out[i * stride] = w[0][i], i < n
  void (*load)(const Rows& w, float* out, std::int64_t stride);
  /// y[r] = w[r]·x, or += with `add`, r < rows. x: [n]
  void (*dot)(const Rows& w, std::int64_t rows, const void* x, float* y, bool add, ReadOn then);
  /// h[i] = act(gate[j]·x) * (up[j]·x), y = sum_i h[i] down[j], for j = ids[i], i < ids.count.
  /// x: [n], y: [n], with room for whole groups of 64
  void (*neurons)(const NeuronRows&, Activation, const NeuronIds& ids, const void* x, float* h,
                  float* y);
  /// The same for the selected of these neurons; h is 0 for the others. With thresholds of 0 it
  /// gives the same bits as `neurons`.
  SelectedCounts (*selected)(const NeuronRows&, Activation, const Selection&, const NeuronIds& ids,
                             const void* x, float* h, float* y);

  // Null for formats with one plane.
  /// y[r] = high plane of w[r]·x, r < rows. Returns the largest.
  float (*sketch)(const Rows& w, std::int64_t rows, const void* x, float* y) = nullptr;
  /// y[i] = w[i]·x, i in ids, with the bits of `dot`. ids: ascending
  void (*dot_some)(const Rows& w, const std::int32_t* ids, std::int64_t count, const void* x,
                   float* y) = nullptr;
};

/// Kernels for keys and values in one format.
struct CacheKernels {
  /// row[i] = in[i * stride], i < n
  void (*store)(const float* in, std::int64_t stride, std::int64_t n, void* row);
  /// One chunk of keys seen by `queries` heads, q: [queries, n]. partial: [queries, 2 + n], each
  /// the largest score m, sum_i e^(s_i - m) and sum_i e^(s_i - m) v[i], for s = scale k q.
  void (*attend)(const void* k, const void* v, std::int64_t keys, std::int64_t n, const float* q,
                 std::int64_t queries, float scale, float* partial);
};

/// Rows times `count` panels. Keys and values are rows here, too.
struct PanelKernels {
  /// Bytes of a prepared panel b: [n, P], and its making, on a multiple of 64; null where
  /// `multiply` wants b itself.
  std::int64_t (*prepared_bytes)(std::int64_t n);
  void (*prepare)(const float* b, std::int64_t n, void* prepared);

  /// c = w b, or += with `add`. w: [rows, n], b: [n, P], prepared, c: [rows, P]
  void (*multiply)(const Rows& w, std::int64_t rows, PreparedPanels b, Panels c, std::int64_t count,
                   bool add);
  /// c += wᵀ b for the columns first <= i < first + columns, `first` a multiple of block_columns.
  /// w: [rows, n], b: [rows, P], c: [columns, P]
  void (*multiply_transposed)(const Rows& w, std::int64_t rows, std::int64_t first,
                              std::int64_t columns, ConstPanels b, Panels c, std::int64_t count);
  std::int64_t block_columns;  // the finest useful split between threads
};

/// The scores of one panel of queries against one block of keys, and the running softmax state.
struct SoftmaxBlock {
  std::int64_t keys;
  std::int64_t first;   // position of the first key relative to the panel's first query
  std::int64_t window;  // lane t sees keys at relative positions t - window < i <= t
  std::int64_t n;       // length of an output vector
};

struct Kernels {
  const char* name;
  std::int64_t panel;            // P of prefill
  RowKernels rows[5];            // f32, bf16, int8, int4, bf16c
  PanelKernels panels[5];        // f32, bf16, int8, int4, bf16c
  CacheKernels caches[3];        // f32, bf16, int8
  PanelKernels cache_panels[3];  // for keys and values of these; they have no `prepare`

  /// out = x / sqrt(mean(x²) + eps) * weight; x, out: [n], may be the same
  void (*rms_norm)(const float* x, const float* weight, float eps, std::int64_t n, float* out);
  /// The same for each lane of a panel; x, out: [n, P]
  void (*rms_norm_panel)(const float* x, const float* weight, float eps, std::int64_t n,
                         float* out);
  /// (x[i], x[i + n]) is turned by the angle i: x: [2n]
  void (*rotate)(float* x, const float* cos, const float* sin, std::int64_t n);
  /// h[i] = act(gate[i]) * up[i]; h may be gate
  void (*gated)(Activation, const float* gate, const float* up, float* h, std::int64_t n);
  /// One step of online softmax: scores s: [keys, P] become e^(scale s - m) under the new maximum
  /// m: [P]; the sum l: [P] and the output o: [n, P] so far are rescaled to it, l takes in s.
  void (*softmax)(const SoftmaxBlock&, float scale, float* s, float* m, float* l, float* o);
  /// Reads the bytes, a multiple of 1024; what it returns depends on each of them.
  std::uint64_t (*read)(const void* data, std::int64_t bytes);
};

}  // namespace tda
