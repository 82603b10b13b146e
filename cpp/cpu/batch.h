// What the decode kernels of integer formats share: batches of rows and software prefetch.
//
// A Row (int8.h) has kScales scales per group of 64 values, one for each run of
// 64 / kScales; its codes are stored with kOffset added. Included by kernel sources only, like
// simd.h.
#pragma once

#include "cpu/int8.h"

namespace tda {
namespace {

/// Neurons processed together.
constexpr int64_t kBatch = kDecodeBatch;
/// Down rows processed together: they share the loads and stores of y, a quarter of the work. Long
/// rows use the smaller batch, so that L1 also holds the prefetched rows of the next one.
constexpr int kSmallDownBatch = 8, kLargeDownBatch = 16;
/// The batch for rows of so many bytes.
inline int64_t down_batch(int64_t bytes) {
  return bytes <= 768 ? kLargeDownBatch : kSmallDownBatch;
}

inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

/// Dot products of up to kBatch rows, each still one partial sum per lane.
struct Products {
  Floats lanes[kBatch];

  /// Stores the first `count`, rounded up to whole vectors; the padding is 0.
  void store_to(float* out, int64_t count) {
    for (int64_t i = count; i % kLanes != 0; ++i) lanes[i] = Floats{};
    for (int64_t i = 0; i < count; i += kLanes) store(out + i, sums(lanes + i));
  }
};

/// In place; `count` is rounded up to whole vectors.
inline void activate(Activation activation, float* values, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes)
    store(values + i, activate(activation, load_as<Floats>(values + i)));
}

/// Gate and up products of a batch.
struct Gated {
  Products gates, ups;

  /// h[i] = act(gate[i]) * up[i], i < count
  void finish(Activation activation, int64_t count, float* h) {
    float gate[kBatch], up[kBatch];
    gates.store_to(gate, count);
    ups.store_to(up, count);
    activate(activation, gate, count);
    for (int64_t i = 0; i < count; ++i) h[i] = gate[i] * up[i];
  }
};

// ---- software prefetch -----------------------------------------------------------------------
//
// Decode is bound by memory, and every cache line must be prefetched to arrive in time
// (tests/cpp/test_prefetch.cpp). Each line that is processed issues one prefetch of a later line,
// so that they are spread as evenly as the work; separate loops over lists of lines took a quarter
// of the time.
//
// Contiguous rows are prefetched in address order, whatever order the kernel processes them in (up
// to a third faster than row by row), with the non-temporal hint, since they are read once. With
// many prefetches in flight 1-2% are dropped (10% on a new page), and each dropped line stalls the
// core for the time of a hundred lines' work, so each is issued again at half the distance. The
// prefetch runs on past the end of a list: from gate and up rows to down rows, from those to the
// next gate rows, and from a thread's last rows of one matrix to its first rows of the next.
//
// Scattered rows are prefetched row by row, kBatch rows ahead, into L2, since some are read again.
// The last of each four lines goes first: ascending lines trigger the hardware prefetcher, which
// then fetches lines past the row's end in vain (docs/notebook/2026-11-26-cpu-decode.md).

/// Lines of a row that are processed as one block.
constexpr int kBlockLines = 4;
/// Which line of a block is processed i-th.
constexpr int line_in_block(int i, bool in_order) {
  return in_order ? i : (i + kBlockLines - 1) % kBlockLines;
}
/// Fewer than 1/16 of the rows missing counts as contiguous: reading over small gaps is faster than
/// going row by row.
inline bool are_scattered(const int32_t* ids, int64_t count) {
  return count > 0 && ids[count - 1] - ids[0] >= count + count / 16;
}

/// What is read after a list: rows of one or two matrices for another list of neurons.
struct NextNeurons {
  const Rows *a = nullptr, *b = nullptr;
  const int32_t* ids = nullptr;
  int64_t count = 0;
  bool high = true, low = true;  // which planes are read
  NextRead otherwise = {};       // what is read instead if count is 0
};

/// Consecutive neurons of a list that are processed together, and what to prefetch meanwhile.
struct Batch {
  const int32_t* ids;
  int64_t count;
  int64_t left;  // neurons from the batch's first to the end of the list
  const NextNeurons& next;

  Batch(const int32_t* all, int64_t all_count, int64_t first, const NextNeurons& after,
        int64_t most = kBatch)
      : ids(all + first),
        count(min(most, all_count - first)),
        left(all_count - first),
        next(after) {}
  /// Past the end, the last one again.
  int64_t index(int64_t i) const { return min(i, count - 1); }
  int32_t id(int64_t i) const { return ids[index(i)]; }
  /// Whether prefetches of this batch run past the end of the list.
  bool is_last() const { return left <= kBatch; }

