"""What a fault is: it hurts a training, and says what is wrong with how that ended, if anything."""

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


def at_a_moment(training: Training, number: int, group: bool = False) -> str:
    """A signal after some time, wherever the training is then; for all its processes, if asked."""
    process = training.start()
    time.sleep(training.rng.uniform(0.5, 6))
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(process.pid, number)
    code = training.finish(process)
    return "" if code in (0, -number, 128 + number) else f"exit code {code}"


def in_a_step(training: Training, number: int) -> str:
    iteration = training.rng.randrange(ITERATIONS)
    code = training.run(functools.partial(killed_in_step, iteration=iteration, number=number))
    if number == signal.SIGKILL:
        return "" if code == -number else f"exit code {code}"
    saved = training.output / f"model_{iteration:07d}.pth"
    if iteration < ITERATIONS - 1 and not saved.exists():
        return f"{saved.name} is missing"
    return "" if code == 128 + number else f"exit code {code}"


def in_a_save(training: Training) -> str:
    count, share = training.rng.randint(1, ITERATIONS // PERIOD), training.rng.random()
    code = training.run(functools.partial(killed_in_save, count=count, share=share))
    return "" if code == -signal.SIGKILL else f"exit code {code}"


def before_the_tag(training: Training) -> str:
    count = training.rng.randint(1, ITERATIONS // PERIOD)
    code = training.run(functools.partial(killed_before_tag, count=count))
    return "" if code == -signal.SIGKILL else f"exit code {code}"


def kill_late(training: Training) -> None:
    iteration = training.rng.randrange(2 * PERIOD, ITERATIONS)
    training.run(functools.partial(killed_in_step, iteration=iteration, number=int(signal.SIGKILL)))


def truncated(training: Training) -> str:
    kill_late(training)
    newest = training.checkpoints()[-1]
    os.truncate(newest, training.rng.randrange(newest.stat().st_size))
    return passed_over(training, newest)


def flipped(training: Training) -> str:
    kill_late(training)
    newest = training.checkpoints()[-1]
    content = bytearray(newest.read_bytes())
    # Tensors lie in the middle; the ends of the archive hold fields that nothing depends on
    place = training.rng.randrange(len(content) // 4, len(content) // 2)
    content[place] ^= 1 << training.rng.randrange(8)
    newest.write_bytes(content)
    return "" if checkpointer.is_whole(newest) else passed_over(training, newest)


def missing(training: Training) -> str:
    kill_late(training)
    newest = training.checkpoints()[-1]
    newest.unlink()
    return passed_over(training, newest)


def passed_over(training: Training, newest: Path) -> str:
    """Whether the next start says which checkpoint it does not take, and which it does."""
    before = training.checkpoints()[-2 if newest.exists() else -1]
    iteration = training.rng.randrange(ITERATIONS - PERIOD, ITERATIONS)
    training.run(functools.partial(killed_in_step, iteration=iteration, number=int(signal.SIGKILL)))
    said = training.told[-1]
    wanted = f"{newest} is missing or damaged: going on from {before}"
    return "" if wanted in said else f"it does not say: {wanted}"


def without_tag(training: Training) -> str:
    kill_late(training)
    tag = training.output / "last_checkpoint"
    spoil: list[Callable[[], Any]] = [
        tag.unlink,
        lambda: tag.write_bytes(b""),
        lambda: tag.write_bytes(training.rng.randbytes(20)),
        lambda: tag.write_text("model_9999999.pth"),
    ]
    training.rng.choice(spoil)()
    return ""


def torn_metrics(training: Training) -> str:
    kill_late(training)
    path = training.output / "metrics.json"
    line = b'{"iteration": 11, "lr": 0.02, "total_loss": 3.1}\n'
    content = path.read_bytes() if path.exists() else b""
    path.write_bytes(content + line[: training.rng.randrange(len(line))])
    return ""


def without_room(training: Training) -> str:
    iteration = training.rng.randrange(ITERATIONS - 1)
    # More than what is said and logged, less than a checkpoint
    size = training.rng.randrange(300_000, 1_300_000)
    code = training.run(functools.partial(disk_full, iteration=iteration, size=size))
    return one_sentence(training, code, "File too large")


def without_disk(training: Training) -> str:
    iteration = training.rng.randrange(ITERATIONS - 1)
    number = training.rng.choice([errno.ENOSPC, errno.EROFS, errno.EIO])
    code = training.run(functools.partial(disk_gone, iteration=iteration, code=number))
    return one_sentence(training, code, os.strerror(number))


def loader_gone(training: Training) -> str:
    if VARIANTS[training.variant]["DATALOADER.NUM_WORKERS"] == 0:
        return in_a_step(training, signal.SIGKILL)
    iteration = training.rng.randrange(ITERATIONS - 1)
    code = training.run(functools.partial(loader_killed, iteration=iteration))
    return one_sentence(training, code, "DATALOADER.NUM_WORKERS")


def spoiled_image(training: Training, skip: bool) -> str:
    images = training.folder / "data" / "images"
    truth = json.loads((images.parent / "instances_train.json").read_text())
    # Detectron2 leaves out those without objects
    used = {annotation["image_id"] for annotation in truth["annotations"]}
    names = [image["file_name"] for image in truth["images"] if image["id"] in used]
    picture = images / training.rng.choice(names)
    content = picture.read_bytes()
    spoil: list[Callable[[], Any]] = [
        picture.unlink,
        lambda: os.truncate(picture, training.rng.randrange(len(content) // 2)),
        lambda: picture.write_bytes(training.rng.randbytes(500)),
    ]
    training.rng.choice(spoil)()
    flags = ["--skip-bad-batches", str(ITERATIONS)] if skip else []
    code = training.run(None, *flags)
    picture.write_bytes(content)
    if skip:
        warned = f"Passing over the batch.*{picture.name}"
        return "" if code == 0 and re.search(warned, training.told[-1]) else f"exit code {code}"
    return one_sentence(training, code, f"cannot be read: .*{picture.name}")


def spoiled_numbers(training: Training, skip: bool) -> str:
    flags = ["--skip-bad-batches", str(ITERATIONS)] if skip else []
    code = training.run(not_a_number, *flags)
    if skip or code == 0:  # none may have been drawn
        return "" if code == 0 else f"exit code {code}"
    return one_sentence(training, code, "infinite|NaN")


def one_sentence(training: Training, code: int, pattern: str) -> str:
    """What is wrong with how a training ended that had to stop with an error, if anything."""
    said = training.told[-1]
    errors = re.findall(r"^error: .*", said, re.MULTILINE)
    if code != 1 or len(errors) != 1 or not re.search(pattern, errors[0]):
        return f"exit code {code} and no sentence with {pattern!r}"
    return "a traceback" if "Traceback" in said else ""


FAULTS: dict[str, Callable[[Training], str]] = {
    "SIGKILL at any moment": lambda t: at_a_moment(t, signal.SIGKILL),
    "SIGTERM at any moment": lambda t: at_a_moment(t, signal.SIGTERM),
    "SIGINT at any moment": lambda t: at_a_moment(t, signal.SIGINT),
    "SIGTERM at any moment, for the loading processes too": lambda t: at_a_moment(
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
    "`metrics.json` torn": torn_metrics,
    "file size limit reached": without_room,
    "disk full, read-only or broken": without_disk,
    "loading process killed": loader_gone,
    "picture missing or damaged": lambda t: spoiled_image(t, skip=False),
    "picture missing or damaged, passed over": lambda t: spoiled_image(t, skip=True),
    "NaN in pictures": lambda t: spoiled_numbers(t, skip=False),
    "NaN in pictures, passed over": lambda t: spoiled_numbers(t, skip=True),
}
