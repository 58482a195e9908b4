"""Read randomly damaged or malicious annotations, images, weights and configs.

    python tests/faults/fuzz.py [N] [--seed S]

N files of each kind are read in a child process. A reader may accept a file or refuse it with an
`InputError`. No file may run code, overwrite files, crash the process or hang it.
"""

import argparse
import json
import os
import pickle
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hostile_annotations import hostile_annotations, hostile_image
from hostile_configs import hostile_config
from hostile_weights import hostile_weights
from in_child import calls

from gn_det.checkpoint.checkpointer import StrictCheckpointer
from gn_det.checkpoint.facts import describe_file
from gn_det.checkpoint.read import read_weights
from gn_det.config_file import find_config, read_config
from gn_det.data import make_shapes
from gn_det.data.clean import Source
from gn_det.data.image_files import examine, read_image
from gn_det.data.prepare import prepare
from gn_det.errors import InputError

STRANGE = [
    *(None, True, -1, 0, 0.5, 1e308, float("nan"), float("inf"), 10**30, 2**63, "", "0", "a" * 999),
    *(
        "\0",
        "../../x",
        "/dev/null",
        "\ud800",
        [],
        {},
        [[]],
        [[[]]],
        {"": None},
        [None],
        [1e400] * 6,
    ),
]


class Canary:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Change, remove, duplicate or reverse a few bytes, or truncate the rest."""
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        place, length = rng.randrange(len(damaged) + 1), rng.choice([1, 2, 8, 200])
        part = damaged[place : place + length]
        new: list[Callable[[], bytes]] = [
            lambda length=length: rng.randbytes(length),
            lambda: b"",
            lambda part=part: bytes(part) * 2,
            lambda part=part: bytes(part)[::-1],
        ]
        damaged[place : place + length] = rng.choice(new)()
    return bytes(damaged[: rng.randrange(len(damaged) + 1)] if rng.random() < 0.1 else damaged)


def damage_values(content: Any, rng: random.Random) -> Any:
    """Replace some values in nested lists and dicts by unusual ones, or remove them."""
    holders: list[Any] = []

    def collect(value: Any) -> None:
        if isinstance(value, dict | list) and value:
            holders.append(value)
            for inner in value.values() if isinstance(value, dict) else value:
                collect(inner)

    content = json.loads(json.dumps(content))
    collect(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        holder = rng.choice(holders)
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        if not keys:
            continue
        key = rng.choice(keys)
        if rng.random() < 0.2:
            del holder[key]
        else:
            holder[key] = rng.choice(STRANGE)
    return content


class Annotations:
    """Reads COCO annotations, as `--train` and `--val` do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_shapes(folder / "data", num_train=3, num_val=1, seed=3)
        self.intact = (folder / "data" / "instances_train.json").read_bytes()
        self.val = Source(folder / "data" / "instances_val.json", folder / "data" / "images")

    def read(self, rng: random.Random) -> None:
        path = self.folder / "data" / "damaged.json"
        if rng.random() < 0.5:
            path.write_text(json.dumps(hostile_annotations(rng, json.loads(self.intact))))
        elif rng.random() < 0.5:
            path.write_bytes(damage_bytes(self.intact, rng))
        else:
            path.write_text(json.dumps(damage_values(json.loads(self.intact), rng)))
        written = self.folder / "prepared"
        shutil.rmtree(written, ignore_errors=True)
        prepare(Source(path, self.folder / "data" / "images"), self.val, written)


