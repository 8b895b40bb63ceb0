"""The whole model in plain torch, without a cache: the specification the kernels are tested on.

Rounding points follow the contract: a product of matrices accumulates in float32 and is rounded
once to the model's dtype; the relative bias, attention scores and probabilities, router, expert
sums and logits stay float32 (the attention kernel rounds its probabilities before they meet V).
In float32 nothing is rounded and the result is transformers'.

Legend: T tokens, D hidden, H query heads, K kv heads, C head width, R relative states, I inner
width, V vocabulary, F audio frames, M mel bins, P patches.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tml_core.errors import InvalidArgument, InvalidType
from tml_core.media.segments import Audio, Block, Image, Segment, Tokens
from tml_core.model.config import ENCODER_NORM_EPS, ModelConfig, TextConfig

__all__ = [
    "embed_audio_reference",
    "embed_patches_reference",
    "embed_tokens_reference",
    "reference_hidden",
    "reference_logits",
]

Weights = Mapping[str, Tensor]


def reference_logits(
    config: ModelConfig,
    weights: Weights,
    segments: Sequence[Segment | Block] | Sequence[int] | Tensor,
    visible_end: Tensor | None = None,
) -> Tensor:
    """Next-token logits after every position of one whole sequence.

    ``segments``: token ids, or `Tokens`, `Audio` (with ``bins``), `Image` (with ``patches``) and
    `Block`. ``visible_end``: int [T], the last position each token may attend to; by default its
    own position, or the end of its block. ``weights``: canonical names, all of one dtype but those
    that stay float32.

    Returns float32 [T, unpadded vocabulary]. Raises `InvalidArgument` or `InvalidType` naming the
    argument that does not fit the model.
    """
    h_TD = reference_hidden(config, weights, segments, visible_end)
    head_VD = weights["lm_head.weight"][: config.text.unpadded_vocab_size]
    return h_TD.float() @ head_VD.float().T


def reference_hidden(
    config: ModelConfig,
    weights: Weights,
    segments: Sequence[Segment | Block] | Sequence[int] | Tensor,
    visible_end: Tensor | None = None,
) -> Tensor:
    """What the head sees: [T, D] after the final norm and the division by ``mup``.

    Arguments and errors are those of `reference_logits`.
    """
    text = config.text
    x_TD, block_end = _embed(config, weights, segments)
    visible_end_T = _visible_end(visible_end, block_end)
    if not len(x_TD):
        return x_TD
    for layer in range(text.num_layers):
        prefix = f"model.language_model.layers.{layer}."
        w = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
        a_TD = _rms_norm(x_TD, w["input_layernorm.weight"], text.rms_eps)
        a_TD = _attention(text, layer, w, a_TD, visible_end_T)
        x_TD = x_TD + _short_conv(a_TD, w["attn_sconv.conv1d.weight"])
        m_TD = _rms_norm(x_TD, w["post_attention_layernorm.weight"], text.rms_eps)
        m_TD = _dense_mlp(w, m_TD) if text.layer_is_dense[layer] else _moe(text, w, m_TD)
        x_TD = x_TD + _short_conv(m_TD, w["mlp_sconv.conv1d.weight"])
    h_TD = _rms_norm(x_TD, weights["model.language_model.norm.weight"], text.rms_eps)
    return (h_TD.float() / text.mup).to(h_TD.dtype)


def embed_tokens_reference(config: ModelConfig, weights: Weights, ids_T: Tensor) -> Tensor:
    """Embedding rows of ``ids_T`` (int64 [T]), normalised: [T, D]."""
    if ids_T.numel() and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < config.text.vocab_size:
        raise InvalidArgument(
            f"ids: must be 0 to {config.text.vocab_size - 1}, "
            f"got {int(ids_T.min())} to {int(ids_T.max())}"
        )
    prefix = "model.language_model.embed_tokens."
    rows_TD = weights[prefix + "weight"][ids_T]
    return _rms_norm(rows_TD, weights[prefix + "embed_norm.weight"], config.text.rms_eps)


def embed_audio_reference(config: ModelConfig, weights: Weights, bins_FM: Tensor) -> Tensor:
    """One vector per dMel frame: the sum of one embedding row per channel, normalised: [F, D]."""
    if config.audio is None:
        raise InvalidArgument("Audio: the model has no audio encoder")
    num_mel_bins, num_levels = config.audio.num_mel_bins, config.audio.num_levels
    if bins_FM.shape[1] != num_mel_bins:
        raise InvalidArgument(f"bins: must be [F, {num_mel_bins}], got {list(bins_FM.shape)}")
    if bins_FM.numel() and not 0 <= int(bins_FM.min()) <= int(bins_FM.max()) < num_levels:
        raise InvalidArgument(
            f"bins: must be 0 to {num_levels - 1}, got {int(bins_FM.min())} to {int(bins_FM.max())}"
        )
    table = weights["model.audio_tower.embed_audio_tokens.embed_audio_tokens.weight"]
    rows_FM = bins_FM.long() + torch.arange(num_mel_bins) * num_levels
    sum_FD = table[rows_FM].float().sum(dim=1).to(table.dtype)
    return _rms_norm(sum_FD, weights["model.audio_tower.norm.weight"], ENCODER_NORM_EPS)


def embed_patches_reference(config: ModelConfig, weights: Weights, patches: Tensor) -> Tensor:
    """One vector per patch [P, 2, side, side, 3] by the hMLP: fold, project, norm, GELU: [P, D]."""
    if config.vision is None:
        raise InvalidArgument("Image: the model has no vision encoder")
    vision = config.vision
    expected = (vision.temporal_size, vision.patch_size, vision.patch_size, vision.num_channels)
    if tuple(patches.shape[1:]) != expected:
        raise InvalidArgument(
            f"patches: must be [P, {', '.join(map(str, expected))}], got {list(patches.shape)}"
        )
    prefix = "model.vision_tower."
    x = patches.to(weights[prefix + "final_norm.weight"].dtype)
    for index, layer in enumerate(vision.layers(config.text.hidden_size)):
        num, t, h, w, c = x.shape
        ft, fs = layer.t_fold, layer.hw_fold
        x = x.reshape(num, t // ft, ft, h // fs, fs, w // fs, fs, c)
        x = x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(num, t // ft, h // fs, w // fs, -1)
        x = _linear(x, weights[f"{prefix}encoder_layers.{index}.projection.weight"])
        if layer.has_norm:
            norm = weights[f"{prefix}encoder_layers.{index}.layer_norm.weight"]
            x = F.gelu(_rms_norm(x, norm, ENCODER_NORM_EPS).float()).to(x.dtype)
    x_PD = x.reshape(len(patches), config.text.hidden_size)
    return _rms_norm(x_PD, weights[prefix + "final_norm.weight"], ENCODER_NORM_EPS)


def _embed(
    config: ModelConfig,
    weights: Weights,
    segments: Sequence[Segment | Block] | Sequence[int] | Tensor,
) -> tuple[Tensor, Tensor]:
    """Input vectors [T, D] and the last visible position [T] that the blocks imply."""
    if isinstance(segments, Tensor) or all(isinstance(one, int) for one in segments):
        segments = [Tokens(segments)]  # type: ignore[arg-type]
    pieces, ends = [], []
    start = 0
    for segment in segments:
        is_block = isinstance(segment, Block)
        parts: Iterable[object] = segment.segments if isinstance(segment, Block) else (segment,)
        piece_TD = torch.cat([_embed_segment(config, weights, part) for part in parts])
        stop = start + len(piece_TD)
        own = torch.arange(start, stop)
        ends.append(torch.full_like(own, stop - 1) if is_block else own)
        pieces.append(piece_TD)
        start = stop
    return torch.cat(pieces), torch.cat(ends)


def _embed_segment(config: ModelConfig, weights: Weights, segment: object) -> Tensor:
    if isinstance(segment, Tokens):
        return embed_tokens_reference(config, weights, torch.as_tensor(segment.ids))
    if isinstance(segment, Audio) and segment.bins is not None:
        return embed_audio_reference(config, weights, segment.bins)
    if isinstance(segment, Image) and segment.patches is not None:
        return embed_patches_reference(config, weights, segment.patches)
    raise InvalidType(
        "segments: expected Tokens, Audio with bins, Image with patches or Block, "
        f"got {type(segment).__name__}"
    )


def _visible_end(given: Tensor | None, by_blocks_T: Tensor) -> Tensor:
    if given is None:
        return by_blocks_T
    num_tokens = len(by_blocks_T)
    if tuple(given.shape) != (num_tokens,):
        raise InvalidArgument(f"visible_end: must be [{num_tokens}], got {list(given.shape)}")
    given_T = given.long()
    if bool(((given_T < torch.arange(num_tokens)) | (given_T >= num_tokens)).any()):
        raise InvalidArgument("visible_end: must be at least the token's own position and below T")
    return given_T


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return (x.float() @ weight.float().T).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x_f32 = x.float()
    normed = x_f32 * torch.rsqrt(x_f32.pow(2).mean(-1, keepdim=True) + eps)
    # Rounded before the weight is applied, and again after.
    return weight * normed.to(x.dtype)


def _short_conv(x_TD: Tensor, weight: Tensor) -> Tensor:
    """y[t] = x[t] + sum_j weight[j] * x[t - taps + 1 + j], zeros before the sequence."""
    taps = weight.shape[-1]
    x_DT = x_TD.float().T
    y_DT = F.conv1d(F.pad(x_DT, (taps - 1, 0)), weight, groups=weight.shape[0])
    return (x_DT + y_DT).T.to(x_TD.dtype)


def _attention(
    text: TextConfig, layer: int, w: Weights, x_TD: Tensor, visible_end_T: Tensor
) -> Tensor:
    num_tokens, head_size = len(x_TD), text.head_size(layer)
    num_heads, num_kv_heads = text.heads(layer), text.kv_heads(layer)
    is_sliding = text.layer_is_sliding[layer]
    heads = (num_tokens, -1, head_size)
    q_THC = _linear(x_TD, w["self_attn.q_proj.weight"]).view(heads)
    k_TD = _short_conv(
        _linear(x_TD, w["self_attn.k_proj.weight"]), w["self_attn.k_sconv.conv1d.weight"]
    )
    v_TD = _short_conv(
        _linear(x_TD, w["self_attn.v_proj.weight"]), w["self_attn.v_sconv.conv1d.weight"]
    )
    q_THC = _rms_norm(q_THC, w["self_attn.q_norm.weight"], text.rms_eps)
    k_TKC = _rms_norm(k_TD.view(heads), w["self_attn.k_norm.weight"], text.rms_eps)
    r_THR = _linear(x_TD, w["self_attn.r_proj.weight"]).view(num_tokens, num_heads, text.d_rel)

    position_T = torch.arange(num_tokens)
    if not is_sliding and text.log_scaling_floor is not None:
        length_T = (position_T + 1).float() / text.log_scaling_floor
        tau_T = 1.0 + text.log_scaling_alpha * torch.log(length_T.clamp(min=1.0))
        q_THC = (q_THC.float() * tau_T[:, None, None]).to(q_THC.dtype)
        r_THR = (r_THR.float() * tau_T[:, None, None]).to(r_THR.dtype)

    distance_TT = position_T[:, None] - position_T[None, :]
    is_visible_TT = position_T[None, :] <= visible_end_T[:, None]
    if is_sliding:
        is_visible_TT = is_visible_TT & (distance_TT < text.window)

    # bias[h, q, k] = (r[q, h] @ proj)[q - k], zero where the distance has no column.
    rel_len = text.rel_len(layer)
    bias_HTL = (r_THR.float() @ w["self_attn.rel_logits_proj.proj"].float()).transpose(0, 1)
    column_TT = distance_TT.clamp(0, rel_len - 1).expand(num_heads, -1, -1)
    has_bias_TT = (distance_TT >= 0) & (distance_TT < rel_len)
    bias_HTT = bias_HTL.gather(2, column_TT) * has_bias_TT

    group = num_heads // num_kv_heads
    k_HTC = k_TKC.float().repeat_interleave(group, dim=1).transpose(0, 1)
    v_HTC = v_TD.view(heads).float().repeat_interleave(group, dim=1).transpose(0, 1)
    score_HTT = q_THC.float().transpose(0, 1) @ k_HTC.transpose(1, 2) / head_size + bias_HTT
    weight_HTT = score_HTT.masked_fill(~is_visible_TT, -math.inf).softmax(dim=-1)
    out_TD = (weight_HTT @ v_HTC).transpose(0, 1).reshape(num_tokens, -1).to(x_TD.dtype)
    return _linear(out_TD, w["self_attn.o_proj.weight"])


def _swiglu(x_TD: Tensor, gate_ID: Tensor, up_ID: Tensor) -> Tensor:
    """silu(x gate) * (x up) in float32: [T, I]."""
    x_f32 = x_TD.float()
    return F.silu(x_f32 @ gate_ID.float().T) * (x_f32 @ up_ID.float().T)


def _dense_mlp(w: Weights, x_TD: Tensor) -> Tensor:
    act_TI = _swiglu(x_TD, w["mlp.gate_proj.weight"], w["mlp.up_proj.weight"]).to(x_TD.dtype)
    y_TD = act_TI.float() @ w["mlp.down_proj.weight"].float().T
    return (y_TD * w["mlp.global_scale"].float()).to(x_TD.dtype)


def _route(text: TextConfig, w: Weights, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen experts [T, top_k], ascending, and the weights [T, top_k + num_shared] of these and
    of the shared experts, rounded to the model's dtype."""
    logits_TE = x_TD.float() @ w["mlp.gate.weight"].float().T
    routed_TE = logits_TE[:, : text.num_experts]
    choice_TE = routed_TE.sigmoid() + w["mlp.gate.e_score_correction_bias"].float()
    # A stable sort gives ties to the lower expert id.
    chosen = choice_TE.sort(dim=1, descending=True, stable=True).indices[:, : text.top_k]
    chosen = chosen.sort(dim=1).values
    competing = torch.cat((routed_TE.gather(1, chosen), logits_TE[:, text.num_experts :]), dim=1)
    share = F.logsigmoid(competing).softmax(dim=1)
    return chosen, (share * text.route_scale * w["mlp.gate.global_scale"].float()).to(x_TD.dtype)


def _moe(text: TextConfig, w: Weights, x_TD: Tensor) -> Tensor:
    chosen, share = _route(text, w, x_TD)
    y_TD = torch.zeros(x_TD.shape)
    for expert in range(text.num_experts):
        token, slot = (chosen == expert).nonzero(as_tuple=True)
        gate_ID, up_ID = w["mlp.experts.gate_up_proj"][expert].chunk(2)
        act_TI = _swiglu(x_TD[token], gate_ID, up_ID).to(x_TD.dtype)
        down_TD = act_TI.float() @ w["mlp.experts.down_proj"][expert].float().T
        y_TD[token] += down_TD * share[token, slot, None].float()
    for index in range(text.num_shared):
        # A shared expert's weight is applied before its down projection, a routed one's after.
        gamma_T1 = share[:, text.top_k + index, None].float()
        gate_ID = w["mlp.shared_experts.gate_proj"][index]
        up_ID = w["mlp.shared_experts.up_proj"][index]
        act_TI = (_swiglu(x_TD, gate_ID, up_ID) * gamma_T1).to(x_TD.dtype)
        y_TD += act_TI.float() @ w["mlp.shared_experts.down_proj"][index].float().T
    return y_TD.to(x_TD.dtype)
