#include "cuda/wgrad.h"

namespace tml::cuda {
template void launch_wgrad<Bf16>(const char*, const WgradKernel<Bf16>::Params&, const Launch&);
}  // namespace tml::cuda
