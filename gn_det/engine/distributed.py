"""One process a GPU: those that torchrun has started, or Detectron2's own."""

import os
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from types import FrameType
from typing import Any

import torch
from detectron2.engine import launch as spawn
from detectron2.utils import comm
from torch import distributed
from torch.multiprocessing import ProcessExitedException

from ..errors import InputError, exit_on_input_error

# What torchrun tells each of the processes that it starts
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def started_by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return all(name in os.environ for name in TORCHRUN)


def restarted() -> bool:
    """Whether torchrun started this process anew, after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def count_processes(args: Namespace) -> int:
    """How many processes train, on all machines together.

    Args:
        args: Detectron2's flags.

    Raises:
        InputError: for flags that start processes, where torchrun has started them.
    """
    if not started_by_torchrun():
        return max(args.num_gpus * args.num_machines, 1)
    if args.num_gpus > 1 or args.num_machines > 1:
        raise InputError(
            "torchrun has started the processes: leave --num-gpus and --num-machines out, and give "
            "torchrun --nproc-per-node and --nnodes"
        )
    return int(os.environ["WORLD_SIZE"])


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Let the processes that torchrun started know each other; nothing without torchrun.

    Args:
        device: as in `MODEL.DEVICE`.

    Raises:
        InputError: if there are fewer GPUs than processes.
    """
    if not started_by_torchrun():
        yield
        return
    local, size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
    if on_gpu:
        if size > torch.cuda.device_count():
            raise InputError(
                f"torchrun has started {size} processes for {torch.cuda.device_count()} GPUs: give "
                "it --nproc-per-node gpu"
            )
        torch.cuda.set_device(local)
    backend = "nccl" if on_gpu else "gloo"
    distributed.init_process_group(backend, **places_after_restart())
    # Detectron2's main asks for it; its release 0.6 has no such function, and no need here
    if create := getattr(comm, "create_local_process_group", None):
        create(size)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def places_after_restart() -> dict[str, Any]:
    """Arguments by which restarted processes find each other, and not those before them.

    torchrun gives all lives of a training one store, in which PyTorch's keys of the last life still
    stand (pytorch/pytorch#167288). On one machine a prefix keeps them apart; on several the lives
    are not counted alike, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is the way.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not (restarted() and shared and os.environ.get("GROUP_WORLD_SIZE") == "1"):
        return {}
    size = int(os.environ["WORLD_SIZE"])
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(*address, world_size=size, is_master=False)
    life = f"life_{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    own = distributed.PrefixStore(life, store)
    return {"store": own, "rank": int(os.environ["RANK"]), "world_size": size}


def launch(main: Callable[..., Any], args: Namespace, *passed: Any) -> None:
    """Call `main(args, *passed)` in each process, to the end of all.

    Args:
        args: Detectron2's flags.

    Raises:
        InputError: for more GPUs than there are.
        SystemExit: with the exit code of a process that failed.
    """
    if started_by_torchrun() or args.num_gpus * args.num_machines <= 1:
        main(args, *passed)
        return
    found = torch.cuda.device_count()
    if args.num_gpus > found:
        raise InputError(
            f"--num-gpus {args.num_gpus}, but PyTorch sees {found}; several processes on CPUs are "
            f"started by torchrun --nproc-per-node {args.num_gpus} tools/train_net.py ..."
        )
    places = {key: getattr(args, key) for key in ("num_machines", "machine_rank", "dist_url")}
    with forwarded_signals():
        try:
            spawn(_run, args.num_gpus, **places, args=(main, args, *passed))
        except ProcessExitedException as error:
            raise SystemExit(error.exit_code) from None


def _run(main: Callable[..., Any], *args: Any) -> None:
    with exit_on_input_error():
        main(*args)


@contextmanager
def forwarded_signals() -> Iterator[None]:
    """Hand SIGTERM on to the processes that this one has started, and wait for them.

    SIGINT needs no hand: a terminal gives it to all.
    """

    def forward(number: int, frame: FrameType | None) -> None:
        for process in active_children():
            if process.pid is not None:
                os.kill(process.pid, number)

    ignore = {signal.SIGTERM: forward, signal.SIGINT: lambda *_: None}
    before = {number: signal.signal(number, handler) for number, handler in ignore.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
