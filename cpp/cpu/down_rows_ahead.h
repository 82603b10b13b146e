// What is prefetched while a batch of down rows is processed.
#pragma once

#include "cpu/batch.h"

namespace tda {
namespace {

/// Prefetches scattered rows while a batch of down rows is processed; near the end of a list these
/// are rows of two matrices, the next gate and up.
template <class Row, int kRows>
struct DownRowsAhead : RowsAhead<Row, kRows> {
  RowsAhead<Row, kRows> others;
  bool two;

  DownRowsAhead(const Rows& w, const Batch& batch)
      : two(batch.is_last() && batch.next.b != nullptr) {
    for (int64_t r = 0; r < kRows; ++r) {
      this->rows[r] = batch.ahead<Row>(w, batch.next.a, r);
      if (two) others.rows[r] = batch.ahead<Row>(w, batch.next.b, r);
    }
  }
  void prefetch(int plane, int64_t row, int64_t byte) {
    RowsAhead<Row, kRows>::prefetch(plane, row, byte);
    if (two) others.prefetch(plane, row, byte);
  }
};

/// The same for contiguous rows: line by line through all of them, twice, then through the streams
/// of what is read next.
template <class Row>
struct DownStreamsAhead {
  static constexpr bool kInOrder = true;

  DownStreamsAhead(const Rows& w, const Batch& batch) {
    const Row row(w, batch.ids[0]);
    const int64_t high = row.plane(1) - row.plane(0);
    const Streams own = {{row.plane(0), row.plane(0)}, {w.stride, w.stride}};
    const NextNeurons& next = batch.next;
    ReadPath path = {own, batch.left, next_streams(next.otherwise, own, high, w.stride - high)};
    if (next.count > 0) {
      const Row gate(*next.a, next.ids[0]);
      path.next = {{gate.plane(0), gate.plane(1)}, {high, w.stride - high}};
    }
    const int64_t distance = 2 * neurons_ahead(w.stride);
    far = lines(path, distance);
    near = lines(path, distance / 2);
  }
  void prefetch(int plane, int64_t, int64_t) {
    prefetch_nta(far.take(plane));
    prefetch_l1(near.take(plane));
  }
  void prefetch_scales(int64_t, int64_t) { prefetch(0, 0, 0); }

 private:
  struct Lines {
    const std::uint8_t* of[2];
    int second;  // the index in `of` of plane 1's stream

    const std::uint8_t* take(int plane) {
      const std::uint8_t*& line = of[plane == 0 ? 0 : second];
      line += kLineBytes;
      return line - kLineBytes;
    }
  };
  Lines far, near;

  static Lines lines(const ReadPath& path, int64_t row) {
    const Streams at = path.at(row);
    return {{at.of[0], at.of[1]}, row < path.left ? 0 : 1};
  }
};

}  // namespace
}  // namespace tda
