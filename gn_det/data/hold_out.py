"""Hold out a part of a prepared training set, to choose settings without the validation set."""

import json
from hashlib import sha256
from pathlib import Path

from ..files import read_regular, write_whole
from .image_reader import MAX_BYTES
from .prepare import MARK
from .split import split

# Share of the training images on which settings are compared
FRACTION = 0.25


def hold_out(train: Path, folder: Path, group_by: str | None = None) -> tuple[Path, Path]:
    """Split a prepared training set into a smaller training set and a held-out set.

    Args:
        train: training annotations that `prepare` wrote.
        folder: where the two annotation files are written; images are not copied.
        group_by: as in `split`.

    Returns:
        paths of the smaller training set and of the held-out set, which are names of datasets too.

    Raises:
        InputError: if there are too few groups for two sets, or an image cannot be read.
    """
    content = json.loads(train.read_text())
    images = content["images"]
    # Groups are found in the names of the user's file
    entries = [{**image, "file_name": image["listed_as"]} for image in images]
    digests = [sha256(read_regular(i["file_name"], MAX_BYTES)).hexdigest() for i in images]
    held = split(entries, digests, FRACTION, group_by)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, wanted in (("train", False), ("held_out", True)):
        mine = [image for image, chosen in zip(images, held, strict=True) if chosen == wanted]
        ids = {image["id"] for image in mine}
        objects = [a for a in content["annotations"] if a["image_id"] in ids]
        part = {"images": mine, "annotations": objects, "categories": content["categories"]}
        path = (folder / f"{name}.json").resolve()
        with write_whole(path) as file:
            file.write(f"{MARK}}}, {json.dumps(part)[1:]}\n")
        paths.append(path)
    return paths[0], paths[1]
