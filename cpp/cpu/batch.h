// What the decode kernels of integer formats share: a batch of neurons on its way from products to
// y. A Row (int8.h, int4.h) has kScales scales per group of 64, each for as many neighbours, and
// its codes are kOffset too large. Included by kernel sources only, like simd.h.
#pragma once

#include "cpu/int8.h"

namespace tda {
namespace {

/// Neurons worked on at a time.
constexpr int64_t kBatch = kDecodeBatch;
/// Down rows of so many bytes worked on at a time: they share what is loaded and stored of y, a
/// quarter of the work. Of long ones fewer, since the next batch is to be in the first level, too.
constexpr int kFewDownRows = 8, kManyDownRows = 16;
inline int64_t down_batch(int64_t bytes) { return bytes <= 768 ? kManyDownRows : kFewDownRows; }

inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

/// Per-lane sums of up to kBatch rows on their way to one float each.
struct Products {
  Floats lanes[kBatch];

  /// The first `count`, up to a whole vector of them; whatever stands behind them becomes 0.
  void store_to(float* out, int64_t count) {
    for (int64_t i = count; i % kLanes != 0; ++i) lanes[i] = Floats{};
    for (int64_t i = 0; i < count; i += kLanes) store(out + i, sums(lanes + i));
  }
};

/// Whole vectors of them.
inline void activate(Activation activation, float* values, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes)
    store(values + i, activate(activation, load_as<Floats>(values + i)));
}

/// Gates and ups of a batch.
struct Gated {
  Products gates, ups;

  /// h[i] = act(gate) * up of the first `count`.
  void finish(Activation activation, int64_t count, float* h) {
    float gate[kBatch], up[kBatch];
    gates.store_to(gate, count);
    ups.store_to(up, count);
    activate(activation, gate, count);
    for (int64_t i = 0; i < count; ++i) h[i] = gate[i] * up[i];
  }
};

// ---- memory ---------------------------------------------------------------------------------
//
// Memory brings lines in time only if they are asked for, each of them
// (tests/cpp/test_requests.cpp): one instruction per line that is at work, spread as evenly as the
// work, and no list to keep (loops over lists took a quarter of the time).
//
// Rows that follow each other are asked for line by line through all of them, whatever the order of
// work (up to a third faster than row by row), and into the first level alone, since they are read
// once. Where many requests are under way, one or two of a hundred get lost, of the first to new
// pages one of ten, and for each a core waits as long as for the work on a hundred lines. So all
// are made again when the work is nearer. What comes behind the last row of a list is asked for
// like the rest: gates and ups are followed by downs, those by the next gates, a thread's last rows
// of one matrix by its first ones of another.
//
// Scattered rows are asked for one by one, kBatch places ahead, into the second level, for some are
// read again, and read with the last of each four lines first: lines in order make the hardware
// fetch as many behind the row, which are of no use then. Measured in tools/bench/RESULTS-cpu.md.

constexpr int kLinesInTurn = 4;
constexpr int line_in_turn(int i, bool in_order) {
  return in_order ? i : (i + kLinesInTurn - 1) % kLinesInTurn;
}
/// Few gaps don't count: a stream over them is faster than row by row.
inline bool are_scattered(const int32_t* ids, int64_t count) {
  return count > 0 && ids[count - 1] - ids[0] >= count + count / 16;
}

/// What is read next: rows of one or two matrices, for the neurons in a list.
struct Follow {
  const Rows *a = nullptr, *b = nullptr;
  const int32_t* ids = nullptr;
  int64_t count = 0;
  bool high = true, low = true;  // planes
  ReadOn then = {};              // where there are no such rows
};

/// Neurons whose rows are at work, of those in a list, and what to ask memory for meanwhile.
struct Batch {
  const int32_t* ids;
  int64_t count;
  int64_t left;  // of the list, from this batch's first on
  const Follow& follow;

  Batch(const int32_t* all, int64_t all_count, int64_t first, const Follow& next,
        int64_t most = kBatch)
      : ids(all + first),
        count(min(most, all_count - first)),
        left(all_count - first),
        follow(next) {}
  /// The last one in the place of those beyond it.
  int64_t index(int64_t i) const { return min(i, count - 1); }
  int32_t id(int64_t i) const { return ids[index(i)]; }
  /// Whether the list ends where rows are asked for.
  bool is_last() const { return left <= kBatch; }

  /// Which row to ask for while the i-th neuron's row of `own` is at work: its successor's kBatch
  /// places on, or from matrix a or b of what follows, or that row itself, which costs nothing.
  template <class Row>
  Row ahead(const Rows& own, const Rows* following, int64_t i) const {
    const int64_t at = index(i) + kBatch;
    if (at < left) return Row(own, ids[at]);
    if (at - left < follow.count && following)
      return Row(*following, follow.ids[at - left]).only(follow.high, follow.low);
    return Row(own, id(i));
  }
  /// Whether these rows, and those asked for meanwhile, follow each other in memory. None behind
  /// the list are where it goes on for 3 kBatch: requests are 2 kBatch ahead of a batch at most.
  bool is_stream_ahead() const {
    if (are_scattered(ids, left)) return false;
    return left >= 3 * kBatch ||
           (left % kFewDownRows == 0 &&
            (follow.count == 0 || (follow.count >= kBatch && !are_scattered(follow.ids, kBatch))));
  }
};

/// Rows to ask for, wherever they lie, while some of others are at work.
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
  const RowsAhead& in_turn(int64_t) const { return *this; }
};

