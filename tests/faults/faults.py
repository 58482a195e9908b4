"""Faults: each disturbs a training run, and describes any wrong reaction of the run."""

import contextlib
import errno
import functools
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hurts import (
    disk_full,
    disk_gone,
    killed_before_tag,
    killed_in_save,
    killed_in_step,
    loader_killed,
    not_a_number,
)
from small_training import ITERATIONS, PERIOD, VARIANTS, Training

from gn_det.checkpoint import checkpointer


def at_a_random_time(training: Training, number: int, group: bool = False) -> str:
    """Send a signal after a random time, to the main process or to the process group."""
    process = training.start()
    time.sleep(training.rng.uniform(0.5, 6))
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(process.pid, number)
    code = training.finish(process)
    return "" if code in (0, -number, 128 + number) else f"exit code {code}"


def in_a_step(training: Training, number: int) -> str:
    """Send a signal in a random iteration."""
    iteration = training.rng.randrange(ITERATIONS)
    code = training.run(functools.partial(killed_in_step, iteration=iteration, number=number))
    if number == signal.SIGKILL:
        return "" if code == -number else f"exit code {code}"
    saved = training.output / f"model_{iteration:07d}.pth"
    if iteration < ITERATIONS - 1 and not saved.exists():
        return f"{saved.name} is missing"
    return "" if code == 128 + number else f"exit code {code}"


