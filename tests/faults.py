"""Random faults in small trainings, each of which has to end as if nothing had happened.

    python tests/faults.py [N] [--seed S] [--at-once P]

Every fault has a training of its own. It is hurt, started again with --resume, and compared with
one that nothing happened to: weights bit by bit, iterations in metrics.json, files, exit codes and
messages.
"""

import argparse
import contextlib
import errno
import functools
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context, set_start_method
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetMapper
from detectron2.data.datasets import register_coco_instances

from gn_det.checkpoint import checkpointer
from gn_det.data import make_shapes
from gn_det.data.loader import build_train_loader
from gn_det.engine.train import run
from gn_det.engine.trainer import Trainer

ITERATIONS, PERIOD, EVALUATION = 12, 3, 6
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.GROUP_NORM.NUM_GROUPS": 4,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MASK_FORMAT": "bitmask",
    "DATASETS.TRAIN": "('mine_train',)",
    "DATASETS.TEST": "('mine_val',)",
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": ITERATIONS,
    "SOLVER.STEPS": "(8,)",
    "SOLVER.CHECKPOINT_PERIOD": PERIOD,
    "TEST.EVAL_PERIOD": EVALUATION,
    "SEED": 5,
}
# Of every kind of training one; what is resumed must be exact in all of them
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"INPUT.MIN_SIZE_TRAIN": "(64,)", "DATALOADER.NUM_WORKERS": 0},
    "bfloat16, accumulated, multi-scale": {
        "INPUT.MIN_SIZE_TRAIN": "(48, 64, 80)",
        "DATALOADER.NUM_WORKERS": 2,
        "SOLVER.AMP.ENABLED": True,
        "SOLVER.AMP.DTYPE": "bfloat16",
        "SOLVER.ACCUMULATE_ITERS": 2,
        "SOLVER.KEEP_CHECKPOINTS": 2,
    },
}


@dataclass
class Training:
    """One training's folder, with a data set of its own."""

    folder: Path
    variant: str
    rng: random.Random
    told: list[str] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def start(self, hurt: Callable[[type[Trainer]], type[Trainer]] | None = None, *flags: str):
        """A process that trains, going on if something is there."""
        process = get_context("forkserver").Process(
            target=train, args=(self.folder, self.variant, hurt, flags)
        )
        process.start()
        return process

    def finish(self, process) -> int:
        """Its exit code, at its end; what it said is kept."""
        process.join(300)
        assert process.exitcode is not None, "it hangs"
        self.told.append((self.folder / "said.txt").read_text())
        return process.exitcode

    def run(self, hurt=None, *flags: str) -> int:
        return self.finish(self.start(hurt, *flags))

    def checkpoints(self) -> list[Path]:
        return sorted(self.output.glob("model_0*.pth"))


def train(folder: Path, variant: str, hurt: Any, flags: tuple[str, ...]) -> None:
    """A whole training in this process, as `tools/train_net.py` runs it."""
    said = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    torch.set_num_threads(1)
    # As it is by default on Linux for the processes that load
    set_start_method("fork", force=True)
    for split in ("train", "val"):
        data = folder / "data"
        path = str(data / f"instances_{split}.json")
        register_coco_instances(f"mine_{split}", {}, path, str(data / "images"))
    keys = SMALL | VARIANTS[variant] | {"OUTPUT_DIR": folder / "output"}
    words = [str(word) for pair in keys.items() for word in pair]
    config = ["--config-file", "Shapes/mask_rcnn_R_18_FPN_gn.yaml"]
    run([*config, "--resume", *flags, *words], hurt(Trainer) if hurt else Trainer)


# What happens inside of a training: from the trainer to one that is hurt


def killed_in_step(trainer: type[Trainer], iteration: int, number: int) -> type[Trainer]:
    class Hurt(trainer):  # type: ignore[valid-type,misc]
        def run_step(self) -> None:
            if self.iter == iteration:
                os.kill(os.getpid(), number)
            super().run_step()

    return Hurt


def killed_in_save(trainer: type[Trainer], count: int, share: float) -> type[Trainer]:
    """The process is gone when a share of the count-th checkpoint has been written."""

    def save(content: Any, file: io.IOBase) -> None:
        nonlocal count
        count -= 1
        whole = io.BytesIO()
        torch_save(content, whole)
        if count:
            file.write(whole.getvalue())
            return
        file.write(whole.getvalue()[: int(share * len(whole.getvalue()))])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch_save = torch.save
    checkpointer.torch.save = save
    return trainer


def killed_before_tag(trainer: type[Trainer], count: int) -> type[Trainer]:
    """The process is gone between the count-th checkpoint and `last_checkpoint`."""

    def tag(self: Any, name: str) -> None:
        nonlocal count
        count -= 1
        if not count:
            os.kill(os.getpid(), signal.SIGKILL)
        old(self, name)

    old = checkpointer.StrictCheckpointer.tag_last_checkpoint
    checkpointer.StrictCheckpointer.tag_last_checkpoint = tag  # type: ignore[method-assign]
    return trainer


def disk_full(trainer: type[Trainer], iteration: int, size: int) -> type[Trainer]:
    """From an iteration on no file may grow beyond a size."""

    class Hurt(trainer):  # type: ignore[valid-type,misc]
        def run_step(self) -> None:
            super().run_step()
            if self.iter == iteration:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return Hurt


