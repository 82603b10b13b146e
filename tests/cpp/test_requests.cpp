// What decode for integer formats asks memory for: every line that will be read, wherever lists
// begin and end. A line that isn't asked for costs a core a whole trip to memory, and no result
// shows it. The loops here stand for those of the kernels, line for line.
#include <cstdint>
#include <set>
#include <vector>

namespace {
std::set<std::uintptr_t> asked[4];  // lines, by the hint's locality
void record(const void* line, int locality) {
  asked[locality].insert(reinterpret_cast<std::uintptr_t>(line) / 64);
}
}  // namespace

#define TDA_ISA portable
#define __builtin_prefetch(line, write, locality) record(line, locality)
#include "check.h"
#include "cpu/down_rows.h"
#include "cpu/int4.h"

using namespace tda;

namespace {

constexpr int kInPassing = 0, kSoon = 3;
constexpr int64_t kNeurons = 192;

/// Whether all lines of these bytes have been asked for.
bool covered(int locality, const std::byte* first, int64_t bytes) {
  const auto at = reinterpret_cast<std::uintptr_t>(first);
  for (std::uintptr_t line = at / 64; line <= (at + bytes - 1) / 64; ++line)
    if (!asked[locality].count(line)) return false;
  return true;
}

void forget() {
  for (auto& lines : asked) lines.clear();
}

/// Feed-forward rows of n values as the engine lays them out: addresses alone, nothing is read.
template <class Row>
struct Layer {
  int64_t n, high, low;
  NeuronRows rows;

