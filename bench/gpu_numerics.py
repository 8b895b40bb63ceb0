"""What a GPU's tensor cores do with bf16 (bench/gpu/numerics.cu), and who else does the same.

    python bench/gpu_numerics.py [--trials 64] [--json PATH]

Compiles the probe with nvcc, runs it, then compares torch's products (cuBLAS, grouped_mm) with the
contract chain of ``ops.cuda.linear`` where the module was built with CUDA. Without a GPU it says
what is missing and exits 3. ``--emulated`` runs the probe's logic on the CPU instead.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "bench" / "gpu" / "numerics.cu"
GPU_FLAGS = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "--fmad=false"]


def build(folder: Path, emulated: bool) -> Path:
    """Compile the probe; returns the program."""
    program = folder / "numerics"
    include = ["-I", str(ROOT / "csrc")]
    if emulated:
        simt = ROOT / "csrc" / "cuda" / "host" / "simt.cpp"
        command = ["g++", "-std=c++17", "-O2", "-ffp-contract=off", "-x", "c++", *include]
        command += [str(SOURCE), str(simt)]
    else:
        command = ["nvcc", *GPU_FLAGS, *include, str(SOURCE)]
    subprocess.run([*command, "-o", str(program)], check=True)
    return program


def probe(trials: int, emulated: bool = False) -> dict[str, Any]:
    """The probe's report."""
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder), emulated)
        done = subprocess.run([str(program), str(trials)], capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stderr.strip())
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def torch_products() -> dict[str, str]:
    """Share of outputs that torch's products and the contract chain have equal, bit for bit."""
    from tml_core.ops import cuda

    cuda.require(torch.cuda.current_device())
    generator = torch.Generator("cuda").manual_seed(1)
    found = {}
    for tokens, depth, rows in [(1, 2048, 2048), (16, 2048, 5120), (512, 4096, 4096)]:
        x = torch.randn(tokens, depth, generator=generator, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(rows, depth, generator=generator, device="cuda", dtype=torch.bfloat16)
        ours = cuda.linear(x, cuda.pack_weight(w))
        name = f"T={tokens} K={depth} N={rows}"
        found[f"torch.mm {name}"] = f"{float((torch.mm(x, w.T) == ours).float().mean()):.6f}"
        if hasattr(torch, "_grouped_mm"):
            ends = torch.tensor([tokens], device="cuda", dtype=torch.int32)
            theirs = torch._grouped_mm(x, w.T.unsqueeze(0), offs=ends)
            share = float((theirs == ours).float().mean())
            found[f"torch._grouped_mm {name}"] = f"{share:.6f}"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--emulated", action="store_true")
    args = parser.parse_args()
    if not args.emulated and (not torch.cuda.is_available() or shutil.which("nvcc") is None):
        print(
            "gpu_numerics: needs nvcc, an H100 or H200 and a torch built for CUDA", file=sys.stderr
        )
        return 3
    report = probe(args.trials, args.emulated)
    if not args.emulated:
        report["capability"] = list(torch.cuda.get_device_capability())
        report["torch"] = torch.__version__
        report["peers"] = torch_products()
    text = json.dumps(report, indent=1)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n")
    wrong = [form for form in report["forms"] if form["differences"]]
    for form in wrong:
        print(f"differs: {form['form']} on {form['data']}: {form['differences']} outputs")
    fitting = [m for m in report["models"] if not any(m["misses"].values())]
    print(f"{report['device']}: {len(report['forms'])} comparisons, {len(wrong)} with differences")
    print(f"models that explain every output: {fitting}")
    return 0 if report["all_forms_equal"] and report["default_model_holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
