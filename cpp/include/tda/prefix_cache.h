// Keys and values of earlier prompts, so that a prompt that begins like one of them prefills only
// the rest.
//
//   tda::Engine engine("path", {.prefix_cache = std::make_shared<tda::PrefixCache>(512 << 20)});
#pragma once

#include <tda/error.h>

#include <cstdint>
#include <filesystem>
#include <memory>

namespace [[gnu::visibility("default")]] tda {

/// Prompts, the least recently used out first. What is generated from a kept beginning is the same,
/// bit for bit, as without: kept are prompts, as they were prefilled, never generated tokens, and
/// with them the statistic that masks are made of. Serves one model, the first that it meets, and
/// any number of threads and engines of it. A generation whose prompt begins with one that another
/// thread is prefilling waits for that.
class PrefixCache {
 public:
  /// limit: in bytes of memory. Throws OptionError.
  explicit PrefixCache(std::int64_t limit);
  ~PrefixCache();
  PrefixCache(const PrefixCache&) = delete;
  PrefixCache& operator=(const PrefixCache&) = delete;

  std::int64_t limit() const;
  std::int64_t bytes() const;    // in use
  std::int64_t prompts() const;  // kept
  void clear();

  /// Writes all prompts to a file, completely or not at all. Throws CheckpointError, and OptionError
  /// if there are none.
  void save(const std::filesystem::path&) const;
  /// Adds the prompts of such a file, as if they came now. Throws CheckpointError for a file that is
  /// damaged or of another model, OptionError for one that exceeds the limit.
  void load(const std::filesystem::path&);

  class Impl;
  Impl& impl() const { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace tda
