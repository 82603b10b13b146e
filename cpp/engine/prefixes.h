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
#include <optional>
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
  std::int64_t bytes(const Prefix&) const;
  bool operator==(const PrefixOwner&) const = default;
};

class PrefixCache::Impl {
 public:
  explicit Impl(std::int64_t limit) : limit(limit) {}

  /// From now on, prefixes are this model's. Throws OptionError if they are another's.
  void serve(const PrefixOwner&);
  /// How many tokens of a prefix can be used that has so many in common with a prompt.
  using Usable = std::function<std::int64_t(const Prefix&, std::int64_t common)>;
  /// The prefix of which most tokens can be used. `promised` is what prefilling this prompt will
  /// leave, its rows and sums still missing: others that begin with it are told so until
  /// `withdraw`. Nothing, and nothing is promised, if another prompt that this one begins with is
  /// being prefilled and will serve better than what is there: to be asked again.
  std::optional<PrefixUse> find(Tokens prompt, const Usable&,
                                const std::shared_ptr<const Prefix>& promised);
  void withdraw(const Prefix& promised);
  /// Whether to keep a prefix, whose rows may still be missing: if it is no larger than the limit
  /// and there is none that contains it.
  bool wants(const Prefix&) const;
  /// Keeps a prefix, if it is wanted; those that it contains go.
  void keep(std::shared_ptr<const Prefix>);

  std::vector<std::shared_ptr<const Prefix>> prefixes() const;  // most recently used first
  PrefixOwner owner() const;
  std::int64_t bytes() const;
  void clear();

  const std::int64_t limit;

 private:
  struct UnderWay {
    std::shared_ptr<const Prefix> promised;
    std::uint32_t forks;  // in the child of a fork, whoever promised it before does not exist
  };

  bool wants_locked(const Prefix&) const;

  mutable ForkSafeMutex mutex_;  // held while what follows is read or changed
  std::vector<UnderWay> under_way_;
  PrefixOwner owner_;
  std::list<std::shared_ptr<const Prefix>> prefixes_;  // most recently used first
  std::int64_t bytes_ = 0;
};

/// What a prompt that is being prefilled will leave, for others to wait for until this is destroyed.
class PrefixPromise {
 public:
  PrefixPromise(PrefixCache::Impl& cache, const Prefix& prefix)
      : cache_(cache), prefix_(std::make_shared<const Prefix>(prefix)) {}
  ~PrefixPromise() { cache_.withdraw(*prefix_); }
  PrefixPromise(const PrefixPromise&) = delete;
  PrefixPromise& operator=(const PrefixPromise&) = delete;

  const std::shared_ptr<const Prefix>& prefix() const { return prefix_; }

 private:
  PrefixCache::Impl& cache_;
  std::shared_ptr<const Prefix> prefix_;
};

}  // namespace tda
