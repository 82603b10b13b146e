// What the decode kernels of integer formats share: a batch of neurons on its way from products to
// y. A Row (int8.h, int4.h) has kScales scales per group of 64, each for as many neighbours, and
// its codes are kOffset too large. Included by kernel sources only, like simd.h.
#pragma once

#include "cpu/int8.h"

namespace tda {
namespace {

/// Neurons worked on at a time.
constexpr int64_t kBatch = kDecodeBatch;
/// Down rows worked on at a time: they share what is loaded and stored of y. More would be less
/// work, but more streams from memory.
constexpr int64_t kDownBatch = 8;

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
// Memory brings lines in time only if they are asked for. While a line of a row is at work, a line
// of the row kBatch places on is asked for: one instruction per line, spread as evenly as the work,
// and no list to keep (loops over lists took a quarter of the time).
//
// Where many requests are under way, one or two of a hundred get lost, and for each a core waits as
// long as for the work on a hundred lines. So streams that are read whole are asked for again when
// they are nearer.
//
// Rows that follow each other are asked for line by line through all of them, whatever the order of
// work: the hardware joins in with such a stream (a tenth to a third faster than row by row). Those
// that don't are read with the last of each four lines first: lines in order make the hardware
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
  /// Whether these rows, and those asked for meanwhile, follow each other in memory.
  bool is_stream_ahead() const {
    if (are_scattered(ids, left)) return false;
    return left >= 2 * kBatch ||
           (left % kDownBatch == 0 && follow.count >= kBatch && !are_scattered(follow.ids, kBatch));
  }
};

/// Rows to ask for, wherever they lie, while some of others are at work.
template <class Row, int kCount>
struct RowsAhead {
  static constexpr bool kInOrder = false;
  Row rows[kCount];

  void ask(int plane, int64_t row, int64_t byte) const { tda::ask(rows[row].plane(plane) + byte); }
  void ask_scales(int64_t row, int64_t scale) const { tda::ask(rows[row].scales.scales + scale); }
  const RowsAhead& in_turn(int64_t) const { return *this; }
  void go_on() {}
};

/// A stream per plane, from some place on, and how many bytes of it are taken at a time.
struct Streams {
  const std::uint8_t* of[2];
  int64_t step[2];

  template <class Row>
  Streams(const Row& row, const int64_t (&steps)[2])
      : of{row.plane(0), row.plane(1)}, step{steps[0], steps[1]} {}
  Streams(const std::uint8_t* first, const std::uint8_t* second, int64_t both)
      : of{first, second}, step{both, both} {}
  void go_on() {
    for (int i = 0; i < 2; ++i) of[i] += step[i];
  }
};

/// Streams to ask for while kCount rows that follow each other are at work; kTwice: and again, into
/// the first-level cache.
template <bool kTwice, int kCount>
struct StreamsAhead {
  static constexpr bool kInOrder = true;
  Streams next, again;
  int64_t rest;  // lines of the first plane behind those of nibbles

  void go_on() {
    next.go_on();
    again.go_on();
  }
  void ask(int plane, int64_t row, int64_t byte) const {
    ask_line(plane, kCount * byte + row * kLineBytes);
  }
  void ask_scales(int64_t, int64_t) const {}
  /// Where the pairs of a turn ask from. Lines of scales, behind those of nibbles, come one by one
  /// at the beginning of turns, in the stream's order: all at a row's end they take 3% longer.
  StreamsAhead in_turn(int64_t turn) const {
    StreamsAhead here = *this;
    here.skip(min(turn, rest));
    if (turn < rest) {
      here.ask_line(0, kCount * kLinesInTurn * turn * kLineBytes);
      here.skip(1);
    }
    return here;
  }

 private:
  void ask_line(int plane, int64_t at) const {
    tda::ask(next.of[plane] + at);
    if (kTwice) ask_soon(again.of[plane] + at);
  }
  void skip(int64_t lines) {
    next.of[0] += lines * kLineBytes;
    again.of[0] += lines * kLineBytes;
  }
};

}  // namespace
}  // namespace tda
