// The rooms of the compiled module; each is defined in the file of its name.
#pragma once

#include <nanobind/nanobind.h>

namespace tml {

void bind_memory(nanobind::module_& m);
void bind_cuda(nanobind::module_& m);
void bind_cuda_train(nanobind::module_& m);
void bind_decoder_step(nanobind::module_& m);
void bind_linear(nanobind::module_& m);
void bind_linear_logp(nanobind::module_& m);
void bind_linear_train(nanobind::module_& m);
void bind_norm_train(nanobind::module_& m);
void bind_conv_train(nanobind::module_& m);
void bind_lm_head(nanobind::module_& m);
void bind_machine(nanobind::module_& m);
void bind_moe(nanobind::module_& m);
void bind_session_attn(nanobind::module_& m);
void bind_session_attn_bwd(nanobind::module_& m);
void bind_token_loop(nanobind::module_& m);
void bind_router(nanobind::module_& m);
void bind_attn_prologue(nanobind::module_& m);
void bind_embed(nanobind::module_& m);
void bind_rms_norm(nanobind::module_& m);
void bind_sconv_norm(nanobind::module_& m);

}  // namespace tml
