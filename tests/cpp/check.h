// A test harness on one page. Each test file is one program:
//
//   TEST(name) {
//     CHECK(condition);
//     CHECK_THROWS(expression, tda::OptionError, "part of the message");
//   }
//   int main() { return run_tests(); }
#pragma once

#include <cstdio>
#include <exception>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*body)();
};
inline std::vector<Test> tests;
inline int failures = 0;

inline void fail(const char* file, int line, const std::string& what) {
  std::printf("%s:%d: %s\n", file, line, what.c_str());
  ++failures;
}

struct Registered {
  Registered(const char* name, void (*body)()) { tests.push_back({name, body}); }
};

}  // namespace check

#define TEST(name)                                                \
  static void test_##name();                                      \
  static check::Registered registered_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(condition)                                                     \
  do {                                                                       \
    if (!(condition)) check::fail(__FILE__, __LINE__, "false: " #condition); \
  } while (0)

#define CHECK_NEAR(a, b, tolerance)                                    \
  do {                                                                 \
    const double a_ = (a), b_ = (b), t_ = (tolerance);                 \
    if (!(a_ - b_ <= t_ && b_ - a_ <= t_)) {                           \
      std::ostringstream o_;                                           \
      o_ << #a " = " << a_ << ", expected " << b_ << " within " << t_; \
      check::fail(__FILE__, __LINE__, o_.str());                       \
    }                                                                  \
  } while (0)

#define CHECK_THROWS(expression, type, part)                                        \
  do {                                                                              \
    try {                                                                           \
      (void)(expression);                                                           \
      check::fail(__FILE__, __LINE__, "nothing thrown by " #expression);            \
    } catch (const type& e) {                                                       \
      if (std::string(e.what()).find(part) == std::string::npos)                    \
        check::fail(__FILE__, __LINE__,                                             \
                    std::string("message lacks \"") + (part) + "\": " + e.what());  \
    } catch (const std::exception& e) {                                             \
      check::fail(__FILE__, __LINE__, std::string("other exception: ") + e.what()); \
    }                                                                               \
  } while (0)

inline int run_tests() {
  int failed = 0;
  for (const auto& test : check::tests) {
    const int before = check::failures;
    try {
      test.body();
    } catch (const std::exception& e) {
      check::fail(test.name, 0, std::string("exception: ") + e.what());
    }
    if (check::failures > before) ++failed;
    std::printf("%s %s\n", check::failures > before ? "FAIL" : "ok  ", test.name);
  }
  std::printf("%zu passed, %d failed\n", check::tests.size() - failed, failed);
  return failed ? 1 : 0;
}
