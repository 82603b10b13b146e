// Decode for integer formats prefetches every line that it will read, wherever lists begin and end.
// A line it misses costs a core the full latency of memory, which no result shows. The loops here
// repeat those of the kernels, line for line.
#include <cstdint>
#include <set>
#include <vector>

namespace {
std::set<std::uintptr_t> prefetched[4];  // lines, by the hint's locality argument
void record(const void* line, int locality) {
  prefetched[locality].insert(reinterpret_cast<std::uintptr_t>(line) / 64);
}
}  // namespace

#define TDA_ISA portable
#define __builtin_prefetch(line, write, locality) record(line, locality)
#include "check.h"
#include "cpu/down_rows.h"
#include "cpu/int8.h"

using namespace tda;

namespace {

constexpr int kNta = 0, kL1 = 3;  // localities of the first and the second prefetch
constexpr int64_t kNeurons = 192;

/// Whether all lines of these bytes have been prefetched.
bool covered(int locality, const std::byte* first, int64_t bytes) {
  const auto at = reinterpret_cast<std::uintptr_t>(first);
  for (std::uintptr_t line = at / 64; line <= (at + bytes - 1) / 64; ++line)
    if (!prefetched[locality].count(line)) return false;
  return true;
}

void forget() {
  for (auto& lines : prefetched) lines.clear();
}

/// Feed-forward rows of n values in the engine's layout. Addresses alone: nothing is read.
template <class Row>
struct Layer {
  int64_t n, high, low;
  NeuronRows rows;

  explicit Layer(int64_t values, std::uintptr_t begin = 1 << 30)
      : n(values), high(high_row_bytes(n)), low(low_row_bytes(n)) {
    const auto* const gates = reinterpret_cast<const std::byte*>(begin);
    const std::byte* const lows = gates + 2 * kNeurons * high;
    const std::byte* const downs = lows + 2 * kNeurons * low;
    rows.gate = {gates, Row::kPlanes ? lows : nullptr, n, 2 * high, 2 * low};
    rows.up = {gates + high, Row::kPlanes ? lows + low : nullptr, n, 2 * high, 2 * low};
    rows.down = {downs, Row::kPlanes ? downs + high : nullptr, n, high + low,
                 Row::kPlanes ? high + low : 0};
  }
  int64_t pairs() const { return (groups_of(n) + 1) / 2; }
};

/// The prefetches of `multiply` for kCount contiguous rows.
template <class Row, int kCount, class Ahead>
void multiply(const Ahead& ahead, int64_t pairs) {
  for (int64_t p = 0; p < pairs; p += kBlockLines) {
    const auto here = ahead.at_block(p / kBlockLines);
    for (int64_t i = p; i < min(pairs, p + kBlockLines); ++i)
      for (int row = 0; row < kCount; ++row)
        for (int plane = 0; plane < (Row::kPlanes ? 2 : 1); ++plane)
          here.prefetch(plane, row, i * 64);
  }
}

/// The prefetches of `add_down_rows`.
template <class Row>
void add(const Rows& down, const std::vector<int32_t>& ids, const NextNeurons& after) {
  const int64_t groups = groups_of(down.n), in_turn = 32 / Row::kScales;
  const int64_t some = down_batch(down.stride);
  for (int64_t i = 0; i < kNeurons; i += some) {
    const Batch batch(ids.data(), kNeurons, i, after, some);
    CHECK(batch.is_stream_ahead());
    DownStreamsAhead<Row> ahead(down, batch);
    for (int64_t g = 0; g < groups; g += in_turn) {
      for (int row = 0; row < some; ++row) ahead.prefetch_scales(row, 0);
      for (int64_t pair = g; pair < min(groups, g + in_turn); pair += 2)
        for (int row = 0; row < some; ++row)
          for (int plane = 0; plane < (Row::kPlanes ? 2 : 1); ++plane)
            ahead.prefetch(plane, row, 0);
    }
  }
}

template <class Row, int kRowsPerPass>
void check_format(int64_t n) {
  const Layer<Row> layer(n), next(n, std::uintptr_t{1} << 40);
  const Rows &gate = layer.rows.gate, &down = layer.rows.down;
  const int64_t row = layer.high + layer.low, ahead = neurons_ahead(row);
  std::vector<int32_t> ids(kNeurons);
  for (int64_t i = 0; i < kNeurons; ++i) ids[i] = static_cast<int32_t>(i);

  // Gate and up rows, then down rows.
  forget();
  const Streams own = {{reinterpret_cast<const std::uint8_t*>(gate.data),
                        reinterpret_cast<const std::uint8_t*>(gate.low)},
                       {gate.stride, gate.low_stride}};
  const auto* const first = reinterpret_cast<const std::uint8_t*>(down.data);
  const ReadPath path = {
      own, kNeurons, {{first, first + gate.stride}, {2 * down.stride, 2 * down.stride}}};
  prefetch_along<true, 2 * kRowsPerPass, kRowsPerPass>(
      path, kNeurons, ahead, layer.pairs(), [&](int64_t, const auto& streams) {
        multiply<Row, 2 * kRowsPerPass>(streams, layer.pairs());
      });
  for (const int hint : {kNta, kL1}) {
    const int64_t from = hint == kNta ? ahead : ahead / 2;
    CHECK(covered(hint, gate.data + from * gate.stride, (kNeurons - from) * gate.stride));
    if (Row::kPlanes)
      CHECK(covered(hint, gate.low + from * gate.low_stride, (kNeurons - from) * gate.low_stride));
    CHECK(covered(hint, down.data, 2 * from * down.stride));
  }

  // Down rows, then the gate and up rows of more neurons, or what the thread reads next.
  for (const bool known : {true, false}) {
    forget();
    const Rows& then = next.rows.gate;
    const NextNeurons after = known ? NextNeurons{&then, &next.rows.up, ids.data(), kNeurons}
                                    : NextNeurons{nullptr, nullptr, nullptr, 0, true, true, then};
    add<Row>(down, ids, after);
    for (const int hint : {kNta, kL1}) {
      const int64_t from = hint == kNta ? ahead : ahead / 2;
      CHECK(covered(hint, down.data + 2 * from * down.stride, (kNeurons - 2 * from) * down.stride));
      CHECK(covered(hint, then.data, from * then.stride));
      if (Row::kPlanes) CHECK(covered(hint, then.low, from * then.low_stride));
    }
  }

  // Rows of a matrix, in a number that is no multiple of a batch, then what the thread reads next.
  constexpr int kRows = Row::kPlanes ? 2 : 4;
  const int64_t far = rows_ahead(row, 2 * kRows), rows = 2 * kNeurons - 1;
  const Streams matrix = {{own.of[0], own.of[1]}, {layer.high, layer.low}};
  for (int64_t begin = 0; begin < rows; begin += kBatch) {
    if (begin == kBatch) forget();
    const ReadPath some = {matrix.after(begin), rows - begin,
                           next_streams(next.rows.gate, matrix, layer.high, layer.low)};
    prefetch_along<true, kRows, kRows>(
        some, min(kBatch, rows - begin), far, layer.pairs(),
        [&](int64_t, const auto& streams) { multiply<Row, kRows>(streams, layer.pairs()); });
  }
  for (const int hint : {kNta, kL1}) {
    const int64_t from = hint == kNta ? far : far / 2;
    CHECK(covered(hint, gate.data + (kBatch + from) * layer.high,
                  (rows - kBatch - from) * layer.high));
    // Rows are processed kRows at a time, so the first few of the next matrix may be left out.
    const int64_t some = from - 2 * kRows;
    if (some <= 0) continue;
    CHECK(covered(hint, next.rows.gate.data + kRows * layer.high, some * layer.high));
    if (Row::kPlanes)
      CHECK(covered(hint, next.rows.gate.low + kRows * layer.low, some * layer.low));
  }
}

}  // namespace

