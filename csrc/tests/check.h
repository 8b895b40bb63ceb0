// A test is a function registered by name; a check that does not hold throws with its place.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace tml::tests {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& registry() {
  static std::vector<Test> tests;
  return tests;
}

struct Register {
  Register(const char* name, void (*run)()) { registry().push_back({name, run}); }
};

template <class A, class B>
void check_equal(const A& a, const B& b, const char* text, const char* file, int line) {
  if (a == b) return;
  std::ostringstream message;
  message << file << ":" << line << ": " << text << " (" << a << " against " << b << ")";
  throw std::runtime_error(message.str());
}

inline void check(bool holds, const char* text, const char* file, int line) {
  if (!holds)
    throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + text);
}

}  // namespace tml::tests

#define TML_TEST(name)                                              \
  static void name();                                               \
  static const ::tml::tests::Register register_##name(#name, name); \
  static void name()
#define TML_CHECK(condition) ::tml::tests::check(condition, #condition, __FILE__, __LINE__)
#define TML_CHECK_EQUAL(a, b) ::tml::tests::check_equal(a, b, #a " == " #b, __FILE__, __LINE__)
