"""Files of object proposals, which Detectron2 unpickles."""

import zipfile
from pathlib import Path

from detectron2.config import CfgNode

from ..checkpoint.read import read_content
from ..errors import InputError


def check_proposals(cfg: CfgNode, eval_only: bool) -> None:
    """Refuse proposal files that would run code, before Detectron2 loads them.

    Raises:
        InputError: for a file that is missing, on the network, or holds more than plain values.
    """
    if not cfg.MODEL.LOAD_PROPOSALS:
        return
    for split in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        key = f"DATASETS.PROPOSAL_FILES_{split}"
        names, sets = cfg.DATASETS[f"PROPOSAL_FILES_{split}"], cfg.DATASETS[split]
        # Those of test sets that are not tested are left unread
        if len(names) < len(sets) or (split == "TRAIN" and len(names) > len(sets)):
            raise InputError(f"{key} names {len(names)} files for {len(sets)} data sets")
        for name in names:
            _check(str(name), key)


def _check(name: str, key: str) -> None:
    if "://" in name:
        raise InputError(f"{key} {name} lies on the network: download it and name the copy")
    path = Path(name)
    if not path.is_file():
        raise InputError(f"{key} {name} does not exist, or is not a regular file")
    with path.open("rb") as file:
        begin = file.read(16)
    # Such a file could be one thing to `read_content` and another to `pickle.load`
    if zipfile.is_zipfile(path) or path.suffix == ".safetensors" or b"{" in begin[8:9]:
        raise InputError(f"{key} {name} is not a pickle file")
    try:
        read_content(path)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
