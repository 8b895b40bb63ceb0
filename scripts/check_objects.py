"""Check that no code compiled for one instruction set can be picked for another.

A kernel file is compiled once per instruction set. If such an object defined a symbol outside its
own namespace (say an inline function of the standard library), the linker would keep one copy for
the whole program, perhaps the AVX-512 one on a machine without AVX-512.

Usage: python scripts/check_objects.py [BUILD_DIR ...]   (default: every folder of build/)
Exits 0 when clean, 1 with the offending symbols, 2 when no object was found.
"""

import re
import subprocess
import sys
from pathlib import Path

# Weak data of the compiler (a pointer to the C++ personality routine): the same on every level.
HARMLESS = {"DW.ref.__gxx_personality_v0"}


def isa_of(path: Path) -> str:
    """The level whose object library an object file belongs to."""
    return next(part for part in path.parts if part.startswith("tml_cpu_"))[len("tml_cpu_") :][:-4]


def leaks(path: Path) -> list[str]:
    """Symbols other objects can see that are not in the object's own namespace."""
    isa = isa_of(path)
    # A nested name, possibly of a local (Z), its guard (GV), a table (TV...) or a const member (K).
    own = re.compile(rf"_Z(GV|T[VTIS])?Z*NK?3tml3cpu{len(isa)}{isa}")
    listing = subprocess.run(
        ["nm", "--defined-only", "--extern-only", "--format=posix", str(path)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    names = [line.split()[0] for line in listing.splitlines() if line.strip()]
    return [name for name in names if name not in HARMLESS and not own.match(name)]


def main(folders: list[str]) -> int:
    roots = [Path(folder) for folder in folders] or sorted(Path("build").glob("*"))
    paths = [
        path
        for root in roots
        # Sanitized builds do not inline the standard library; they are never shipped.
        if "sanitize" not in root.parts
        for path in sorted(root.glob("**/tml_cpu_*.dir/**/*.o"))
    ]
    if not paths:
        print("check_objects: no kernel objects found; build first")
        return 2
    found = {path: names for path in paths if (names := leaks(path))}
    for path, names in found.items():
        shown = subprocess.run(
            ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
        ).stdout
        print(f"{path}: visible outside namespace tml::cpu::{isa_of(path)}:")
        print("".join(f"  {line}\n" for line in shown.splitlines()), end="")
    print(f"check_objects: {len(paths)} objects, {len(found)} with leaks")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
