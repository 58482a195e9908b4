"""Reading of config files and their `_BASE_` files without running code in them.

Detectron2's `merge_from_file` uses YAML's unsafe loader. Here, files are read with the safe loader
and merged by fvcore's rules for `_BASE_`, and Detectron2 receives only the resulting plain values.
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
from .plain_yaml import CONFIG_ERRORS, MAX_BYTES, describe_error, parse_yaml, refuse_large

BASE = "_BASE_"
MAX_FILES = 100
NETWORK = ("http://", "https://")


def add_base_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag `--allow-remote-base` to a parser."""
    help_ = "download _BASE_ configs with http:// or https:// addresses (default: refuse them)"
    parser.add_argument("--allow-remote-base", action="store_true", help=help_)


def find_config(name: str) -> str:
    """Find a config file.

    Args:
        name: its path, or the path of a shipped config below `configs/`.

    Returns:
        a path that Detectron2 can open.

    Raises:
        InputError: if the file does not exist.
    """
    if not os.path.lexists(name):
        return get_config_file(name)
    # Detectron2 opens the file to log it, and would take a name with "://" for a remote address
    return os.path.abspath(name) if "://" in name else name


def read_config(
    config_file: str, opts: Sequence[str] = (), allow_remote_base: bool = False
) -> CfgNode:
    """Read a config file and apply `KEY VALUE` overrides.

    Args:
        config_file: a path, or the path of a shipped config below `configs/`.
        opts: overrides, as in `override_config`.
        allow_remote_base: whether `_BASE_` files may be downloaded.

    Returns:
        the frozen config.

    Raises:
        InputError: for a file that does not exist or would run code, and for unknown keys or
            invalid values.
    """
    cfg = get_cfg()
    add_gn_config(cfg)
    path = find_config(config_file)
    merge_config_file(cfg, path, allow_remote_base)
    return override_config(cfg, opts, path)


# Detectron2 refuses unknown keys by name only, so the file itself says whose they are
HEADER = """\
# This config has keys of gn_det. To read it in another program, add them before merge_from_file:
#   import gn_det; gn_det.add_gn_config(cfg)
"""


def dump_config(cfg: CfgNode) -> str:
    """The YAML of a config, below a comment that says how other programs can read it."""
    return HEADER + cfg.dump()


