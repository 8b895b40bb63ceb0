// tml_core._ext: the compiled module. Each file of csrc/bindings registers one room of it.
#include "bindings/module.h"

#include <nanobind/nanobind.h>

#include <exception>

#include "bindings/tensor.h"
#include "core/contract.h"
#include "core/isa.h"

namespace nb = nanobind;

namespace {

// Our argument errors arrive as the package's own classes, each also the builtin it refines.
void translate(const std::exception_ptr& error, void*) {
  const auto raise = [](const char* name, const char* message) {
    const nb::object type = nb::module_::import_("tml_core.errors").attr(name);
    PyErr_SetString(type.ptr(), message);
  };
  try {
    std::rethrow_exception(error);
  } catch (const tml::ArgumentTypeError& e) {
    raise("InvalidType", e.what());
  } catch (const std::invalid_argument& e) {
    raise("InvalidArgument", e.what());
  }
}

}  // namespace

NB_MODULE(_ext, m) {
  m.doc() = "Compiled kernels of tml_core; use tml_core.ops, which checks and documents them.";
  nb::register_exception_translator(translate);

  m.attr("CONTRACT_VERSION") = tml::contract::kVersion;
  m.attr("PAGE_LEN") = tml::contract::kPageLen;
  m.attr("SEGMENT_LEN") = tml::contract::kSegmentLen;
  m.attr("CONV_TAPS") = tml::contract::kConvTaps;
  m.attr("VOCAB_BLOCK") = tml::contract::kVocabBlock;
  m.attr("PANEL") = tml::contract::kPanel;
  m.attr("LANES") = tml::contract::kLanes;
  m.attr("GRAD_BLOCK") = tml::contract::kGradBlock;
#ifdef TML_WITH_CUDA
  m.attr("WITH_CUDA") = true;
#else
  m.attr("WITH_CUDA") = false;
#endif

  m.def(
      "isa", [] { return tml::isa_name(tml::active_isa()); },
      "Instruction set of the CPU kernels: scalar, avx2, avx512 or avx512bf16.");
  m.def("set_isa", &tml::set_isa, nb::arg("name"));
  m.def("supported_isas", []() -> nb::typed<nb::list, nb::str> {
    nb::list names;
    for (int level = 0; level < tml::kNumIsas; ++level)
      if (tml::isa_supported(static_cast<tml::Isa>(level)))
        names.append(tml::isa_name(static_cast<tml::Isa>(level)));
    return nb::typed<nb::list, nb::str>(names);
  });

  tml::bind_memory(m);
  tml::bind_cuda(m);
  tml::bind_cuda_train(m);
  tml::bind_decoder_step(m);
  tml::bind_token_loop(m);
  tml::bind_linear(m);
  tml::bind_linear_logp(m);
  tml::bind_linear_train(m);
  tml::bind_norm_train(m);
  tml::bind_conv_train(m);
  tml::bind_lm_head(m);
  tml::bind_router(m);
  tml::bind_machine(m);
  tml::bind_moe(m);
  tml::bind_session_attn(m);
  tml::bind_session_attn_bwd(m);
  tml::bind_attn_prologue(m);
  tml::bind_embed(m);
  tml::bind_rms_norm(m);
  tml::bind_sconv_norm(m);
}
