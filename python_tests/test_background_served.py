"""A peer's server: ``transformers serve`` on a tiny random model made here, asked as any endpoint.

It runs when the test extra is installed (transformers[serving]: fastapi, uvicorn, accelerate).
"""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="needs the test extra: pip install '.[test]'")
pytest.importorskip("uvicorn", reason="needs the test extra: pip install '.[test]'")
pytest.importorskip("accelerate", reason="needs the test extra: pip install '.[test]'")

from background_kit import WAIT_S
from chat_stub import ChatStub, text
from tml_core.background import BackgroundRunner, Failed, Final, OpenAIBackend, Partial

START_S = 120.0


def make_model(folder: Path) -> None:
    """A random Llama of 0.1 M parameters with a byte-level tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    wrapped.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    )
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(url, model) of a running ``transformers serve``."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder)
    home = tmp_path_factory.mktemp("hf")
    (home / "hub").mkdir()
    with ChatStub(text("")) as stub:  # a port that is free now
        port = int(stub.url.split(":")[2].partition("/")[0])
    with (home / "log").open("w+") as log:
        process = subprocess.Popen(
            [
                str(Path(sys.executable).with_name("transformers")),
                *("serve", str(folder), "--device", "cpu"),
                *("--host", "127.0.0.1", "--port", str(port)),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "HF_HOME": str(home),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
        )
        try:
            url = f"http://127.0.0.1:{port}"
            give_up = time.monotonic() + START_S
            while not _answers(f"{url}/health"):
                if process.poll() is not None or time.monotonic() > give_up:
                    log.seek(0)
                    pytest.fail(f"transformers serve did not start: {log.read()[-2000:]}")
                time.sleep(0.2)  # between two questions, nothing depends on it
            yield f"{url}/v1", str(folder)
        finally:
            process.terminate()
            process.wait(WAIT_S)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1.0) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_a_job_is_answered_by_transformers(served: tuple[str, str]) -> None:
    url, model = served
    backend = OpenAIBackend(model, base_url=url, api_key="none", max_tokens=12)
    with BackgroundRunner(backend, max_jobs=2) as runner:
        jobs = [runner.submit("hello"), runner.submit("again")]
        for job in jobs:
            outcome = job.result(120.0)
            assert isinstance(outcome, Final), outcome
            pieces = [one.text for one in job if isinstance(one, Partial)]
            # It is random, but it is text, and it came in pieces.
            assert "".join(pieces) == outcome.text
            assert len(pieces) >= 1


def test_a_model_it_does_not_have_fails_the_job(served: tuple[str, str]) -> None:
    url, _ = served
    backend = OpenAIBackend("no/such-model", base_url=url, api_key="none", max_retries=0)
    with BackgroundRunner(backend) as runner:
        assert isinstance(runner.submit("hello").result(120.0), Failed)