/// How far ahead of the work rows of so many bytes are asked for, whole multiples of `multiple` of
/// them; again at half of that. In bytes it is what memory needs to answer. Farther, more than 64
/// lines would be under way where it answers late.
inline int64_t rows_ahead(int64_t bytes, int64_t multiple) {
  constexpr int64_t kFar = 10240;
  return (kFar + bytes * multiple - 1) / (bytes * multiple) * multiple;
}
/// The same in neurons, whose rows are so many bytes each: as much as whole batches of down rows,
/// the second or a later one behind that at work.
inline int64_t neurons_ahead(int64_t bytes) {
  return min(kBatch, rows_ahead(bytes, 2 * down_batch(bytes)) / 2);
}

/// A stream per plane, from some place on, and how many bytes of each go with a row.
struct Streams {
  const std::uint8_t* of[2];
  int64_t step[2];

  Streams after(int64_t rows) const {
    return {{of[0] + rows * step[0], of[1] + rows * step[1]}, {step[0], step[1]}};
  }
};

/// What a thread reads: rows of a list that follow each other, as streams, then others.
struct Route {
  Streams own;
  int64_t left;  // rows
  Streams then;

  Streams at(int64_t row) const { return row < left ? own.after(row) : then.after(row - left); }
  /// The first row behind `row` that is not on the same streams as it.
  int64_t end_of(int64_t row) const { return row < left ? left : INT64_MAX; }
};

/// What follows a list as far as it is known, or the list's own rows, which cost nothing.
inline Streams read_on(const ReadOn& then, const Streams& own, int64_t step, int64_t low_step) {
  if (!then.data) return {{own.of[0], own.of[1]}, {0, 0}};
  const auto* const data = reinterpret_cast<const std::uint8_t*>(then.data);
  const auto* const low = reinterpret_cast<const std::uint8_t*>(then.low);
  return {{data, low ? low : data}, {step, low_step}};
}

/// Streams to ask for while kCount rows that follow each other are at work, kStep of a route's;
/// kOnce: they are read once, and asked for again.
template <bool kOnce, int kCount, int kStep>
struct StreamsAhead {
  static constexpr bool kInOrder = true;
  Streams next, again;
  int64_t rest;  // lines of the first plane behind those of nibbles, per turn

  /// The rows' pairs of groups and, kStep together, their bytes in the first plane.
  StreamsAhead(const Streams& far, const Streams& near, int64_t pairs, int64_t bytes)
      : next(far), again(near) {
    const int64_t turns = (pairs + kLinesInTurn - 1) / kLinesInTurn;
    const int64_t behind = (bytes + kLineBytes - 1) / kLineBytes - kCount * pairs;
    rest = (max(0, behind) + turns - 1) / turns;
  }
  void go_on() {
    next = next.after(kStep);
    again = again.after(kStep);
  }
  void prefetch(int plane, int64_t row, int64_t byte) const {
    prefetch_line(plane, kCount * byte + row * kLineBytes);
  }
  void prefetch_scales(int64_t, int64_t) const {}
  /// Where the pairs of a turn ask from. Lines of scales, behind those of nibbles, come at the
  /// beginning of turns, in the stream's order: all at a row's end they take 3% longer.
  StreamsAhead in_turn(int64_t turn) const {
    StreamsAhead here = *this;
    here.skip(turn * rest);
    for (int64_t i = 0; i < rest; ++i)
      here.prefetch_line(0, (kCount * kLinesInTurn * turn + i) * kLineBytes);
    here.skip(rest);
    return here;
  }

 private:
  void prefetch_line(int plane, int64_t byte) const {
    if (kOnce) {
      prefetch_nta(next.of[plane] + byte);
      prefetch_l1(again.of[plane] + byte);
    } else {
      prefetch_l2(next.of[plane] + byte);
    }
  }
  void skip(int64_t lines) {
    next.of[0] += lines * kLineBytes;
    again.of[0] += lines * kLineBytes;
  }
};

/// work(i, ahead) for every kStep of a route's rows i < count, with what to ask for meanwhile.
template <bool kOnce, int kCount, int kStep, class Work>
[[gnu::always_inline]] inline void follow_route(const Route& route, int64_t count, int64_t far,
                                                int64_t pairs, const Work& work) {
  const int64_t near = far / 2;
  for (int64_t i = 0; i < count;) {
    StreamsAhead<kOnce, kCount, kStep> ahead(route.at(i + far), route.at(i + near), pairs,
                                             kStep * route.own.step[0]);
    const int64_t end = min(count, min(route.end_of(i + far) - far, route.end_of(i + near) - near));
    for (; i < end; i += kStep) {
      work(i, ahead);
      ahead.go_on();
    }
  }
}

}  // namespace
}  // namespace tda
