// tml_cpp_tests [name-part [repeats]]: runs every test whose name contains name-part, repeats times
// (a profiler wants many), and prints one line a test. Exits 1 when one failed, 2 when none ran.
#include <pybind11/embed.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "tests/check.h"

namespace py = pybind11;

namespace {

int run(const char* part, int repeats) {
  using Clock = std::chrono::steady_clock;
  int passed = 0, failed = 0;
  for (const tml::tests::Test& test : tml::tests::registry()) {
    if (std::strstr(test.name, part) == nullptr) continue;
    const auto start = Clock::now();
    try {
      for (int i = 0; i < repeats; ++i) test.run();
      const std::chrono::duration<double, std::milli> took = Clock::now() - start;
      std::printf("ok    %-48s %9.2f ms\n", test.name, took.count() / repeats);
      ++passed;
    } catch (const std::exception& error) {
      std::printf("FAIL  %s\n      %s\n", test.name, error.what());
      ++failed;
    }
    std::fflush(stdout);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed > 0 ? 1 : passed == 0 ? 2 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  const char* part = argc > 1 ? argv[1] : "";
  const int repeats = argc > 2 ? std::atoi(argv[2]) : 1;
  if (argc > 3 || repeats < 1) {
    std::fprintf(stderr, "usage: %s [name-part [repeats]]\n", argv[0]);
    return 2;
  }
  // The interpreter of the environment this was configured for, so that its packages are found.
  PyConfig config;
  PyConfig_InitPythonConfig(&config);
  PyConfig_SetBytesString(&config, &config.program_name, TML_PYTHON);
  const py::scoped_interpreter python(&config, 0, nullptr, false);
  return run(part, repeats);
}
