#include "cuda/moe.h"

namespace tml::cuda {
template void moe_down<16, 1>(const DownOp<16, 1>::Params&, const Launch&, std::int64_t);
}  // namespace tml::cuda
