#include "cuda/linear.h"

namespace tml::cuda {
template void linear_tiled<Bf16, 64, 1>(const LinearParams&, bool, const Launch&);
}  // namespace tml::cuda