def in_a_save(training: Training) -> str:
    """Kill the run while it writes a checkpoint."""
    count, share = training.rng.randint(1, ITERATIONS // PERIOD), training.rng.random()
    code = training.run(functools.partial(killed_in_save, count=count, share=share))
    return "" if code == -signal.SIGKILL else f"exit code {code}"


def before_the_tag(training: Training) -> str:
    """Kill the run after a checkpoint, before `last_checkpoint` is written."""
    count = training.rng.randint(1, ITERATIONS // PERIOD)
    code = training.run(functools.partial(killed_before_tag, count=count))
    return "" if code == -signal.SIGKILL else f"exit code {code}"


def kill_late(training: Training) -> None:
    """Kill the run after at least two checkpoints."""
    iteration = training.rng.randrange(2 * PERIOD, ITERATIONS)
    training.run(functools.partial(killed_in_step, iteration=iteration, number=int(signal.SIGKILL)))


def truncated(training: Training) -> str:
    """Truncate the newest checkpoint."""
    kill_late(training)
    newest = training.checkpoints()[-1]
    os.truncate(newest, training.rng.randrange(newest.stat().st_size))
    return reports_skipped(training, newest)


def flipped(training: Training) -> str:
    """Flip a bit in the newest checkpoint."""
    kill_late(training)
    newest = training.checkpoints()[-1]
    content = bytearray(newest.read_bytes())
    # Tensors are in the middle of the archive; some bytes near its ends are not used
    place = training.rng.randrange(len(content) // 4, len(content) // 2)
    content[place] ^= 1 << training.rng.randrange(8)
    newest.write_bytes(content)
    return "" if checkpointer.is_intact(newest) else reports_skipped(training, newest)


def missing(training: Training) -> str:
    """Delete the newest checkpoint."""
    kill_late(training)
    newest = training.checkpoints()[-1]
    newest.unlink()
    return reports_skipped(training, newest)


def reports_skipped(training: Training, newest: Path) -> str:
    """Check that the resumed run reports the damaged checkpoint, and the one that it uses."""
    before = training.checkpoints()[-2 if newest.exists() else -1]
    iteration = training.rng.randrange(ITERATIONS - PERIOD, ITERATIONS)
    training.run(functools.partial(killed_in_step, iteration=iteration, number=int(signal.SIGKILL)))
    pattern = f"{re.escape(str(newest))} .*{re.escape(str(before))}"
    reported = re.search(pattern, training.outputs[-1])
    return "" if reported else f"no output that matches {pattern}"


def without_tag(training: Training) -> str:
    """Delete or damage `last_checkpoint`."""
    kill_late(training)
    tag = training.output / "last_checkpoint"
    damage: list[Callable[[], Any]] = [
        tag.unlink,
        lambda: tag.write_bytes(b""),
        lambda: tag.write_bytes(training.rng.randbytes(20)),
        lambda: tag.write_text("model_9999999.pth"),
    ]
    training.rng.choice(damage)()
    return ""


def incomplete_metrics(training: Training) -> str:
    """Append an incomplete line to `metrics.json`."""
    kill_late(training)
    path = training.output / "metrics.json"
    line = b'{"iteration": 11, "lr": 0.02, "total_loss": 3.1}\n'
    content = path.read_bytes() if path.exists() else b""
    path.write_bytes(content + line[: training.rng.randrange(len(line))])
    return ""


def without_space(training: Training) -> str:
    """Limit the size of files."""
    iteration = training.rng.randrange(ITERATIONS - 1)
    # Larger than logs, smaller than a checkpoint
    size = training.rng.randrange(300_000, 1_300_000)
    code = training.run(functools.partial(disk_full, iteration=iteration, size=size))
    return one_line_error(training, code, "File too large")


def without_disk(training: Training) -> str:
    """Let every checkpoint fail with an error of the disk."""
    iteration = training.rng.randrange(ITERATIONS - 1)
    number = training.rng.choice([errno.ENOSPC, errno.EROFS, errno.EIO])
    code = training.run(functools.partial(disk_gone, iteration=iteration, code=number))
    return one_line_error(training, code, os.strerror(number))


def loader_gone(training: Training) -> str:
    """Kill a worker process of the data loader; without workers, the run itself."""
    if VARIANTS[training.variant]["DATALOADER.NUM_WORKERS"] == 0:
        return in_a_step(training, signal.SIGKILL)
    iteration = training.rng.randrange(ITERATIONS - 1)
    code = training.run(functools.partial(loader_killed, iteration=iteration))
    return one_line_error(training, code, "DATALOADER.NUM_WORKERS")


def spoiled_image(training: Training, skip: bool) -> str:
    """Delete or damage an image, with or without --skip-bad-batches."""
    images = training.folder / "data" / "images"
    truth = json.loads((images.parent / "instances_train.json").read_text())
    # Detectron2 does not use images without objects
    used = {annotation["image_id"] for annotation in truth["annotations"]}
    names = [image["file_name"] for image in truth["images"] if image["id"] in used]
    path = images / training.rng.choice(names)
    content = path.read_bytes()
    damage: list[Callable[[], Any]] = [
        path.unlink,
        lambda: os.truncate(path, training.rng.randrange(len(content) // 2)),
        lambda: path.write_bytes(training.rng.randbytes(500)),
    ]
    training.rng.choice(damage)()
    flags = ["--skip-bad-batches", str(ITERATIONS)] if skip else []
    code = training.run(None, *flags)
    path.write_bytes(content)
    if skip:
        pattern = f"Skipping the batch.*{re.escape(path.name)}"
        skipped = re.search(pattern, training.outputs[-1])
        return "" if code == 0 and skipped else f"exit code {code}, or no output {pattern}"
    return one_line_error(training, code, f"cannot be read: .*{path.name}")


def spoiled_numbers(training: Training, skip: bool) -> str:
    """Let random images contain NaN, with or without --skip-bad-batches."""
    flags = ["--skip-bad-batches", str(ITERATIONS)] if skip else []
    code = training.run(not_a_number, *flags)
    if skip or code == 0:  # perhaps no image was affected
        return "" if code == 0 else f"exit code {code}"
    return one_line_error(training, code, "Inf or NaN|contain Inf")


def one_line_error(training: Training, code: int, pattern: str) -> str:
    """Check that the run ended with a one-line error that matches a pattern."""
    output = training.outputs[-1]
    errors = re.findall(r"^error: .*", output, re.MULTILINE)
    if code != 1 or len(errors) != 1 or not re.search(pattern, errors[0]):
        return f"exit code {code}, or no error that matches {pattern!r}"
    return "a traceback" if "Traceback" in output else ""


FAULTS: dict[str, Callable[[Training], str]] = {
    "SIGKILL at a random time": lambda t: at_a_random_time(t, signal.SIGKILL),
    "SIGTERM at a random time": lambda t: at_a_random_time(t, signal.SIGTERM),
    "SIGINT at a random time": lambda t: at_a_random_time(t, signal.SIGINT),
    "SIGTERM at a random time, also to the worker processes": lambda t: at_a_random_time(
        t, signal.SIGTERM, group=True
    ),
    "SIGKILL in an iteration": lambda t: in_a_step(t, signal.SIGKILL),
    "SIGTERM in an iteration": lambda t: in_a_step(t, signal.SIGTERM),
    "SIGINT in an iteration": lambda t: in_a_step(t, signal.SIGINT),
    "SIGKILL while a checkpoint is written": in_a_save,
    "SIGKILL before `last_checkpoint` is written": before_the_tag,
    "newest checkpoint truncated": truncated,
    "newest checkpoint with a flipped bit": flipped,
    "newest checkpoint missing": missing,
    "`last_checkpoint` missing or damaged": without_tag,
    "`metrics.json` with an incomplete line": incomplete_metrics,
    "file size limit reached": without_space,
    "disk full, read-only or broken": without_disk,
    "worker process of the data loader killed": loader_gone,
    "image missing or damaged": lambda t: spoiled_image(t, skip=False),
    "image missing or damaged, skipped": lambda t: spoiled_image(t, skip=True),
    "NaN in images": lambda t: spoiled_numbers(t, skip=False),
    "NaN in images, skipped": lambda t: spoiled_numbers(t, skip=True),
}
