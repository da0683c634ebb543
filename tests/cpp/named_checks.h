// Named checks of a test program, and what they expect.
#pragma once

#include <cstdio>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Check {
  const char* name;
  void (*run)();
};
inline std::vector<Check>& checks() {
  static std::vector<Check> all;
  return all;
}
struct Registered {
  Registered(const char* name, void (*run)()) { checks().push_back({name, run}); }
};

// Of a test program's main(): runs the check that the first argument names, 2 if there is none.
inline int run_check(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  for (const Check& check : checks()) {
    if (name != check.name) continue;
    try {
      check.run();
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", check.name, error.what());
      return 1;
    }
    std::printf("%s: passed\n", check.name);
    return 0;
  }
  std::printf("'%s' is none of the checks\n", name.c_str());
  return 2;
}

// What follows is the body of a function.
#define CHECK(name)                                       \
  static void name();                                     \
  static const Registered registered_##name(#name, name); \
  static void name()

template <typename A, typename B>
void expect_equal(const A& got, const B& expected, const char* what, int line) {
  if (got == static_cast<A>(expected)) return;
  std::ostringstream text;
  text << "line " << line << ": " << what << " is " << got << ", expected " << expected;
  throw std::logic_error(text.str());
}
#define EXPECT_EQUAL(got, expected) expect_equal(got, expected, #got, __LINE__)
#define EXPECT(condition) expect_equal(static_cast<bool>(condition), true, #condition, __LINE__)

// What a launch throws; empty if it does not.
template <typename F>
std::string message_of(F f) {
  try {
    f();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}
inline bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}
