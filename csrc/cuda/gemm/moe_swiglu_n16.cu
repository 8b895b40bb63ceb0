#include "cuda/moe.h"

namespace tml::cuda {
template void moe_swiglu<16, 1>(const SwigluOp<16, 1>::Params&, const Launch&, std::int64_t);
}  // namespace tml::cuda
