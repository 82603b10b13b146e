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

std::string PrefixOwner::text() const {
  return "fingerprint " + fingerprint + ", weights " + weights + ", kv " + kv + ", " + device;
}

std::int64_t PrefixOwner::bytes(const Prefix& prefix) const {
  return std::ssize(prefix.tokens) * (std::int64_t{sizeof(Token)} + token_bytes) +
         std::ssize(prefix.statistics) * (statistic_size + 1) * std::int64_t{sizeof(double)};
}

void PrefixCache::Impl::serve(const PrefixOwner& owner) {
  const std::lock_guard lock(mutex_);
  if (owner_.fingerprint.empty()) owner_ = owner;
  if (owner_ != owner)
    throw OptionError("prefix_cache: found one of another model (" + owner_.text() +
                      "), expected one of this (" + owner.text() + ")");
}

std::optional<PrefixUse> PrefixCache::Impl::find(Tokens prompt, const Usable& usable,
                                                 const std::shared_ptr<const Prefix>& promised) {
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
  std::erase_if(under_way_, [](const UnderWay& other) { return other.forks != forks(); });
  for (const auto& [other, _] : under_way_) {
    const std::int64_t common = common_tokens(prompt, other->tokens);
    if (common == std::ssize(other->tokens) && usable(*other, common) > best.length) return {};
  }
  if (best.prefix) prefixes_.splice(prefixes_.begin(), prefixes_, place);
  if (wants_locked(*promised)) under_way_.push_back({promised, forks()});
  return best;
}

void PrefixCache::Impl::withdraw(const Prefix& promised) {
  const std::lock_guard lock(mutex_);
  std::erase_if(under_way_, [&](const UnderWay& each) { return each.promised.get() == &promised; });
}

bool PrefixCache::Impl::wants(const Prefix& prefix) const {
  const std::lock_guard lock(mutex_);
  return wants_locked(prefix);
}

bool PrefixCache::Impl::wants_locked(const Prefix& prefix) const {
  return !prefix.tokens.empty() && owner_.bytes(prefix) <= limit &&
         std::ranges::none_of(prefixes_, [&](const auto& each) { return contains(*each, prefix); });
}

void PrefixCache::Impl::keep(std::shared_ptr<const Prefix> prefix) {
  const std::lock_guard lock(mutex_);
  if (!wants_locked(*prefix)) return;
  std::erase_if(prefixes_, [&](const auto& each) {
    const bool goes = contains(*prefix, *each);
    if (goes) bytes_ -= owner_.bytes(*each);
    return goes;
  });
  bytes_ += owner_.bytes(*prefix);
  prefixes_.push_front(std::move(prefix));
  while (bytes_ > limit) {
    bytes_ -= owner_.bytes(*prefixes_.back());
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
