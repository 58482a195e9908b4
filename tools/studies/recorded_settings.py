"""The settings that the results in a study's folder belong to."""

import argparse
import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from gn_det.errors import InputError
from gn_det.files import write_whole


def check_settings(args: argparse.Namespace) -> None:
    """Refuse a folder with results of another backbone, other data or other overrides.

    Raises:
        InputError: naming the file that records them, or a file that cannot be read.
    """
    folders = dict(args.data) | ({"probe": args.probe} if args.probe else {})
    settings = {"backbone": digest_of([Path(args.backbone)]), "opts": args.opts}
    settings |= {
        f"data {name}": digest_of([Path(folder) / f"instances_{s}.json" for s in ("train", "val")])
        for name, folder in folders.items()
    }
    record = args.output_dir / "settings.json"
    before = json.loads(record.read_text()) if record.exists() else {}
    if differ := [key for key in before.keys() & settings.keys() if before[key] != settings[key]]:
        raise InputError(
            f"{args.output_dir} has results of another {' and '.join(sorted(differ))} ({record} "
            "differs): choose another folder with --output-dir"
        )
    with write_whole(record) as file:
        file.write(json.dumps(before | settings))


def digest_of(paths: Sequence[Path]) -> str:
    """SHA-256 of the content of files.

    Raises:
        InputError: naming a file that cannot be read.
    """
    digest = sha256()
    for path in paths:
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
    return digest.hexdigest()
