"""The command `gn-det`, also available as `python -m gn_det` and as the scripts in `tools/`."""

import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__
from .errors import NO_DETECTRON2

# Command -> the module whose `run` it calls, and what it does
COMMANDS = {
    "train": ("gn_det.engine.train", "train or evaluate a detector"),
    "pretrain": ("gn_det.engine.pretrain", "pretrain a backbone by classifying images"),
    "convert": ("gn_det.engine.convert_backbone", "convert a pretrained backbone, BN to GN too"),
    "compare": ("gn_det.comparison.compare", "compare norms on a custom dataset"),
    "predict": ("gn_det.engine.predict", "run a trained model on images"),
    "demo": ("gn_det.comparison.demo", "compare BN* with GN on an embedded dataset"),
}


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name:10}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: gn-det COMMAND ... (COMMAND --help for its flags)", "", *lines])


def run_command(name: str, argv: Sequence[str] | None = None) -> None:
    """Run one of `COMMANDS`.

    Args:
        argv: its arguments; those of this process by default.

    Raises:
        SystemExit: if a package that it needs is not installed.
    """
    try:
        module = import_module(COMMANDS[name][0])
    except ImportError as error:
        raise SystemExit(
            f"error: {NO_DETECTRON2 if error.name == 'detectron2' else error}"
        ) from None
    module.run(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `gn-det`.

    Args:
        argv: the name of a command and its arguments; those of this process by default.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(__version__)
    elif name in COMMANDS:
        # The name that its own --help and errors begin with
        sys.argv[0] = f"gn-det {name}"
        run_command(name, arguments)
    else:
        raise SystemExit(f"error: there is no command {name}\n\n{usage()}")
