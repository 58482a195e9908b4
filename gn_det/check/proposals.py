"""Checks of files of precomputed proposals, which Detectron2 loads with `pickle`."""

import zipfile
from pathlib import Path

from detectron2.config import CfgNode

from ..checkpoint.read import read_content
from ..errors import InputError


def check_proposals(cfg: CfgNode, eval_only: bool) -> None:
    """Refuse proposal files that could run code, before Detectron2 loads them.

    Args:
        cfg: the config; without `MODEL.LOAD_PROPOSALS` nothing is checked.
        eval_only: whether the files for training are skipped.

    Raises:
        InputError: for a file that is missing, remote, or contains more than plain values, and for
            a number of files that differs from the number of datasets.
    """
    if not cfg.MODEL.LOAD_PROPOSALS:
        return
    for split in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        key = f"DATASETS.PROPOSAL_FILES_{split}"
        names, sets = cfg.DATASETS[f"PROPOSAL_FILES_{split}"], cfg.DATASETS[split]
        # Detectron2 accepts surplus files for testing and does not read them
        if len(names) < len(sets) or (split == "TRAIN" and len(names) > len(sets)):
            raise InputError(f"{key} names {len(names)} files for {len(sets)} datasets")
        for name in names:
            _check(str(name), key)


def _check(name: str, key: str) -> None:
    if "://" in name:
        raise InputError(f"{key} {name} is remote: download it and name the local copy")
    path = Path(name)
    if not path.is_file():
        raise InputError(f"{key} {name} does not exist, or is not a regular file")
    with path.open("rb") as file:
        begin = file.read(16)
    # `read_content` reads these formats, while `pickle.load` would run pickle code in the file
    if zipfile.is_zipfile(path) or path.suffix == ".safetensors" or b"{" in begin[8:9]:
        raise InputError(f"{key} {name} is not a pickle file")
    try:
        read_content(path)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
