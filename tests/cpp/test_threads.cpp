// How many threads a process may use: its control groups' quotas, from trees of files as Linux has
// them.
#include <tda/error.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "base/cpu_quota.h"
#include "base/thread_pool.h"
#include "check.h"
#include "fixtures.h"

namespace {

using fixtures::Folder;

void write(const Folder& root, const std::string& path, const std::string& text) {
  std::filesystem::create_directories((root.path / path).parent_path());
  root.write(path, text);
}

/// The quota of a process for which the kernel shows these lines, and groups' files hold these.
double quota(const std::string& groups, const std::string& mounts,
             const std::vector<std::pair<std::string, std::string>>& files) {
  const Folder root;
  write(root, "proc/self/cgroup", groups);
  write(root, "proc/self/mountinfo", mounts);
  for (const auto& [path, text] : files) write(root, path, text);
  return tda::cpu_quota(root.path).value_or(-1);
}

const std::string kVersion2 =
    "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup rw\n";
const std::string kVersion1 =
    "30 23 0:27 / /sys/fs/cgroup ro - tmpfs tmpfs rw,mode=755\n"
    "31 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "32 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n";
const std::string kCpu = "sys/fs/cgroup/cpu,cpuacct/";

}  // namespace

TEST(version_2_quota_of_the_own_group) {
  CHECK(quota("0::/\n", kVersion2, {{"sys/fs/cgroup/cpu.max", "150000 100000\n"}}) == 1.5);
  CHECK(quota("0::/a/b\n", kVersion2, {{"sys/fs/cgroup/a/b/cpu.max", "50000 200000\n"}}) == 0.25);
  CHECK(quota("0::/\n", kVersion2, {{"sys/fs/cgroup/cpu.max", "max 100000\n"}}) == -1);
}

TEST(the_least_quota_of_nested_groups_counts) {
  CHECK(quota("0::/a/b\n", kVersion2,
              {{"sys/fs/cgroup/a/cpu.max", "200000 100000\n"},
               {"sys/fs/cgroup/a/b/cpu.max", "400000 100000\n"},
               {"sys/fs/cgroup/c/cpu.max", "100000 100000\n"}}) == 2);
  CHECK(quota("0::/a/b\n", kVersion2,
              {{"sys/fs/cgroup/a/cpu.max", "300000 100000\n"},
               {"sys/fs/cgroup/a/b/cpu.max", "max 100000\n"}}) == 3);
  CHECK(quota("4:cpu,cpuacct:/a/b\n", kVersion1,
              {{kCpu + "a/cpu.cfs_quota_us", "250000\n"},
               {kCpu + "a/cpu.cfs_period_us", "100000\n"},
               {kCpu + "a/b/cpu.cfs_quota_us", "-1\n"},
               {kCpu + "a/b/cpu.cfs_period_us", "100000\n"}}) == 2.5);
}

TEST(version_1_quota_of_a_container) {
  const std::string groups = "5:memory:/docker/1f\n4:cpuacct,cpu:/docker/1f\n0::/\n";
  const std::string mounts =
      "32 30 0:29 /docker/1f /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n";
  const std::vector<std::pair<std::string, std::string>> files = {
      {kCpu + "cpu.cfs_quota_us", "120000\n"}, {kCpu + "cpu.cfs_period_us", "100000\n"}};
  CHECK(quota(groups, mounts, files) == 1.2);
  CHECK(quota(groups, kVersion1, files) == 1.2);  // the root's, since the group's has none
  CHECK(quota("4:cpu:/../elsewhere\n", mounts, files) == 1.2);  // a group that is not shown
  CHECK(quota("5:memory:/\n", "", files) == -1);
}

TEST(both_versions_at_a_time) {
  CHECK(quota("3:cpu,cpuacct:/\n0::/x\n",
              kVersion1 + "38 30 0:41 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
              {{kCpu + "cpu.cfs_quota_us", "400000\n"},
               {kCpu + "cpu.cfs_period_us", "100000\n"},
               {"sys/fs/cgroup/unified/x/cpu.max", "300000 100000\n"}}) == 3);
}

TEST(mount_points_with_spaces) {
  CHECK(quota("0::/a b\n", "31 23 0:28 / /my\\040groups rw - cgroup2 cgroup rw\n",
              {{"my groups/a b/cpu.max", "100000 100000\n"}}) == 1);
}

TEST(what_cannot_be_read_is_no_quota) {
  CHECK(!tda::cpu_quota("/nowhere"));
  CHECK(quota("nonsense\n0::\n", "nonsense - cgroup2\n" + kVersion2, {}) == -1);
  for (const char* text : {"", "max", "0 100000", "-5 100000", "100000 0", "many 100000"})
    CHECK(quota("0::/\n", kVersion2, {{"sys/fs/cgroup/cpu.max", text}}) == -1);
}

TEST(threads_are_no_more_than_this_process_may_use) {
  CHECK(tda::resolve_threads(3) == 3);
  const int threads = tda::resolve_threads(0);
  CHECK(threads >= 1);
  if (const auto quota = tda::cpu_quota()) CHECK(threads <= std::max(1.0, std::ceil(*quota)));
}

int main() { return run_tests(); }
