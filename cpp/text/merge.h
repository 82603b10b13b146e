// The loop of byte pair encoding: merges the best pair of neighbours until no pair can merge.
#pragma once

#include <tda/types.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <queue>
#include <tuple>
#include <vector>

namespace tda {

struct Symbol {
  Token id;
  std::uint32_t begin;  // in the text, in bytes
  std::uint32_t size;   // 0: merged into the symbol before it
  bool frozen = false;  // never merges
};

struct Merge {
  double rank;  // the lowest rank merges first, and of equal ranks the leftmost
  Token id;     // of the merged symbol
};

/// merge_of(left, right) -> std::optional<Merge>. Time is n log n: every merge adds at most two
/// candidates to a heap.
template <class MergeOf>
void merge_symbols(std::vector<Symbol>& symbols, MergeOf merge_of) {
  struct Candidate {
    double rank;
    std::uint32_t left, right;  // indices
    std::uint32_t size;         // of both when found; differs once either has changed
    Token id;
    bool operator>(const Candidate& other) const {
      return std::tie(rank, left) > std::tie(other.rank, other.left);
    }
  };
  const auto count = static_cast<std::uint32_t>(symbols.size());
  std::vector<std::uint32_t> before(count), after(count);  // neighbours; count: none
  std::vector<Candidate> candidates;
  const auto candidate = [&](std::uint32_t left, std::uint32_t right) -> std::optional<Candidate> {
    const Symbol &a = symbols[left], &b = symbols[right];
    if (a.frozen || b.frozen) return std::nullopt;
    const std::optional<Merge> merge = merge_of(a, b);
    if (!merge) return std::nullopt;
    return Candidate{merge->rank, left, right, a.size + b.size, merge->id};
  };
  for (std::uint32_t i = 0; i < count; ++i) {
    before[i] = i ? i - 1 : count;
    after[i] = i + 1;
    if (i + 1 < count)
      if (const auto found = candidate(i, i + 1)) candidates.push_back(*found);
  }
  std::priority_queue queue(std::greater<Candidate>(), std::move(candidates));
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol &left = symbols[best.left], &right = symbols[best.right];
    if (!left.size || !right.size || left.size + right.size != best.size) continue;
    left.id = best.id;
    left.size = best.size;
    right.size = 0;
    const std::uint32_t next = after[best.left] = after[best.right];
    if (next != count) before[next] = best.left;
    const std::uint32_t previous = before[best.left];
    if (previous != count)
      if (const auto found = candidate(previous, best.left)) queue.push(*found);
    if (next != count)
      if (const auto found = candidate(best.left, next)) queue.push(*found);
  }
  std::erase_if(symbols, [](const Symbol& symbol) { return symbol.size == 0; });
}

}  // namespace tda
