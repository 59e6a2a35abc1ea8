"""What pip may install beside the torch that is there; the Makefile calls it in each environment.

    python tests/package/constrain.py          # a constraints file: torch as it is, and the pins
    python tests/package/constrain.py test integrations   # what attn_ext asks for with these extras

A build of torch with CUDA pins packages itself (its Triton, NVIDIA's libraries).  Such names are
left out of both, since another version of them beside that torch cannot be installed.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

PINS = Path(__file__).with_name("constraints.txt")


def name_of(requirement: str) -> str:
    """The normalised name at the head of a requirement (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", requirement)[0]).lower()


def pinned_by_torch() -> set[str]:
    """Names of which the installed torch takes one version only."""
    requirements = metadata.requires("torch") or []
    return {name_of(r) for r in requirements if "==" in r.split(";")[0] and "extra" not in r}


def constraints() -> list[str]:
    """The lines of a constraints file for this environment."""
    taken = pinned_by_torch()
    lines = [line for line in PINS.read_text().splitlines() if line and not line.startswith("#")]
    torch = f"torch=={metadata.version('torch')}"
    return [torch, *(line for line in lines if name_of(line) not in taken)]


def requirements(extras: list[str]) -> list[str]:
    """What the installed attn_ext and these extras of it ask for, beside torch.  By name, attn_ext
    itself could come from the package index, where the name may be a stranger's.
    """
    taken = pinned_by_torch() | {"torch"}
    found = []
    for requirement in metadata.requires("attn_ext"):
        wanted, _, marker = requirement.partition(";")
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", marker)
        if (extra and extra[1] not in extras) or name_of(wanted) in taken:
            continue
        linux = "; platform_system == 'Linux'" if "platform_system" in marker else ""
        found.append(wanted.strip() + linux)
    return found


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:]) if sys.argv[1:] else constraints()))
