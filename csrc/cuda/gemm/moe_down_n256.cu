#include "cuda/moe.h"

namespace tml::cuda {
template void moe_down<256, 2>(const DownOp<256, 2>::Params&, const Launch&, std::int64_t);
}  // namespace tml::cuda
