#include "cuda/moe_bwd.h"

namespace tml::cuda {

void launch_moe_wgrad(const MoeWgradOp::Params& params, const Launch& launch) {
  launch_gemm<MoeWgradOp, kWgradTokens, kWgradConsumers>("moe_bwd", launch, params,
                                                         MoeWgradOp::num_tiles(params));
}

}  // namespace tml::cuda
