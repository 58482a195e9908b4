"""The command `gn-det`, which is also `python -m gn_det` and the scripts in `tools/`."""

import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__
from .errors import NO_DETECTRON2

# Command -> the module whose `run` it calls, and its description
COMMANDS = {
    "train": ("gn_det.engine.train", "train or evaluate a detector"),
    "pretrain": ("gn_det.engine.pretrain", "pretrain a backbone as an image classifier"),
    "convert": (
        "gn_det.engine.convert_backbone",
        "convert a pretrained backbone, also from BN to GN",
    ),
    "compare": ("gn_det.comparison.compare", "compare norms on a custom dataset"),
    "predict": ("gn_det.engine.predict", "run a trained model on images"),
    "export": ("gn_det.engine.export", "export a trained model to ONNX, OpenVINO or TorchScript"),
    "demo": ("gn_det.comparison.demo", "compare frozen BN with GN on a generated dataset"),
}


def usage() -> str:
    """The help text: one line for each command."""
    lines = [f"  {name:10}{text}" for name, (_, text) in COMMANDS.items()]
    head = [
        "usage: gn-det COMMAND [ARGUMENTS]",
        "",
        "Group Normalization for Detectron2.",
        "",
        "example: gn-det train --help",
        "",
    ]
    return "\n".join([*head, *lines])


def run_command(name: str, argv: Sequence[str] | None = None) -> None:
    """Run one of `COMMANDS`.

    Args:
        name: the command.
        argv: its arguments; defaults to `sys.argv[1:]`.

    Raises:
        SystemExit: if a package that the command needs is not installed.
    """
    try:
        module = import_module(COMMANDS[name][0])
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        raise SystemExit(f"error: {NO_DETECTRON2 if missing == 'detectron2' else error}") from None
    module.run(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `gn-det`.

    Args:
        argv: the name of a command and its arguments; defaults to `sys.argv[1:]`.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(__version__)
    elif name in COMMANDS:
        # argparse prints this name in --help and errors
        sys.argv[0] = f"gn-det {name}"
        run_command(name, arguments)
    else:
        raise SystemExit(f"error: there is no command {name}\n\n{usage()}")
