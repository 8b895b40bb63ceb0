#include "cuda/moe.h"

namespace tml::cuda {
template void moe_down<32, 1>(const DownOp<32, 1>::Params&, const Launch&, std::int64_t);
}  // namespace tml::cuda
