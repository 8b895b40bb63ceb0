#include "cuda/linear.h"

namespace tml::cuda {
template void linear_tiled<float, 32, 1>(const LinearParams&, bool, const Launch&);
}  // namespace tml::cuda
