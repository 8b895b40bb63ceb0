#include "cuda/attn_launch.h"

namespace tml::cuda {
template void session_attn_sized<64>(const AttnParams&, const Launch&);
}  // namespace tml::cuda
