#include <algorithm>
#include <mutex>

#include "engine/prefixes.h"

namespace tda {
namespace {

std::int64_t common_tokens(Tokens a, Tokens b) {
  return std::ranges::mismatch(a, b).in1 - a.begin();
}

/// Whether `longer` serves every prompt that `prefix` serves.
bool contains(const Prefix& longer, const Prefix& prefix) {
  if (common_tokens(longer.tokens, prefix.tokens) != std::ssize(prefix.tokens)) return false;
  if (prefix.statistics.empty()) return true;
  return longer.estimate == prefix.estimate && longer.statistics.size() >= prefix.statistics.size();
}

}  // namespace

std::int64_t Prefix::bytes() const {
  std::int64_t total = std::ssize(tokens) * std::int64_t{sizeof(Token)} + std::ssize(rows);
  for (const Statistic& each : statistics)
    total += (std::ssize(each.sums) + 1) * std::int64_t{sizeof(double)};
  return total;
}

std::string PrefixOwner::text() const {
  return "fingerprint " + fingerprint + ", weights " + weights + ", kv " + kv + ", " + device;
}

void PrefixCache::Impl::serve(const PrefixOwner& owner) {
  const std::lock_guard lock(mutex_);
  if (owner_.fingerprint.empty()) owner_ = owner;
  if (owner_ != owner)
    throw OptionError("prefix_cache: found one of another model (" + owner_.text() +
                      "), expected one of this (" + owner.text() + ")");
}

PrefixUse PrefixCache::Impl::find(
    Tokens prompt, const std::function<std::int64_t(const Prefix&, std::int64_t)>& usable) {
  const std::lock_guard lock(mutex_);
  PrefixUse best;
  auto place = prefixes_.end();
  for (auto each = prefixes_.begin(); each != prefixes_.end(); ++each) {
    const std::int64_t common = common_tokens(prompt, (*each)->tokens);
    const std::int64_t length = usable(**each, common);
    if (length <= best.length) continue;
    best = {*each, common, length};
    place = each;
  }
  if (best.prefix) prefixes_.splice(prefixes_.begin(), prefixes_, place);
  return best;
}

void PrefixCache::Impl::keep(std::shared_ptr<const Prefix> prefix) {
  if (prefix->tokens.empty() || prefix->bytes() > limit) return;
  const std::lock_guard lock(mutex_);
  if (std::ranges::any_of(prefixes_, [&](const auto& each) { return contains(*each, *prefix); }))
    return;  // another thread was as far
  std::erase_if(prefixes_, [&](const auto& each) {
    const bool goes = contains(*prefix, *each);
    if (goes) bytes_ -= each->bytes();
    return goes;
  });
  bytes_ += prefix->bytes();
  prefixes_.push_front(std::move(prefix));
  while (bytes_ > limit) {
    bytes_ -= prefixes_.back()->bytes();
    prefixes_.pop_back();
  }
}

std::vector<std::shared_ptr<const Prefix>> PrefixCache::Impl::prefixes() const {
  const std::lock_guard lock(mutex_);
  return {prefixes_.begin(), prefixes_.end()};
}

PrefixOwner PrefixCache::Impl::owner() const {
  const std::lock_guard lock(mutex_);
  return owner_;
}

std::int64_t PrefixCache::Impl::bytes() const {
  const std::lock_guard lock(mutex_);
  return bytes_;
}

void PrefixCache::Impl::clear() {
  const std::lock_guard lock(mutex_);
  prefixes_.clear();
  bytes_ = 0;
}

PrefixCache::PrefixCache(std::int64_t limit) {
  if (limit < 1)
    throw OptionError("prefix_cache: found a limit of " + std::to_string(limit) +
                      " bytes, expected 1 or more");
  impl_ = std::make_unique<Impl>(limit);
}
PrefixCache::~PrefixCache() = default;

std::int64_t PrefixCache::limit() const { return impl_->limit; }
std::int64_t PrefixCache::bytes() const { return impl_->bytes(); }
std::int64_t PrefixCache::prompts() const { return std::ssize(impl_->prefixes()); }
void PrefixCache::clear() { impl_->clear(); }

}  // namespace tda
