// Decode of int8 rows prefetches every line that it will read, wherever lists begin and end. A line
// that it misses costs a core the full latency of memory, which no result shows. The loops here ask
// for lines as those of the kernels do.
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
#include "cpu/prefetch.h"

using namespace tda;

namespace {

constexpr int kNta = 0, kL2 = 2, kL1 = 3;  // localities; the last is the second prefetch's
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

const std::uint8_t* bytes_of(const Rows& rows) {
  return reinterpret_cast<const std::uint8_t*>(rows.data);
}

/// Feed-forward rows of n values in the engine's layout. Addresses alone: nothing is read.
struct Layer {
  int64_t n, row;
  NeuronRows rows;

  explicit Layer(int64_t values, std::uintptr_t begin = 1 << 30)
      : n(values), row(int8_row_bytes(n)) {
    const auto* const gates = reinterpret_cast<const std::byte*>(begin);
    rows = {{gates, n, 2 * row}, {gates + row, n, 2 * row}, {gates + 2 * kNeurons * row, n, row}};
  }
  int64_t groups() const { return groups_of(n); }
};

std::vector<int32_t> all_ids() {
  std::vector<int32_t> ids(kNeurons);
  for (int64_t i = 0; i < kNeurons; ++i) ids[i] = static_cast<int32_t>(i);
  return ids;
}

/// Asks for the lines of codes of so many rows.
template <class Ahead>
void ask(Ahead& ahead, int64_t rows, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t r = 0; r < rows; ++r) ahead.prefetch(r, g * kGroup);
}

/// The prefetches of kernels of down rows.
void add(const Rows& down, const NextNeurons& after) {
  const std::vector<int32_t> ids = all_ids();
  const auto batches = [&]<int kRows>(Constant<kRows>) {
    for (int64_t i = 0; i < kNeurons; i += kRows) {
      const Batch batch(ids.data(), kNeurons, i, after, kRows);
      CHECK(batch.is_stream_ahead());
      auto ahead = stream_of_down_rows<kRows>(down, batch);
      ask(ahead, kRows, groups_of(down.n));
    }
  };
  if (down_batch(down.stride) == kLargeDownBatch)
    batches(Constant<kLargeDownBatch>());
  else
    batches(Constant<kSmallDownBatch>());
}

void check_rows_of(int64_t n) {
  const Layer layer(n), next(n, std::uintptr_t{1} << 40);
  const Rows &gate = layer.rows.gate, &down = layer.rows.down;
  const int64_t ahead = neurons_ahead(layer.row);
  const std::vector<int32_t> ids = all_ids();

  // Gate and up rows, then down rows.
  forget();
  prefetch_along<true, 1>({bytes_of(gate), gate.stride, kNeurons, bytes_of(down)}, kNeurons, ahead,
                          2 * layer.groups(),
                          [&](int64_t, auto& stream) { ask(stream, 2, layer.groups()); });
  for (const int hint : {kNta, kL1}) {
    const int64_t from = hint == kNta ? ahead : ahead / 2;
    CHECK(covered(hint, gate.data + from * gate.stride, (kNeurons - from) * gate.stride));
    CHECK(covered(hint, down.data, 2 * from * down.stride));
  }

  // Down rows, then the gate and up rows of more neurons, or what the thread reads next.
  for (const bool known : {true, false}) {
    forget();
    const Rows& then = next.rows.gate;
    add(down, known ? NextNeurons{&then, &next.rows.up, ids.data(), kNeurons}
                    : NextNeurons{nullptr, nullptr, nullptr, 0, then});
    for (const int hint : {kNta, kL1}) {
      const int64_t from = hint == kNta ? ahead : ahead / 2;
      CHECK(covered(hint, down.data + 2 * from * down.stride, (kNeurons - 2 * from) * down.stride));
      CHECK(covered(hint, then.data, from * then.stride));
    }
  }

  // Rows of a matrix, in a number that is no multiple of a batch, then what the thread reads next.
  constexpr int kRows = 2;
  const int64_t far = rows_ahead(layer.row, 2 * kRows), rows = 2 * kNeurons - 1;
  for (int64_t begin = 0; begin < rows; begin += kBatch) {
    if (begin == kBatch) forget();
    const ReadPath path = {bytes_of(gate) + begin * layer.row, layer.row, rows - begin,
                           bytes_of(next.rows.gate)};
    prefetch_along<true, kRows>(path, min(kBatch, rows - begin), far, kRows * layer.groups(),
                                [&](int64_t, auto& stream) { ask(stream, kRows, layer.groups()); });
  }
  for (const int hint : {kNta, kL1}) {
    const int64_t from = hint == kNta ? far : far / 2;
    CHECK(
        covered(hint, gate.data + (kBatch + from) * layer.row, (rows - kBatch - from) * layer.row));
    // Rows are processed kRows at a time, so the first few of the next matrix may be left out.
    const int64_t some = from - 2 * kRows;
    if (some > 0) CHECK(covered(hint, next.rows.gate.data + kRows * layer.row, some * layer.row));
  }
}

}  // namespace

TEST(every_line_is_prefetched_twice) {
  for (const int64_t n : {64, 576, 960, 1536, 2048, 2560, 4096}) check_rows_of(n);
}

TEST(every_line_is_prefetched_in_shares) {
  for (const int64_t n : {64, 576, 2048})
    for (const int64_t vectors : {1, 3, 5, 16}) {
      forget();
      const Layer layer(n);
      const Rows& gate = layer.rows.gate;
      const int64_t ahead = 16, lines = 4 * (layer.groups() + 1);
      prefetch_along<false, 2>({bytes_of(gate), gate.stride, kNeurons, nullptr}, kNeurons - ahead,
                               ahead, lines, [&](int64_t, auto& stream) {
                                 Shares shares(stream, lines, vectors);
                                 for (int64_t v = 0; v < vectors; ++v) shares.prefetch_next();
                               });
      CHECK(covered(kL2, gate.data + ahead * gate.stride, (kNeurons - ahead) * gate.stride));

      forget();  // rows that do not lie side by side
      RowsAhead<2> scattered = {{Int8Row(gate, 3), Int8Row(gate, 90)}};
      Shares shares(scattered, 2 * (layer.groups() + 1), vectors);
      for (int64_t v = 0; v < vectors; ++v) shares.prefetch_next();
      for (const int64_t row : {3, 90})
        CHECK(covered(kL2, gate.data + row * gate.stride, layer.groups() * (kGroup + kInt8Scales)));
    }
}

TEST(an_unknown_next_read_costs_no_lines) {
  forget();
  const Layer layer(576);
  add(layer.rows.down, NextNeurons{});
  // A batch prefetches at most one line per row more than it has.
  const auto* const end =
      layer.rows.down.data + kNeurons * layer.rows.down.stride + (kLargeDownBatch + 1) * 64;
  for (const auto& lines : prefetched)
    for (const std::uintptr_t line : lines)
      CHECK(line * 64 < reinterpret_cast<std::uintptr_t>(end));
}

int main() { return run_tests(); }
