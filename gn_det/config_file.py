"""Reading config files and their bases, without running anything that they ask for.

Detectron2's `merge_from_file` reads with YAML's unsafe loader. Here each file is read once, with
its safe loader and by fvcore's rules for `_BASE_`, and Detectron2 is given the plain values.
"""

import argparse
import logging
import os
import posixpath
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import detectron2
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from .config import add_gn_config
from .data.prepare import register
from .errors import InputError
from .model_zoo import get_config_file
from .plain_yaml import CONFIG_ERRORS, MAX_BYTES, in_words, parse_yaml, refuse_large

BASE = "_BASE_"
MAX_FILES = 100
NETWORK = ("http://", "https://")


def add_base_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag that lets a config's bases lie on the network."""
    help_ = "download the bases of the config (_BASE_) that are http:// or https:// addresses"
    parser.add_argument("--allow-remote-base", action="store_true", help=help_)


def find_config(name: str) -> str:
    """The path of a config file, which may be named as those of `configs/` are there.

    Raises:
        InputError: if there is none.
    """
    if not os.path.lexists(name):
        return get_config_file(name)
    # Detectron2 logs the file, and would take such a name for a network address
    return os.path.abspath(name) if "://" in name else name


def read_config(
    config_file: str, opts: Sequence[str] = (), allow_remote_base: bool = False
) -> CfgNode:
    """The frozen config of a file and `KEY VALUE` pairs.

    A batch size among the pairs is used as given, as in Detectron2's own configs: it switches off
    the scaling by `SOLVER.REFERENCE_WORLD_SIZE`, unless that key is among the pairs too.

    Args:
        config_file: a path, or a name below `configs/`.
        opts: keys and values in turn.
        allow_remote_base: whether bases of the file may be downloaded.

    Raises:
        InputError: for a file that does not exist or would run code, and for keys or values that do
            not fit.
    """
    cfg = get_cfg()
    add_gn_config(cfg)
    path, opts = find_config(config_file), list(opts)
    merge_config_file(cfg, path, allow_remote_base)
    try:
        cfg.merge_from_list(opts)
        register((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
        if "SOLVER.IMS_PER_BATCH" in opts and "SOLVER.REFERENCE_WORLD_SIZE" not in opts:
            cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    except InputError:
        raise
    except CONFIG_ERRORS as error:
        raise InputError(f"config {path} with {opts}: {in_words(error)}") from None
    cfg.freeze()
    return cfg


def merge_config_file(cfg: CfgNode, path: str, allow_remote: bool = False) -> None:
    """Merge a config file into `cfg`, as `cfg.merge_from_file` does, but run no code in it.

    Args:
        allow_remote: whether its bases may lie on the network.

    Raises:
        InputError: for a file that cannot be read, or that Detectron2 does not take.
    """
    values = read_config_file(path, allow_remote)
    try:
        with tempfile.TemporaryDirectory() as folder:
            plain = os.path.join(folder, "config.yaml")
            with open(plain, "w", encoding="utf-8") as file:
                yaml.safe_dump(values, file, sort_keys=False)
            with _named_in_logs(plain, path):
                cfg.merge_from_file(plain, allow_unsafe=False)
    except CONFIG_ERRORS as error:
        raise InputError(f"config {path}: {in_words(error)}") from None


def read_config_file(path: str, allow_remote: bool = False) -> dict[str, Any]:
    """What a config file and its bases hold together.

    Bases are found and merged as fvcore does. They may be local files, and web addresses if
    `allow_remote`. YAML tags that run code are refused, except in the configs that Detectron2 comes
    with: some of these compute their anchors.

    Raises:
        InputError: for a file that cannot be read, is too large, or would run code.
    """
    try:
        return _Reader(allow_remote).read(path)
    except InputError:
        raise
    except CONFIG_ERRORS as error:
        raise InputError(f"config {path}: {in_words(error)}") from None


class _Reader:
    """Reads a config and its bases, of which there may be so many and no more."""

    def __init__(self, allow_remote: bool) -> None:
        self._allow_remote = allow_remote
        self._files = 0
        self._bytes = 0

    def read(self, path: str, derived: tuple[str, ...] = ()) -> dict[str, Any]:
        """The values of a file, merged into those of its bases.

        Args:
            derived: the configs that are based on this one.
        """
        if os.path.realpath(path) in map(os.path.realpath, derived):
            raise InputError(f"config {path} is based on itself, by {BASE}")
        self._files += 1
        if self._files > MAX_FILES:
            raise InputError(f"config {derived[0]} has more than {MAX_FILES} bases: merge some")
        name = f"config {path}" + (f", {BASE} of {derived[-1]}," if derived else "")
        local = self._fetch(path, name) if path.startswith(NETWORK) else os.path.realpath(path)
        own = not path.startswith(NETWORK) and _is_detectron2s(local)
        values = parse_yaml(self._content(local, name), name, own)
        if BASE not in values:
            return values
        bases = values.pop(BASE)
        merged: dict[str, Any] = {}
        for base in bases if isinstance(bases, list) else [bases]:
            _merge(self.read(_resolve(base, path), (*derived, path)), merged, path)
        _merge(values, merged, path)
        # What an alias stands for is merged into once, and grows wherever it stands
        refuse_large(merged, f"config {path} with its {BASE}")
        return merged

    def _fetch(self, address: str, name: str) -> str:
        """Download a base as Detectron2 does, and return the path of the copy."""
        if not self._allow_remote:
            raise InputError(
                f"{name} lies on the network: download it and name the copy, or train with "
                "--allow-remote-base"
            )
        # The path of the copy is made from the address: ".." must not lead out of the cache
        parts = urlsplit(address)
        address = urlunsplit(parts._replace(path=posixpath.normpath(parts.path or "/")))
        try:
            return PathManager.get_local_path(address)
        except (HTTPException, *CONFIG_ERRORS) as error:
            raise InputError(f"{name} cannot be downloaded: {in_words(error)}") from None

    def _content(self, path: str, name: str) -> str:
        """The text of a regular file; opening any other may wait without an end."""
        try:
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):
                raise InputError(f"{name} is not a regular file: name a YAML file")
            self._bytes += found.st_size
            if self._bytes > MAX_BYTES:
                raise InputError(f"{name} is too large: all files may have {MAX_BYTES} bytes")
            with open(path, "rb") as file:
                # No more than it has: some of /proc are empty, and never end
                return file.read(found.st_size).decode("utf-8")
        except OSError as error:
            raise InputError(f"{name} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InputError(f"{name} is not a text file in UTF-8") from None


def _resolve(base: object, path: str) -> str:
    """Where fvcore looks for a base of the config at `path`."""
    if not isinstance(base, str) or not base.isprintable():
        raise InputError(f"config {path}: its {BASE} {base!a:.80} is not the name of a file")
    if base.startswith("~"):
        base = os.path.expanduser(base)
    if base.startswith(("/", *NETWORK)):
        return base
    return os.path.join(os.path.dirname(path), base)


def _merge(values: dict[str, Any], base: dict[str, Any], path: str) -> None:
    """Put values into those of a base, as fvcore does."""
    for key, value in values.items():
        if isinstance(value, dict) and key in base:
            if not isinstance(base[key], dict):
                raise InputError(f"config {path}: {key} is a section, but a value in its {BASE}")
            _merge(value, base[key], path)
        else:
            base[key] = value


def _is_detectron2s(path: str) -> bool:
    """Whether a file came with Detectron2, given its real path."""
    package = Path(detectron2.__file__).resolve().parent
    # In a checkout that is a link to the folder beside the package
    own = (package, (package / "model_zoo" / "configs").resolve())
    return any(folder in Path(path).parents for folder in own)


@contextmanager
def _named_in_logs(plain: str, path: str) -> Iterator[None]:
    """Let Detectron2's warnings about a config's version name the user's file."""

    def rename(record: logging.LogRecord) -> bool:
        record.msg = str(record.msg).replace(plain, path)
        return True

    loggers = [logging.getLogger(f"detectron2.config.{part}") for part in ("config", "compat")]
    for logger in loggers:
        logger.addFilter(rename)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(rename)