  /// The row to prefetch while the i-th neuron's row of `own` is processed: kBatch neurons ahead,
  /// in `own` or, past the list's end, in `next_rows` (a or b of `next`). If nothing is known to
  /// follow it is the row itself, already in the cache.
  template <class Row>
  Row ahead(const Rows& own, const Rows* next_rows, int64_t i) const {
    const int64_t at = index(i) + kBatch;
    if (at < left) return Row(own, ids[at]);
    if (at - left < next.count && next_rows)
      return Row(*next_rows, next.ids[at - left]).only(next.high, next.low);
    return Row(own, id(i));
  }
  /// Whether the batch's rows and those prefetched meanwhile are contiguous. With 3 kBatch left
  /// prefetches stay within the list, since they run at most 2 kBatch ahead of the batch.
  bool is_stream_ahead() const {
    if (are_scattered(ids, left)) return false;
    return left >= 3 * kBatch ||
           (left % kSmallDownBatch == 0 &&
            (next.count == 0 || (next.count >= kBatch && !are_scattered(next.ids, kBatch))));
  }
};

/// Prefetches a part of the lines that `ahead` knows with each of `count` vectors, so that memory is
/// busy all the time.
template <class Ahead>
class Shares {
 public:
  Shares(const Ahead& ahead, int64_t lines, int64_t count)
      : ahead_(ahead), lines_(lines), each_(lines / count + 1) {}
  void prefetch_next() {
    const int64_t end = min(lines_, next_ + each_);
    ahead_.prefetch_lines(next_, end);
    next_ = end;
  }

 private:
  const Ahead& ahead_;
  int64_t lines_, each_, next_ = 0;
};

/// Prefetches scattered rows while kCount others are processed.
template <class Row, int kCount>
struct RowsAhead {
  static constexpr bool kInOrder = false;
  Row rows[kCount];

  void prefetch(int plane, int64_t row, int64_t byte) const {
    prefetch_l2(rows[row].plane(plane) + byte);
  }
  void prefetch_scales(int64_t row, int64_t scale) const {
    prefetch_l2(rows[row].scales.scales + scale);
  }
  const RowsAhead& at_block(int64_t) const { return *this; }
  /// Lines of rows of so many pairs of groups; prefetch_lines() counts through them.
  int64_t lines(int64_t pairs) const { return 2 * kCount * pairs; }
  void prefetch_lines(int64_t first, int64_t end) const {
    for (int64_t i = first; i < end; ++i) {
      const int64_t row = i / 2 % kCount, at = i / (2 * kCount);
      prefetch(i % 2, row, at * kLineBytes);
      if (at == 0) prefetch_scales(row, 0);
    }
  }
};

/// For rows that are in the cache.
struct NothingAhead {
  static constexpr bool kInOrder = true;
  void prefetch(int, int64_t, int64_t) const {}
  void prefetch_scales(int64_t, int64_t) const {}
  const NothingAhead& at_block(int64_t) const { return *this; }
};

/// Prefetch distance in rows of so many bytes, a multiple of `multiple`; the second prefetch is
/// issued at half of it. kFar covers memory latency: at a longer distance more than 64 lines would
/// be in flight when memory is slow. The callers round it to whole batches and, for gate and up rows,
/// cap it at kBatch, so that a small change of kFar may change nothing.
inline int64_t rows_ahead(int64_t bytes, int64_t multiple) {
  constexpr int64_t kFar = 10240;
  return (kFar + bytes * multiple - 1) / (bytes * multiple) * multiple;
}
/// The same in neurons, for gate and up rows of so many bytes each. It is as many bytes as whole
/// batches of down rows, at least two ahead of the one being processed.
inline int64_t neurons_ahead(int64_t bytes) {
  return min(kBatch, rows_ahead(bytes, 2 * down_batch(bytes)) / 2);
}

/// An address in each plane, and the bytes from one row to the next there.
struct Streams {
  const std::uint8_t* of[2];
  int64_t step[2];

  Streams after(int64_t rows) const {
    return {{of[0] + rows * step[0], of[1] + rows * step[1]}, {step[0], step[1]}};
  }
};

/// What a thread reads in order: the contiguous rows of a list, then others.
struct ReadPath {
  Streams own;
  int64_t left;  // rows of `own`
  Streams next;

