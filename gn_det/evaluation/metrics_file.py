"""Reading and editing of `metrics.json`, so that resuming leaves no gaps or duplicates in it."""

import json
from pathlib import Path
from typing import Any

METRICS = "metrics.json"


def read_metrics(folder: str | Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Read the lines of `metrics.json`.

    Args:
        folder: `OUTPUT_DIR`.

    Returns:
        each line, and its metrics; these are empty for a damaged or incomplete line.
    """
    path = Path(folder, METRICS)
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [(line, _content(line)) for line in lines]


def metrics_of(folder: str | Path) -> list[dict[str, Any]]:
    """Metrics of every iteration that has any, in order.

    A resumed run may have written an iteration twice; the last line counts.

    Args:
        folder: `OUTPUT_DIR`.
    """
    newest = {content["iteration"]: content for _, content in read_metrics(folder) if content}
    return [newest[iteration] for iteration in sorted(newest)]


def drop_metrics_from(
    folder: str, iteration: int, replacement: dict[str, Any] | None = None
) -> None:
    """Remove the lines of an iteration and of all later ones from `metrics.json`.

    Args:
        folder: `OUTPUT_DIR`.
        iteration: the first iteration to remove.
        replacement: metrics to append as a new line, if any.
    """
    lines = read_metrics(folder)
    kept = [line for line, content in lines if content and content["iteration"] < iteration]
    if len(kept) == len(lines) and not replacement:
        return
    same = next((i for i, line in enumerate(kept) if line != lines[i][0]), len(kept))
    added = json.dumps(replacement, sort_keys=True).encode() + b"\n" if replacement else b""
    # Edit in place, since Detectron2's writer has the file open
    with Path(folder, METRICS).open("r+b") as file:
        file.seek(sum(map(len, kept[:same])))
        file.write(b"".join(kept[same:]) + added)
        file.truncate()


def _content(line: bytes) -> dict[str, Any]:
    """The metrics of a line; empty if it is not a complete record of an iteration."""
    try:
        content = json.loads(line) if line.endswith(b"\n") else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) and "iteration" in content else {}
