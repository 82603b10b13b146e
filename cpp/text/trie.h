// A set of strings with values, to find those that a text starts with.
#pragma once

#include <tda/types.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace tda {

class Trie {
 public:
  struct Match {
    std::size_t begin;  // in bytes
    std::size_t size;
    Token value;
  };

  /// Adds a key (not empty), or replaces its value.
  void add(std::string_view key, Token value) {
    std::uint32_t node = 0;
    for (char c : key) {
      const auto [edge, added] =
          edges_.emplace(edge_of(node, c), static_cast<std::uint32_t>(values_.size()));
      if (added) values_.push_back(none);
      node = edge->second;
    }
    values_[node] = value;
  }

  bool contains(std::string_view key) const {
    bool found = false;
    visit(key, 0, [&](const Match& match) { found = match.size == key.size(); });
    return found;
  }

  /// Calls visitor(Match) for every key at `begin` in the text, shortest first.
  template <class Visitor>
  void visit(std::string_view text, std::size_t begin, Visitor visitor) const {
    std::uint32_t node = 0;
    for (std::size_t at = begin; at < text.size(); ++at) {
      const auto edge = edges_.find(edge_of(node, text[at]));
      if (edge == edges_.end()) return;
      node = edge->second;
      if (values_[node] != none) visitor(Match{begin, at + 1 - begin, values_[node]});
    }
  }

  /// The longest key at the first position from `begin` on that has any.
  std::optional<Match> find(std::string_view text, std::size_t begin) const {
    if (edges_.empty()) return std::nullopt;
    std::optional<Match> longest;
    for (; begin < text.size() && !longest; ++begin)
      visit(text, begin, [&](const Match& match) { longest = match; });
    return longest;
  }

 private:
  static constexpr Token none = -1;
  static std::uint64_t edge_of(std::uint32_t node, char c) {
    return static_cast<std::uint64_t>(node) << 8 | static_cast<unsigned char>(c);
  }

  std::unordered_map<std::uint64_t, std::uint32_t> edges_;
  std::vector<Token> values_ = {none};  // by node
};

}  // namespace tda
