"""``python -m dicekernels``, or ``dicekernels``: the version, what can be run, the backends that run here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ._version import __version__
from .backends import native
from .dispatch import available_backends

COMMANDS = {
    "python -m dicekernels.env": "versions, build, processor, GPUs, why a backend does not run (--json)",
    "python -m dicekernels.demo": "train on a real brain with MONAI's loss and with ours (--help)",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what there is."""
    parser = argparse.ArgumentParser(
        prog="dicekernels", description="Print the version, what can be run, and the backends that run here."
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.parse_args(arguments)
    print(f"dicekernels {__version__}: Dice-family losses for segmentation, as fused kernels")
    width = max(map(len, COMMANDS))
    for command, meaning in COMMANDS.items():
        print(f"  {command:<{width}}  {meaning}")
    isa = native.instruction_set()
    refused = isa.startswith("refused")
    shown = [f"cpu ({isa})" if name == "cpu" else name for name in available_backends()]
    if refused:
        shown.remove(f"cpu ({isa})")
    print(f"backends that run here: {', '.join(shown)}")
    if refused:
        print(f"cpu {isa}")


if __name__ == "__main__":
    main()
