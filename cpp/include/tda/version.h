// The library's version, as the program was linked with it.
#pragma once

#include <string_view>

namespace [[gnu::visibility("default")]] tda {

/// "major.minor.patch" by the rules of semantic versioning (https://semver.org).
std::string_view version();

}  // namespace tda
