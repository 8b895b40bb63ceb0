"""Ways to run the trainer's model: recomputed layers, a compiled step, plain torch references."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_checkpoints import make_hf_model, save_hf
from test_train_module import distance, transcript
from tml_core.errors import InvalidArgument
from tml_core.model.config import ModelConfig
from tml_core.model.weights import load_weights
from tml_core.ops.router import load_balance_counts
from tml_core.train import PackedBatch, TrainableModel
from tml_core.train.op_set import KERNELS, REFERENCES


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(make_hf_model("mixed", seed=2)[0], tmp_path_factory.mktemp("mixed"))


def model_of(directory: Path, dtype: torch.dtype, **named: object) -> TrainableModel:
    config = ModelConfig.from_path(directory)
    weights = load_weights(directory, config, torch.float32)
    return TrainableModel(config, weights, dtype, **named)  # type: ignore[arg-type]


def batch_of(model: TrainableModel) -> PackedBatch:
    transcripts = [transcript(model.config, seed, 30) for seed in range(2)]
    return PackedBatch.pack(transcripts, model.config)


def results(model: TrainableModel, batch: PackedBatch) -> list[Tensor]:
    model.zero_grad()
    out = model.run(batch, with_entropy=True)
    assert out.entropy is not None
    (out.logprobs.sum() + 0.1 * out.entropy.sum()).backward()
    grads = [one.grad for one in model.parameters()]
    assert all(one is not None for one in grads)
    return [out.logprobs.detach(), out.entropy.detach(), *out.expert_ids, *grads]  # type: ignore[list-item]


def test_recomputed_layers_give_the_same_bits(directory: Path) -> None:
    plain = model_of(directory, torch.bfloat16)
    batch = batch_of(plain)
    kept = results(plain, batch)
    recomputed = results(model_of(directory, torch.bfloat16, recompute=True), batch)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_recomputed_layers_keep_less(directory: Path) -> None:
    sizes = []
    for recompute in (False, True):
        model = model_of(directory, torch.float32, recompute=recompute)
        kept: dict[int, int] = {}

        def pack(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        own = {one.untyped_storage().data_ptr() for one in model.state_dict().values()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = model(batch_of(model)).sum()
        sizes.append(sum(size for pointer, size in kept.items() if pointer not in own))
        out.backward()
    assert sizes[1] < sizes[0] / 2


def test_a_pass_hands_out_the_experts(directory: Path) -> None:
    model = model_of(directory, torch.float32)
    batch = batch_of(model)
    text = model.config.text
    out = model.run(batch)
    assert model.sparse_layers == (2, 3, 4, 5) and len(out.expert_ids) == 4
    assert out.entropy is None
    for layer, ids in zip(model.sparse_layers, out.expert_ids, strict=True):
        assert ids.dtype == torch.int32 and list(ids.shape) == [batch.num_tokens, text.top_k]
        counts = load_balance_counts(ids, text.num_experts)
        assert int(counts.sum()) == batch.num_tokens * text.top_k
        model.router_bias(layer)[0] += 100.0  # now every token of this layer takes expert 0
    forced = model.run(batch).expert_ids
    assert all(bool((ids[:, 0] == 0).all()) for ids in forced)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_references_compute_the_same_model(directory: Path, dtype: torch.dtype) -> None:
    """What a device without kernels runs."""
    kernels = model_of(directory, dtype)
    references = model_of(directory, dtype, ops=REFERENCES)
    batch = batch_of(kernels)
    ours, theirs = kernels.run(batch), references.run(batch)
    ours.logprobs.sum().backward()
    theirs.logprobs.sum().backward()
    # fp32 sums in other orders; bf16 rounds at places that may flip
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert torch.linalg.norm(ours.logprobs - theirs.logprobs) < tolerance * torch.linalg.norm(
        ours.logprobs
    )
    grads = {name: one.grad for name, one in kernels.named_parameters()}
    exact = {name: one.grad for name, one in references.named_parameters()}
    # gradients of bf16 are as noisy as the choice of experts
    assert distance(grads, exact) < (1e-4 if dtype == torch.float32 else 0.5)  # type: ignore[arg-type]


def test_every_op_of_a_set_is_called(directory: Path) -> None:
    called = set()

    def spied(name: str) -> object:
        def call(*args: object, **named: object) -> object:
            called.add(name)
            return getattr(KERNELS, name)(*args, **named)

        return call

    names = {field.name for field in dataclasses.fields(KERNELS)}
    ops = type(KERNELS)(**{name: spied(name) for name in names})  # type: ignore[arg-type]
    model = model_of(directory, torch.bfloat16, ops=ops)
    batch = batch_of(model)
    model(batch)
    model.run(batch, weights=torch.ones(batch.num_tokens))
    assert called == names


def test_a_loss_of_known_weights_has_the_gradients_of_its_logprobs(directory: Path) -> None:
    one, other = (model_of(directory, torch.bfloat16) for _ in range(2))
    batch = batch_of(one)
    weights = torch.rand(batch.num_tokens, generator=torch.Generator().manual_seed(1))
    out, plain = one.run(batch, weights=weights), other.run(batch)
    assert out.loss is not None and torch.equal(out.logprobs, plain.logprobs)
    out.loss.backward()
    plain.logprobs.backward(-weights)
    grads = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, grads[name].grad), name
    with pytest.raises(InvalidArgument, match="weights: expected none where the entropy"):
        one.run(batch, weights=weights, with_entropy=True)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_whole_step_compiles(recompute: bool, tmp_path: Path) -> None:
    # three layers are enough
    save_hf(make_hf_model("paged", seed=2)[0], tmp_path)
    model = model_of(tmp_path, torch.bfloat16, recompute=recompute)
    batch = batch_of(model)
    expected = results(model, batch)
    model.run = torch.compile(model.run, fullgraph=True, backend="aot_eager")  # type: ignore[method-assign]
    got = results(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_references_make_tensors_where_their_inputs_are(directory: Path) -> None:
    """Whatever forgets its device lands on another one here, and cannot be used."""
    model = model_of(directory, torch.bfloat16, ops=REFERENCES)
    batch = batch_of(model)
    expected = results(model, batch)
    with torch.device("meta"):
        got = results(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