TEST(every_line_is_prefetched_twice) {
  for (const int64_t n : {64, 576, 960, 1536, 2048, 2560, 4096}) {
    check_format<Int8Row, 1>(n);
  }
}

TEST(every_line_is_prefetched_in_shares) {
  for (const int64_t n : {64, 576, 2048})
    for (const int64_t vectors : {1, 3, 5, 16}) {
      forget();
      const Layer<Int8Row> layer(n);
      const Rows& gate = layer.rows.gate;
      const Streams own = {{reinterpret_cast<const std::uint8_t*>(gate.data),
                            reinterpret_cast<const std::uint8_t*>(gate.low)},
                           {gate.stride, gate.low_stride}};
      const int64_t ahead = 16;
      prefetch_along<false, 4, 2>({own, kNeurons, own}, kNeurons - ahead, ahead, layer.pairs(),
                                  [&](int64_t, const auto& streams) {
                                    Shares shares(streams, streams.lines(layer.pairs()), vectors);
                                    for (int64_t v = 0; v < vectors; ++v) shares.prefetch_next();
                                  });
      constexpr int kL2 = 2;
      CHECK(covered(kL2, gate.data + ahead * gate.stride, (kNeurons - ahead) * gate.stride));
      CHECK(covered(kL2, gate.low + ahead * gate.low_stride, (kNeurons - ahead) * gate.low_stride));

      forget();  // rows that do not lie side by side
      const Int8Row rows[2] = {Int8Row(gate, 3), Int8Row(gate, 90)};
      const RowsAhead<Int8Row, 2> scattered{{rows[0], rows[1]}};
      Shares shares(scattered, scattered.lines(layer.pairs()), vectors);
      for (int64_t v = 0; v < vectors; ++v) shares.prefetch_next();
      for (const int64_t row : {3, 90}) {
        CHECK(covered(kL2, gate.data + row * gate.stride, low_row_bytes(n)));
        CHECK(covered(kL2, gate.low + row * gate.low_stride, low_row_bytes(n)));
      }
    }
}

TEST(an_unknown_next_read_costs_no_lines) {
  forget();
  const Layer<Int8Row> layer(576);
  std::vector<int32_t> ids(kNeurons);
  for (int64_t i = 0; i < kNeurons; ++i) ids[i] = static_cast<int32_t>(i);
  add<Int8Row>(layer.rows.down, ids, NextNeurons{});
  // A batch prefetches at most two lines per row more than it has.
  const auto* const end =
      layer.rows.down.data + kNeurons * layer.rows.down.stride + (2 * kLargeDownBatch + 1) * 64;
  for (const auto& lines : prefetched)
    for (const std::uintptr_t line : lines)
      CHECK(line * 64 < reinterpret_cast<std::uintptr_t>(end));
}

int main() { return run_tests(); }
