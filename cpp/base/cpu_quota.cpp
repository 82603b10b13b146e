#include "base/cpu_quota.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace tda {
namespace {

namespace fs = std::filesystem;

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, separator);) parts.push_back(part);
  return parts;
}

bool lists_cpu(const std::string& names) {
  return std::ranges::count(split(names, ','), "cpu") > 0;
}

/// /proc writes spaces and the like in paths as a backslash and three octal digits.
std::string unescape(const std::string& text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const auto digits = text.substr(i + 1, 3);
    const bool escaped = text[i] == '\\' && digits.size() == 3 &&
                         digits.find_first_not_of("01234567") == std::string::npos;
    out += escaped ? static_cast<char>(std::stoi(digits, nullptr, 8)) : text[i];
    if (escaped) i += 3;
  }
  return out;
}

/// A mounted hierarchy of control groups that may limit CPU time.
struct Hierarchy {
  bool version2;
  std::string root;  // the group at the mount point
  fs::path mount;
};

std::vector<Hierarchy> hierarchies(const fs::path& root) {
  std::vector<Hierarchy> found;
  std::ifstream in(root / "proc/self/mountinfo");
  for (std::string line; std::getline(in, line);) {
    const std::size_t end = line.find(" - ");  // optional fields stand before it
    if (end == line.npos) continue;
    const auto mount = split(line, ' '), system = split(line.substr(end + 3), ' ');
    if (mount.size() < 5 || system.size() < 3) continue;
    const bool version2 = system[0] == "cgroup2";
    if (version2 || (system[0] == "cgroup" && lists_cpu(system[2])))
      found.push_back(
          {version2, unescape(mount[3]), root / fs::path(unescape(mount[4])).relative_path()});
  }
  return found;
}

/// The process's group in a hierarchy, relative to its mount point. A group that the mount does not
/// show is taken for the one at the mount point, as container runtimes arrange it.
fs::path group_in(const Hierarchy& hierarchy, const fs::path& root) {
  std::ifstream in(root / "proc/self/cgroup");
  for (std::string line; std::getline(in, line);) {
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == line.npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (hierarchy.version2 ? !controllers.empty() : !lists_cpu(controllers)) continue;
    const fs::path group = fs::path(line.substr(second + 1)).lexically_relative(hierarchy.root);
    const bool shown = !group.empty() && *group.begin() != "..";
    return shown && group != "." ? group : fs::path();
  }
  return {};
}

/// A quota that a group has of its own; a version 2 group without one says "max", of version 1 -1.
std::optional<double> quota_of(const fs::path& group, bool version2) {
  double quota = 0, period = 0;
  if (version2) {
    std::ifstream(group / "cpu.max") >> quota >> period;
  } else {
    std::ifstream(group / "cpu.cfs_quota_us") >> quota;
    std::ifstream(group / "cpu.cfs_period_us") >> period;
  }
  if (quota > 0 && period > 0) return quota / period;
  return {};
}

}  // namespace

std::optional<double> cpu_quota(const fs::path& root) {
  std::optional<double> least;
  for (const Hierarchy& hierarchy : hierarchies(root)) {
    for (fs::path group = group_in(hierarchy, root);; group = group.parent_path()) {
      const auto quota = quota_of(hierarchy.mount / group, hierarchy.version2);
      if (quota) least = std::min(least.value_or(*quota), *quota);
      if (group.empty()) break;
    }
  }
  return least;
}

}  // namespace tda