class Images:
    """Reads images, as `--train` and `predict` do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, rng: random.Random) -> None:
        path = hostile_image(rng, self.folder)
        examine(path)
        read_image(path)


class Weights:
    """Reads checkpoints, as `MODEL.WEIGHTS` does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4))
        state = self.model.state_dict()
        torch.save({"model": state, "iteration": 3}, folder / "intact.pth")
        torch.save(state, folder / "bare.pth", _use_new_zipfile_serialization=False)
        arrays = {name: tensor.numpy() for name, tensor in state.items()}
        (folder / "intact.pkl").write_bytes(
            pickle.dumps({"model": arrays, "__author__": "somebody"}, protocol=2)
        )
        np.savez(folder / "intact.npz", **arrays)
        self.files = [
            folder / name for name in ("intact.pth", "bare.pth", "intact.pkl", "intact.npz")
        ]

    def read(self, rng: random.Random) -> None:
        if rng.random() < 0.6:
            path = hostile_weights(rng, self.folder)
            read_weights(path, rng.choice(["cpu", "meta"]))
            describe_file(path)
            StrictCheckpointer(self.model, complete=True).load(str(path))
            return
        intact = rng.choice(self.files)
        path = self.folder / f"damaged{rng.choice([intact.suffix, '.pth', '.pkl', '.pyth'])}"
        path.write_bytes(damage_bytes(intact.read_bytes(), rng))
        if rng.random() < 0.1:
            content = {"model": self.model.state_dict(), "x": Canary(self.folder / "canary")}
            torch.save(content, path) if rng.random() < 0.5 else path.write_bytes(
                pickle.dumps(content)
            )
        StrictCheckpointer(self.model, complete=True).load(str(path))


class Configs:
    """Reads configs, as `--config-file` does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # A config with all keys
        self.intact = read_config(SHIPPED).dump()

    def read(self, rng: random.Random) -> None:
        path = self.folder / "damaged.yaml"
        if rng.random() < 0.5:
            path = hostile_config(rng, self.folder, find_config(SHIPPED))
            read_config(str(path))
            return
        if rng.random() < 0.4:
            text = damage_bytes(self.intact.encode(), rng)
        else:
            values = damage_values(yaml.safe_load(self.intact), rng)
            if rng.random() < 0.2:
                bases = [*STRANGE, "damaged.yaml", find_config(SHIPPED), ".", "none.yaml"]
                values["_BASE_"] = rng.choice(bases)
            text = json.dumps(values).encode()
        if rng.random() < 0.1:
            text += (
                f"\nX: !!python/object/apply:os.system ['touch {self.folder}/canary']\n".encode()
            )
        path.write_bytes(text)
        read_config(str(path))


SHIPPED = "Shapes/mask_rcnn_R_18_FPN_gn.yaml"
READERS = {"annotations": Annotations, "images": Images, "weights": Weights, "configs": Configs}


def fuzz(kind: str, count: int, seed: int, folder: Path) -> list[str]:
    """Read random files of a kind.

    Args:
        kind: a key of `READERS`.
        count: number of files.
        seed: of the random numbers.
        folder: is created for the files.

    Returns:
        a description, or a traceback, of each failure.
    """
    folder.mkdir()
    reader = READERS[kind](folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def read(number: int) -> str:
        try:
            reader.read(random.Random(f"{seed}/{kind}/{number}"))
        except InputError as error:
            # Findings in annotations are reported line by line
            if "\n" in str(error) and kind != "annotations":
                return f"more than one line: {error}"
        return ""

    failures = []
    for number, failure in calls(read, count):
        if (folder / "canary").exists():
            failure = f"code in the file was run; {failure}"
            (folder / "canary").unlink()
        if failure:
            failures.append(f"{kind} {number}: {failure}")
    if [path for path, content in before.items() if path.read_bytes() != content]:
        failures.append(f"{kind}: files have been changed")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="example: python tests/faults/fuzz.py 100 --seed 1",
    )
    help_ = "number of files of each kind (default: %(default)s)"
    parser.add_argument("count", nargs="?", type=int, default=1250, metavar="N", help=help_)
    help_ = "random seed (default: %(default)s)"
    parser.add_argument("--seed", type=int, default=0, metavar="S", help=help_)
    args = parser.parse_args()
    failed = 0
    for kind in READERS:
        with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
            failures = fuzz(kind, args.count, args.seed, Path(folder, kind))
        print(*failures, sep="\n", end="\n" * bool(failures))
        print(f"{args.count} damaged {kind}: {len(failures)} failures", flush=True)
        failed += len(failures)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
