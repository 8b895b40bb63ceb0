// Which instruction set the CPU kernels run on: the best the machine has, or what TML_ISA names.
#pragma once

namespace tml {

enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
inline constexpr int kNumIsas = 4;

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);

// The active level; decided once from TML_ISA (throws std::invalid_argument on an unknown or
// unsupported name) and changed only by set_isa.
Isa active_isa();
void set_isa(const char* name);

}  // namespace tml
