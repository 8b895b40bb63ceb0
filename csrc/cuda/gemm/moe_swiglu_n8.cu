#include "cuda/moe.h"

namespace tml::cuda {
template void moe_swiglu<8, 1>(const SwigluOp<8, 1>::Params&, const Launch&, std::int64_t);
}  // namespace tml::cuda
