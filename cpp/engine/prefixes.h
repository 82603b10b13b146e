// The implementation of PrefixCache: what is kept of a prompt, and of which prompts.
#pragma once

#include <tda/prefix_cache.h>
#include <tda/sparsity.h>
#include <tda/types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <vector>

#include "base/fork_safe.h"

namespace tda {

/// The statistic of all layers after some tokens.
struct Statistic {
  std::vector<double> sums;  // [L, F]
  double tokens = 0;
};

/// What prefilling left of a prompt's beginning, in whole panels.
struct Prefix {
  std::vector<Token> tokens;
  std::vector<std::byte> rows;  // see Backend::key_value_rows
  Estimate estimate = Estimate::contribution;
  std::vector<Statistic> statistics;  // after each full step; maybe of the first ones alone

  std::int64_t bytes() const;
};

/// A prefix of a prompt to go on from.
struct PrefixUse {
  std::shared_ptr<const Prefix> prefix;  // null: none
  std::int64_t common = 0;               // tokens that it has in common with the prompt
  std::int64_t length = 0;               // of them, to be used
};

/// What rows and statistics depend on.
struct PrefixOwner {
  std::string fingerprint, weights, kv, device;  // empty: none yet
  std::int64_t token_bytes = 0;                  // of a token's row in Prefix::rows
  std::int64_t statistic_size = 0;               // L * F

  std::string text() const;
  bool operator==(const PrefixOwner&) const = default;
};

class PrefixCache::Impl {
 public:
  explicit Impl(std::int64_t limit) : limit(limit) {}

  /// From now on, prefixes are this model's. Throws OptionError if they are another's.
  void serve(const PrefixOwner&);
  /// The prefix of which most tokens can be used: usable(prefix, common) says how many.
  PrefixUse find(Tokens prompt, const std::function<std::int64_t(const Prefix&, std::int64_t)>&);
  /// Keeps a prefix, unless it is larger than the limit; those that it contains go.
  void keep(std::shared_ptr<const Prefix>);

  std::vector<std::shared_ptr<const Prefix>> prefixes() const;  // most recently used first
  PrefixOwner owner() const;
  std::int64_t bytes() const;
  void clear();

  const std::int64_t limit;

 private:
  mutable ForkSafeMutex mutex_;  // held while what follows is read or changed
  PrefixOwner owner_;
  std::list<std::shared_ptr<const Prefix>> prefixes_;  // most recently used first
  std::int64_t bytes_ = 0;
};

}  // namespace tda
