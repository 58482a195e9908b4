"""What a training has measured, in `metrics.json` without gaps and doubles when it goes on."""

import json
from pathlib import Path
from typing import Any

METRICS = "metrics.json"


def read_metrics(folder: str) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines of `metrics.json`, and what they hold: nothing, if not written to the end."""
    path = Path(folder, METRICS)
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [(line, _content(line)) for line in lines]


def cut_metrics(folder: str, iteration: int, whole: dict[str, Any] | None = None) -> None:
    """Take the lines of an iteration, and of those after it, out of `metrics.json`.

    Args:
        whole: what to write in their place, if anything.
    """
    lines = read_metrics(folder)
    kept = [line for line, content in lines if content and content["iteration"] < iteration]
    if len(kept) == len(lines) and not whole:
        return
    same = next((i for i, line in enumerate(kept) if line != lines[i][0]), len(kept))
    added = json.dumps(whole, sort_keys=True).encode() + b"\n" if whole else b""
    # In its place, for Detectron2's writer has it open, and no longer than it was
    with Path(folder, METRICS).open("r+b") as file:
        file.seek(sum(map(len, kept[:same])))
        file.write(b"".join(kept[same:]) + added)
        file.truncate()


def _content(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line) if line.endswith(b"\n") else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) and "iteration" in content else {}
