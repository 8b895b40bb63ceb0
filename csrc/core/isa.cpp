#include "core/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace tml {
namespace {

constexpr const char* kNames[kNumIsas] = {"scalar", "avx2", "avx512", "avx512bf16"};
std::atomic<int> g_active{-1};

Isa best() {
  for (int level = kNumIsas - 1; level > 0; --level)
    if (isa_supported(static_cast<Isa>(level))) return static_cast<Isa>(level);
  return Isa::kScalar;
}

Isa parse(const char* source, const char* name) {
  for (int level = 0; level < kNumIsas; ++level) {
    if (std::strcmp(name, kNames[level]) != 0) continue;
    if (!isa_supported(static_cast<Isa>(level)))
      throw std::invalid_argument(std::string(source) + ": this CPU has no " + name);
    return static_cast<Isa>(level);
  }
  throw std::invalid_argument(std::string(source) +
                              ": expected scalar, avx2, avx512 or avx512bf16, got '" + name + "'");
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_supported(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    case Isa::kAvx512Bf16:
      return isa_supported(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
  }
  return false;
}

Isa active_isa() {
  const int level = g_active.load(std::memory_order_relaxed);
  if (level >= 0) return static_cast<Isa>(level);
  const char* forced = std::getenv("TML_ISA");
  const Isa isa = forced != nullptr && *forced != '\0' ? parse("TML_ISA", forced) : best();
  g_active.store(static_cast<int>(isa), std::memory_order_relaxed);
  return isa;
}

void set_isa(const char* name) {
  g_active.store(static_cast<int>(parse("isa", name)), std::memory_order_relaxed);
}

}  // namespace tml