  Streams at(int64_t row) const { return row < left ? own.after(row) : next.after(row - left); }
  /// The first row after `row` that is not in the same streams.
  int64_t end_of(int64_t row) const { return row < left ? left : INT64_MAX; }
};

/// The streams of `next`; if that is unknown, lines of the list itself that are in the cache.
inline Streams next_streams(const NextRead& next, const Streams& own, int64_t step,
                            int64_t low_step) {
  if (!next.data) return {{own.of[0], own.of[1]}, {0, 0}};
  const auto* const data = reinterpret_cast<const std::uint8_t*>(next.data);
  const auto* const low = reinterpret_cast<const std::uint8_t*>(next.low);
  return {{data, low ? low : data}, {step, low_step}};
}

/// Prefetches streams while kCount contiguous rows are processed, which are kStep rows of a
/// ReadPath. kOnce: the rows are read once, so prefetches are non-temporal and issued twice. Not for
/// several x, which take so much of L1 that lines would be lost there before they are used.
template <bool kOnce, int kCount, int kStep>
struct StreamsAhead {
  static constexpr bool kInOrder = true;
  Streams far, near;
  int64_t scale_lines;  // lines of scales, which follow the nibbles in the first plane, per block

  /// pairs: pairs of groups in a row; bytes: of kStep rows in the first plane
  StreamsAhead(const Streams& far_streams, const Streams& near_streams, int64_t pairs,
               int64_t bytes)
      : far(far_streams), near(near_streams) {
    const int64_t blocks = (pairs + kBlockLines - 1) / kBlockLines;
    const int64_t lines = (bytes + kLineBytes - 1) / kLineBytes - kCount * pairs;
    scale_lines = (max(0, lines) + blocks - 1) / blocks;
  }
  void advance() {
    far = far.after(kStep);
    near = near.after(kStep);
  }
  void prefetch(int plane, int64_t row, int64_t byte) const {
    prefetch_line(plane, kCount * byte + row * kLineBytes);
  }
  void prefetch_scales(int64_t, int64_t) const {}
  /// Lines of kStep rows; prefetch_lines() counts through them.
  int64_t lines(int64_t) const { return kStep * (far.step[0] + far.step[1]) / kLineBytes; }
  void prefetch_lines(int64_t first, int64_t end) const {
    const int64_t of_first = kStep * far.step[0] / kLineBytes;
    for (int64_t i = first; i < min(end, of_first); ++i) prefetch_line(0, i * kLineBytes);
    for (int64_t i = max(first, of_first); i < end; ++i)
      prefetch_line(1, (i - of_first) * kLineBytes);
  }
  /// The streams from which the pairs of a block prefetch. Each block starts with its share of the
  /// lines of scales, in address order; all of them at the row's end take 3% longer.
  StreamsAhead at_block(int64_t block) const {
    StreamsAhead here = *this;
    here.skip(block * scale_lines);
    for (int64_t i = 0; i < scale_lines; ++i)
      here.prefetch_line(0, (kCount * kBlockLines * block + i) * kLineBytes);
    here.skip(scale_lines);
    return here;
  }

 private:
  void prefetch_line(int plane, int64_t byte) const {
    if (kOnce) {
      prefetch_nta(far.of[plane] + byte);
      prefetch_l1(near.of[plane] + byte);
    } else {
      prefetch_l2(far.of[plane] + byte);
    }
  }
  void skip(int64_t lines) {
    far.of[0] += lines * kLineBytes;
    near.of[0] += lines * kLineBytes;
  }
};

/// Calls work(i, ahead) for every kStep-th of a path's rows i < count; `ahead` prefetches rows at
/// the distance `distance` and again at half of it.
template <bool kOnce, int kCount, int kStep, class Work>
[[gnu::always_inline]] inline void prefetch_along(const ReadPath& path, int64_t count,
                                                  int64_t distance, int64_t pairs,
                                                  const Work& work) {
  const int64_t half = distance / 2;
  for (int64_t i = 0; i < count;) {
    StreamsAhead<kOnce, kCount, kStep> ahead(path.at(i + distance), path.at(i + half), pairs,
                                             kStep * path.own.step[0]);
    const int64_t end =
        min(count, min(path.end_of(i + distance) - distance, path.end_of(i + half) - half));
    for (; i < end; i += kStep) {
      work(i, ahead);
      ahead.advance();
    }
  }
}

}  // namespace
}  // namespace tda
