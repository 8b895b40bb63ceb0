#include "cuda/wgrad.h"

namespace tml::cuda {
template void launch_wgrad<float>(const char*, const WgradKernel<float>::Params&, const Launch&);
}  // namespace tml::cuda