def override_config(cfg: CfgNode, opts: Sequence[str], path: str) -> CfgNode:
    """Apply `KEY VALUE` overrides to a copy of a config, and register prepared datasets.

    A batch size in `opts` is used as given: it disables scaling by `SOLVER.REFERENCE_WORLD_SIZE`,
    unless that key is in `opts` too.

    Args:
        cfg: a config with gn_det's keys; not changed.
        opts: alternating keys and values.
        path: the config file, for error messages.

    Returns:
        the frozen copy.

    Raises:
        InputError: for unknown keys or invalid values.
    """
    cfg, opts = cfg.clone(), list(opts)
    cfg.defrost()
    try:
        cfg.merge_from_list(opts)
        register((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
        if "SOLVER.IMS_PER_BATCH" in opts and "SOLVER.REFERENCE_WORLD_SIZE" not in opts:
            cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    except InputError:
        raise
    except CONFIG_ERRORS as error:
        raise InputError(f"config {path} with {opts}: {describe_error(error)}") from None
    if not isinstance(cfg.OUTPUT_DIR, str):
        reason = f"OUTPUT_DIR {cfg.OUTPUT_DIR} is not the path of a folder"
        raise InputError(reason, key="OUTPUT_DIR", fix="set it to a path")
    cfg.freeze()
    return cfg


def merge_config_file(cfg: CfgNode, path: str, allow_remote: bool = False) -> None:
    """Merge a config file into `cfg`, as `cfg.merge_from_file` does, without running code in it.

    Args:
        cfg: changed in place.
        path: path of the config file.
        allow_remote: whether `_BASE_` files may be downloaded.

    Raises:
        InputError: for a file that cannot be read, or that Detectron2 refuses.
    """
    values = read_config_file(path, allow_remote)
    try:
        with tempfile.TemporaryDirectory() as folder:
            plain = os.path.join(folder, "config.yaml")
            with open(plain, "w", encoding="utf-8") as file:
                yaml.safe_dump(values, file, sort_keys=False)
            with _renamed_in_logs(plain, path):
                cfg.merge_from_file(plain, allow_unsafe=False)
    except CONFIG_ERRORS as error:
        raise InputError(f"config {path}: {describe_error(error)}") from None


def read_config_file(path: str, allow_remote: bool = False) -> dict[str, Any]:
    """Read a config file and merge it into its `_BASE_` files, as fvcore does.

    YAML tags that run code are refused, except in the configs that ship with Detectron2: some of
    these compute their anchors.

    Args:
        path: path of the config file.
        allow_remote: whether `_BASE_` files may be downloaded.

    Returns:
        the merged values, as nested dicts.

    Raises:
        InputError: for a file that cannot be read, is too large, or would run code.
    """
    try:
        return _Reader(allow_remote).read(path)
    except InputError:
        raise
    except CONFIG_ERRORS as error:
        raise InputError(f"config {path}: {describe_error(error)}") from None


class _Reader:
    """Reads a config and its bases, with a limit on their number and total size."""

    def __init__(self, allow_remote: bool) -> None:
        self._allow_remote = allow_remote
        self._files = 0
        self._bytes = 0

    def read(self, path: str, derived: tuple[str, ...] = ()) -> dict[str, Any]:
        """Read a file and merge it into its bases.

        Args:
            path: path or address of the file.
            derived: paths of the configs that have this one as a base, the outermost first.
        """
        if os.path.realpath(path) in map(os.path.realpath, derived):
            raise InputError(f"config {path} is its own base: remove it from {BASE}")
        self._files += 1
        if self._files > MAX_FILES:
            raise InputError(
                f"config {derived[0]} has more than {MAX_FILES} {BASE} files: merge some"
            )
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
        # Merging into an aliased section makes it grow in every place that uses the alias
        refuse_large(merged, f"config {path} with its {BASE}")
        return merged

    def _fetch(self, address: str, name: str) -> str:
        """Download a base as Detectron2 does, and return the path of the copy."""
        if not self._allow_remote:
            raise InputError(
                f"{name} is remote: download it and name the local copy, or add --allow-remote-base"
            )
        # The local path is derived from the address, so ".." could lead out of the cache
        parts = urlsplit(address)
        address = urlunsplit(parts._replace(path=posixpath.normpath(parts.path or "/")))
        try:
            return PathManager.get_local_path(address)
        except (HTTPException, *CONFIG_ERRORS) as error:
            raise InputError(f"{name} cannot be downloaded: {describe_error(error)}") from None

    def _content(self, path: str, name: str) -> str:
        """Read the text of a regular file; opening a pipe or device could block forever."""
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{name} is not a regular file: name a YAML file")
            self._bytes += status.st_size
            if self._bytes > MAX_BYTES:
                raise InputError(
                    f"{name} is too large: the limit for all files is {MAX_BYTES} bytes"
                )
            with open(path, "rb") as file:
                # Some files in /proc have size 0 but never end, so read no more than the size
                return file.read(status.st_size).decode("utf-8")
        except OSError as error:
            raise InputError(f"{name} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InputError(f"{name} is not a UTF-8 text file") from None


def _resolve(base: object, path: str) -> str:
    """The path or address where fvcore looks for a base of the config at `path`."""
    if not isinstance(base, str) or not base.isprintable():
        raise InputError(f"config {path}: {BASE} {base!a:.80} is not a file name")
    if base.startswith("~"):
        base = os.path.expanduser(base)
    if base.startswith(("/", *NETWORK)):
        return base
    return os.path.join(os.path.dirname(path), base)


def _merge(values: dict[str, Any], base: dict[str, Any], path: str) -> None:
    """Merge `values` into `base`, which is changed in place, as fvcore does."""
    for key, value in values.items():
        if isinstance(value, dict) and key in base:
            if not isinstance(base[key], dict):
                raise InputError(
                    f"config {path}: {key} is a section, but its {BASE} has a single value there"
                )
            _merge(value, base[key], path)
        else:
            base[key] = value


def _is_detectron2s(path: str) -> bool:
    """Whether a file ships with Detectron2, given its real path."""
    package = Path(detectron2.__file__).resolve().parent
    # In a checkout, this folder is a link to one outside of the package
    own = (package, (package / "model_zoo" / "configs").resolve())
    return any(folder in Path(path).parents for folder in own)


@contextmanager
def _renamed_in_logs(plain: str, path: str) -> Iterator[None]:
    """Replace the temporary file's name by the user's in Detectron2's warnings about versions."""

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
