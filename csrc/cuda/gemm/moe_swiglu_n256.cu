#include "cuda/moe.h"

namespace tml::cuda {
template void moe_swiglu<256, 2>(const SwigluOp<256, 2>::Params&, const Launch&, std::int64_t);
}  // namespace tml::cuda
