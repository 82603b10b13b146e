// What int8's decode kernels prefetch. Included by kernel sources only, like simd.h.
//
// Decode is bound by memory, and every cache line must be prefetched to arrive in time
// (tests/cpp/test_prefetch.cpp). Each line that is processed issues one prefetch of a later line, so
// that they are spread as evenly as the work; separate loops over lists of lines took a quarter of
// the time.
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

/// Which of four lines is processed i-th.
constexpr int line_of_four(int i, bool in_order) { return in_order ? i : (i + 3) % 4; }
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
  NextRead otherwise = {};  // what is read instead if count is 0
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
  Int8Row ahead(const Rows& own, const Rows* next_rows, int64_t i) const {
    const int64_t at = index(i) + kBatch;
    if (at < left) return Int8Row(own, ids[at]);
    if (at - left < next.count && next_rows) return Int8Row(*next_rows, next.ids[at - left]);
    return Int8Row(own, id(i));
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

// ---- contiguous rows ----------------------------------------------------------------------------

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

/// What a thread reads in order: `left` rows of `step` bytes each from one address on, then what
/// lies at another.
struct ReadPath {
  const std::uint8_t* own;
  int64_t step, left;
  const std::uint8_t* next;  // null if unknown

  /// Where the row begins; of what is unknown, the first row of all, which is in the cache.
  const std::uint8_t* at(int64_t row) const {
    if (row < left) return own + row * step;
    return next ? next + (row - left) * step : own;
  }
};

/// Prefetches the lines of a path, one after the other. kOnce: the rows are read once, so lines are
/// prefetched into L1 alone, at two distances. Not for several x, which take so much of L1 that lines
/// would be lost there before they are used.
template <bool kOnce>
class StreamAhead {
 public:
  static constexpr bool kInOrder = true;

  /// While `count` rows of the path are processed, from row `row` on: the rows `distance` further on,
  /// and again those of half the distance. lines: how many will be asked for; the others of those rows
  /// are prefetched at once.
  StreamAhead(const ReadPath& path, int64_t row, int64_t count, int64_t distance, int64_t lines)
      : far_(path.at(row + distance)), near_(path.at(row + distance / 2)) {
    const int64_t all = (count * path.step + kLineBytes - 1) / kLineBytes;
    for (int64_t i = lines; i < all; ++i) prefetch_line(i);
  }
  void prefetch(int64_t, int64_t) {
    if (kOnce) {
      prefetch_nta(far_);
      prefetch_l1(near_);
    } else {
      prefetch_l2(far_);
    }
    far_ += kLineBytes;
    near_ += kLineBytes;
  }
  void prefetch_scales(int64_t, int64_t) {}
  void prefetch_line(int64_t) { prefetch(0, 0); }

 private:
  const std::uint8_t *far_, *near_;
};

/// Calls work(i, ahead) for every kStep-th of a path's rows i < count. lines: that `work` asks for
template <bool kOnce, int kStep, class Work>
[[gnu::always_inline]] inline void prefetch_along(const ReadPath& path, int64_t count,
                                                  int64_t distance, int64_t lines,
                                                  const Work& work) {
  for (int64_t i = 0; i < count; i += kStep) {
    StreamAhead<kOnce> ahead(path, i, kStep, distance, lines);
    work(i, ahead);
  }
}

/// For kRows contiguous down rows: those further on, then the next gate and up rows or whatever the
/// thread reads next.
template <int kRows>
StreamAhead<true> stream_of_down_rows(const Rows& down, const Batch& batch) {
  const NextNeurons& next = batch.next;
  const std::byte* const then =
      next.count > 0 ? next.a->data + next.ids[0] * next.a->stride : next.otherwise.data;
  const ReadPath path = {Int8Row(down, batch.ids[0]).data, down.stride, batch.left,
                         reinterpret_cast<const std::uint8_t*>(then)};
  return {path, 0, kRows, 2 * neurons_ahead(down.stride), kRows * groups_of(down.n)};
}

// ---- scattered rows -----------------------------------------------------------------------------

/// Prefetches rows while kCount others are processed.
template <int kCount>
struct RowsAhead {
  static constexpr bool kInOrder = false;
  Int8Row rows[kCount];

  void prefetch(int64_t row, int64_t byte) const { prefetch_l2(rows[row].data + byte); }
  void prefetch_scales(int64_t row, int64_t scale) const {
    prefetch_l2(rows[row].scales.scales + scale);
  }
  void prefetch_line(int64_t i) const { prefetch(i % kCount, i / kCount * kLineBytes); }
};

/// The same for down rows; near the end of a list these are rows of two matrices, the next gate and
/// up.
template <int kRows>
struct DownRowsAhead : RowsAhead<kRows> {
  RowsAhead<kRows> others;
  bool two;

  DownRowsAhead(const Rows& w, const Batch& batch)
      : two(batch.is_last() && batch.next.b != nullptr) {
    for (int64_t r = 0; r < kRows; ++r) {
      this->rows[r] = batch.ahead(w, batch.next.a, r);
      if (two) others.rows[r] = batch.ahead(w, batch.next.b, r);
    }
  }
  void prefetch(int64_t row, int64_t byte) const {
    RowsAhead<kRows>::prefetch(row, byte);
    if (two) others.prefetch(row, byte);
  }
  void prefetch_line(int64_t i) const { prefetch(i % kRows, i / kRows * kLineBytes); }
};

/// For rows that are in the cache.
struct NothingAhead {
  static constexpr bool kInOrder = true;
  void prefetch(int64_t, int64_t) const {}
  void prefetch_scales(int64_t, int64_t) const {}
};

// ---- several sequences --------------------------------------------------------------------------

/// Prefetches a part of so many lines with each of `count` vectors, so that memory is busy all the
/// time.
template <class Ahead>
class Shares {
 public:
  Shares(Ahead& ahead, int64_t lines, int64_t count)
      : ahead_(ahead), lines_(lines), each_(lines / count + 1) {}
  void prefetch_next() {
    for (const int64_t end = min(lines_, next_ + each_); next_ < end; ++next_)
      ahead_.prefetch_line(next_);
  }

 private:
  Ahead& ahead_;
  int64_t lines_, each_, next_ = 0;
};

}  // namespace
}  // namespace tda