def disk_gone(trainer: type[Trainer], iteration: int, code: int) -> type[Trainer]:
    """From an iteration on no checkpoint can be opened for writing."""

    @contextlib.contextmanager
    def write_whole(path: Path, mode: str = "w") -> Iterator[None]:
        raise OSError(code, os.strerror(code), str(path))
        yield

    class Hurt(trainer):  # type: ignore[valid-type,misc]
        def run_step(self) -> None:
            super().run_step()
            if self.iter == iteration:
                checkpointer.write_whole = write_whole

    return Hurt


def loader_killed(trainer: type[Trainer], iteration: int) -> type[Trainer]:
    class Hurt(trainer):  # type: ignore[valid-type,misc]
        def run_step(self) -> None:
            super().run_step()
            if self.iter == iteration:
                children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
                os.kill(int(children[-1]), signal.SIGKILL)

    return Hurt


class SpoiledMapper(DatasetMapper):
    """Detectron2's, but one picture in so many comes as NaN."""

    def __call__(self, record: dict) -> dict:
        sample = super().__call__(record)
        if torch.rand(()) < 0.1:
            sample["image"] = torch.full(sample["image"].shape, float("nan"))
        return sample


def not_a_number(trainer: type[Trainer]) -> type[Trainer]:
    class Hurt(trainer):  # type: ignore[valid-type,misc]
        @classmethod
        def build_train_loader(cls, cfg):
            return build_train_loader(cfg, SpoiledMapper(cfg, True))

    return Hurt


# What a fault is: it hurts the training, and says what is wrong with how that ended, if anything


def at_a_moment(training: Training, number: int) -> str:
    """A signal after some time, wherever the training is then."""
    process = training.start()
    time.sleep(training.rng.uniform(0.1, 6))
    if process.is_alive():
        os.kill(process.pid, number)
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


def spoiled_picture(training: Training, skip: bool) -> str:
    images = training.folder / "data" / "images"
    picture = training.rng.choice(sorted(images.glob("train_*.png")))
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
    "picture missing or damaged": lambda t: spoiled_picture(t, skip=False),
    "picture missing or damaged, passed over": lambda t: spoiled_picture(t, skip=True),
    "NaN in pictures": lambda t: spoiled_numbers(t, skip=False),
    "NaN in pictures, passed over": lambda t: spoiled_numbers(t, skip=True),
}


def survives(kind: str, training: Training, reference: Path) -> str:
    """What was lost by a fault; "" if nothing."""
    if why := FAULTS[kind](training):
        return why
    shutil.rmtree(training.output / "inference", ignore_errors=True)
    if code := training.run():
        return f"started again, it ends with exit code {code}"
    if left := list(training.output.rglob("*.partial")):
        return f"{left[0]} is left"
    if "passed over" in kind:
        return ""  # other weights than without the fault
    found, expected = (
        torch.load(folder / "model_final.pth", weights_only=True)
        for folder in (training.output, reference)
    )
    if not same(found, expected):
        return "another state at the end"
    lines = (training.output / "metrics.json").read_text().splitlines()
    seen = [json.loads(line)["iteration"] for line in lines]
    if seen != sorted(set(seen)) or not {EVALUATION - 1, ITERATIONS - 1} <= set(seen):
        return f"metrics.json has iterations {seen}"
    middle = json.loads(lines[seen.index(EVALUATION - 1)])
    return "" if "bbox/AP" in middle else "the evaluation on the way is lost"


def same(one: Any, two: Any) -> bool:
    """Whether two states are equal in every bit."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def campaign(kinds: Sequence[str], seed: int, at_once: int, folder: Path) -> list[str]:
    """Try a fault of each of the kinds; what each has lost, "" for nothing."""
    get_context("forkserver").set_forkserver_preload(["faults"])
    data = folder / "data"
    make_shapes(data, num_train=12, num_val=2, seed=3)

    def prepared(name: str, variant: str, rng: random.Random) -> Training:
        shutil.copytree(data, folder / name / "data")
        return Training(folder / name, variant, rng)

    references = {}
    for number, variant in enumerate(VARIANTS):
        training = prepared(f"reference{number}", variant, random.Random(0))
        assert training.run() == 0, training.told
        references[variant] = training.output

    def try_one(number: int) -> str:
        # Each kind meets every variant in turn
        variant = list(VARIANTS)[(number // len(FAULTS) + number) % len(VARIANTS)]
        training = prepared(f"fault{number}", variant, random.Random(f"{seed}/{number}"))
        lost = survives(kinds[number], training, references[variant])
        print(f"{number + 1:4} {kinds[number]} ({variant}): {lost or 'survived'}", flush=True)
        if lost:
            print(*training.told, sep="\n--- started again ---\n")
        else:
            shutil.rmtree(training.folder)
        return lost

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(try_one, range(len(kinds))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("count", nargs="?", type=int, default=200, help="faults (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    kinds = [list(FAULTS)[i % len(FAULTS)] for i in range(args.count)]
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        found = campaign(kinds, args.seed, args.at_once, Path(folder))
    print("\n| fault | tried | survived | lost |\n|---|---|---|---|")
    for kind in dict.fromkeys(kinds):
        results = [lost for k, lost in zip(kinds, found, strict=True) if k == kind]
        lost = sum(map(bool, results))
        print(f"| {kind} | {len(results)} | {len(results) - lost} | {lost} |")
    lost = sum(map(bool, found))
    print(f"{args.count} faults: {args.count - lost} survived, {lost} lost")
    raise SystemExit(lost > 0)


if __name__ == "__main__":
    main()