  explicit Layer(int64_t values, std::uintptr_t begin = 1 << 30)
      : n(values),
        high(Row::kPlanes ? high_row_bytes(n) : int4_row_bytes(n)),
        low(Row::kPlanes ? low_row_bytes(n) : 0) {
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

/// As kernels multiply kCount rows that follow each other.
template <class Row, int kCount, class Ahead>
void multiply(const Ahead& ahead, int64_t pairs) {
  for (int64_t p = 0; p < pairs; p += kLinesInTurn) {
    const auto here = ahead.in_turn(p / kLinesInTurn);
    for (int64_t i = p; i < min(pairs, p + kLinesInTurn); ++i)
      for (int row = 0; row < kCount; ++row)
        for (int plane = 0; plane < (Row::kPlanes ? 2 : 1); ++plane)
          here.prefetch(plane, row, i * 64);
  }
}

/// As they add up down rows.
template <class Row>
void add(const Rows& down, const std::vector<int32_t>& ids, const Follow& follow) {
  const int64_t groups = groups_of(down.n), in_turn = 32 / Row::kScales;
  const int64_t some = down_batch(down.stride);
  for (int64_t i = 0; i < kNeurons; i += some) {
    const Batch batch(ids.data(), kNeurons, i, follow, some);
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

template <class Row, int kTogether>
void check_format(int64_t n) {
  const Layer<Row> layer(n), next(n, std::uintptr_t{1} << 40);
  const Rows &gate = layer.rows.gate, &down = layer.rows.down;
  const int64_t row = layer.high + layer.low, ahead = neurons_ahead(row);
  std::vector<int32_t> ids(kNeurons);
  for (int64_t i = 0; i < kNeurons; ++i) ids[i] = static_cast<int32_t>(i);

  // Gates and ups, and then downs.
  forget();
  const Streams own = {{reinterpret_cast<const std::uint8_t*>(gate.data),
                        reinterpret_cast<const std::uint8_t*>(gate.low)},
                       {gate.stride, gate.low_stride}};
  const auto* const first = reinterpret_cast<const std::uint8_t*>(down.data);
  const Route route = {
      own, kNeurons, {{first, first + gate.stride}, {2 * down.stride, 2 * down.stride}}};
  follow_route<true, 2 * kTogether, kTogether>(
      route, kNeurons, ahead, layer.pairs(),
      [&](int64_t, const auto& streams) { multiply<Row, 2 * kTogether>(streams, layer.pairs()); });
  for (const int hint : {kInPassing, kSoon}) {
    const int64_t from = hint == kInPassing ? ahead : ahead / 2;
    CHECK(covered(hint, gate.data + from * gate.stride, (kNeurons - from) * gate.stride));
    if (Row::kPlanes)
      CHECK(covered(hint, gate.low + from * gate.low_stride, (kNeurons - from) * gate.low_stride));
    CHECK(covered(hint, down.data, 2 * from * down.stride));
  }

  // Downs, and then the gates and ups of more neurons, or what the thread reads on with.
  for (const bool known : {true, false}) {
    forget();
    const Rows& then = next.rows.gate;
    const Follow follow = known ? Follow{&then, &next.rows.up, ids.data(), kNeurons}
                                : Follow{nullptr, nullptr, nullptr, 0, true, true, then};
    add<Row>(down, ids, follow);
    for (const int hint : {kInPassing, kSoon}) {
      const int64_t from = hint == kInPassing ? ahead : ahead / 2;
      CHECK(covered(hint, down.data + 2 * from * down.stride, (kNeurons - 2 * from) * down.stride));
      CHECK(covered(hint, then.data, from * then.stride));
      if (Row::kPlanes) CHECK(covered(hint, then.low, from * then.low_stride));
    }
  }

  // Rows of a matrix, as many as are no multiple of anything, and where the thread reads on.
  constexpr int kRows = Row::kPlanes ? 2 : 4;
  const int64_t far = rows_ahead(row, 2 * kRows), rows = 2 * kNeurons - 1;
  const Streams matrix = {{own.of[0], own.of[1]}, {layer.high, layer.low}};
  for (int64_t begin = 0; begin < rows; begin += kBatch) {
    if (begin == kBatch) forget();
    const Route some = {matrix.after(begin), rows - begin,
                        read_on(next.rows.gate, matrix, layer.high, layer.low)};
    follow_route<true, kRows, kRows>(
        some, min(kBatch, rows - begin), far, layer.pairs(),
        [&](int64_t, const auto& streams) { multiply<Row, kRows>(streams, layer.pairs()); });
  }
  for (const int hint : {kInPassing, kSoon}) {
    const int64_t from = hint == kInPassing ? far : far / 2;
    CHECK(covered(hint, gate.data + (kBatch + from) * layer.high,
                  (rows - kBatch - from) * layer.high));
    // kRows at a time go from one to the other, so the first few may be left out.
    const int64_t some = from - 2 * kRows;
    if (some <= 0) continue;
    CHECK(covered(hint, next.rows.gate.data + kRows * layer.high, some * layer.high));
    if (Row::kPlanes)
      CHECK(covered(hint, next.rows.gate.low + kRows * layer.low, some * layer.low));
  }
}

}  // namespace

TEST(every_line_is_asked_for_and_again) {
  for (const int64_t n : {64, 576, 960, 1536, 2048, 2560, 4096}) {
    check_format<Int8Row, 1>(n);
    check_format<Int4Row, 2>(n);
  }
}

TEST(what_is_not_known_costs_no_lines) {
  forget();
  const Layer<Int8Row> layer(576);
  std::vector<int32_t> ids(kNeurons);
  for (int64_t i = 0; i < kNeurons; ++i) ids[i] = static_cast<int32_t>(i);
  add<Int8Row>(layer.rows.down, ids, Follow{});
  // A batch asks for a few lines more than it has, at most two per row.
  const auto* const end =
      layer.rows.down.data + kNeurons * layer.rows.down.stride + (2 * kManyDownRows + 1) * 64;
  for (const auto& lines : asked)
    for (const std::uintptr_t line : lines)
      CHECK(line * 64 < reinterpret_cast<std::uintptr_t>(end));
}

int main() { return run_tests(); }
