"""``_fibers``: the device's bindings over kernels that run on the host (`make test-cpp`)."""

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
SOURCES = ("csrc/cuda", "csrc/ops", "csrc/core/tensor_core.h")


@functools.cache
def fibers() -> ModuleType | None:
    """The module; None where it is not built, or a source is younger."""
    found = list((ROOT / "build" / "cpp" / "csrc" / "tests").glob("_fibers*.so"))
    paths = [ROOT / name for name in SOURCES]
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    files += (ROOT / "csrc" / "bindings").glob("cuda*")
    if not found or found[0].stat().st_mtime < max(file.stat().st_mtime for file in files):
        return None
    spec = importlib.util.spec_from_file_location("_fibers", found[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
