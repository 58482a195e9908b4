"""Training with one process per GPU, started by torchrun or by Detectron2's launcher."""

import os
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from types import FrameType
from typing import Any

import torch
from detectron2.engine import launch as spawn
from detectron2.utils import comm
from torch import distributed, nn
from torch.multiprocessing import ProcessExitedException
from torch.nn.parallel import DistributedDataParallel

from ..errors import InputError, exit_on_input_error
from ..processes import end_with_parent

# Environment variables that torchrun sets in each process
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")

# Seconds after which a process that waits for the others says so
WAIT = 15.0


def _number(variable: str) -> int:
    """The value of an environment variable of torchrun; 0 if it is not set.

    Raises:
        InputError: naming the variable, if it is not a number.
    """
    value = os.environ.get(variable, "0")
    if not value.isascii() or not value.isdigit():
        raise InputError(
            f"the environment variable {variable} is {value!r}, not a number: unset it, or start "
            "with torchrun"
        )
    return int(value)


def started_by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return all(name in os.environ for name in TORCHRUN)


def restarted_by_torchrun() -> bool:
    """Whether torchrun restarted this process after a failure."""
    return _number("TORCHELASTIC_RESTART_COUNT") > 0


def count_processes(args: Namespace) -> int:
    """The total number of training processes on all machines.

    Args:
        args: Detectron2's command-line flags.

    Raises:
        InputError: if both torchrun and Detectron2's flags ask for several processes.
    """
    if not started_by_torchrun():
        return max(args.num_gpus * args.num_machines, 1)
    if args.num_gpus > 1 or args.num_machines > 1:
        raise InputError(
            "--num-gpus and --num-machines cannot be used under torchrun: use its flags "
            "--nproc-per-node and --nnodes instead"
        )
    return _number("WORLD_SIZE")


@contextmanager
def torchrun_process_group(device: str) -> Iterator[None]:
    """Initialize torch.distributed if torchrun started this process, else do nothing.

    Args:
        device: the value of `MODEL.DEVICE`; the backend is NCCL on GPUs and Gloo on CPUs.

    Raises:
        InputError: if there are fewer GPUs than processes.
    """
    if not started_by_torchrun():
        yield
        return
    local, size = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE")
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
    if on_gpu:
        if size > torch.cuda.device_count():
            raise InputError(
                f"torchrun has started {size} processes for {torch.cuda.device_count()} GPUs: "
                "start it with --nproc-per-node gpu"
            )
        torch.cuda.set_device(local)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()  # torchrun; a process that was started by hand may outlive its shell
    backend = "nccl" if on_gpu else "gloo"
    with waiting_for_others():
        distributed.init_process_group(backend, **restart_arguments())
    # Detectron2's main branch requires this; its release 0.6 does not have this function
    if create := getattr(comm, "create_local_process_group", None):
        create(size)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def waiting_for_others() -> Iterator[None]:
    """Print whom this process waits for, if the block takes long."""
    address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    text = (
        f"process {_number('RANK')} waits for all {_number('WORLD_SIZE')} processes to meet at "
        f"{address}: the variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say so"
    )
    timer = threading.Timer(WAIT, print, [text], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def restart_arguments() -> dict[str, Any]:
    """Arguments of `init_process_group` that separate a restart from the attempt before it.

    torchrun uses the same store for all attempts, and it still holds PyTorch's keys of the failed
    attempt (pytorch/pytorch#167288). On one machine, a prefix for each attempt solves this. On
    several machines the attempts may be counted differently, so the prefix cannot be used: set
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 there.

    Returns:
        keyword arguments; none in the first attempt or on several machines.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not (restarted_by_torchrun() and shared and os.environ.get("GROUP_WORLD_SIZE") == "1"):
        return {}
    size = _number("WORLD_SIZE")
    address = os.environ["MASTER_ADDR"], _number("MASTER_PORT")
    store = distributed.TCPStore(*address, world_size=size, is_master=False)
    attempt = f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    prefixed = distributed.PrefixStore(attempt, store)
    return {"store": prefixed, "rank": _number("RANK"), "world_size": size}


def launch(main: Callable[..., Any], args: Namespace, *passed: Any) -> None:
    """Call `main(args, *passed)` in each process, and wait for all of them.

    Under torchrun, or with a single process, call it directly.

    Args:
        main: a function that can be pickled.
        args: Detectron2's command-line flags.
        passed: more arguments of `main`, which can be pickled.

    Raises:
        InputError: if `--num-gpus` is larger than the number of GPUs.
        SystemExit: with the exit code of a process that failed.
    """
    if started_by_torchrun() or args.num_gpus * args.num_machines <= 1:
        main(args, *passed)
        return
    available = torch.cuda.device_count()
    if args.num_gpus > available:
        raise InputError(
            f"--num-gpus {args.num_gpus}, but PyTorch sees {available} GPUs: to train on CPUs, use "
            f"torchrun --nproc-per-node {args.num_gpus} tools/train_net.py ..."
        )
    options = {key: getattr(args, key) for key in ("num_machines", "machine_rank", "dist_url")}
    with forwarded_signals():
        try:
            spawn(_run, args.num_gpus, **options, args=(main, args, *passed))
        except ProcessExitedException as error:
            raise SystemExit(error.exit_code) from None


def _run(main: Callable[..., Any], *args: Any) -> None:
    """Call `main` in a spawned process, where an `InputError` must become an exit code."""
    with exit_on_input_error():
        main(*args)


@contextmanager
def forwarded_signals() -> Iterator[None]:
    """Forward SIGTERM to the child processes instead of exiting on it.

    SIGINT is ignored, since a terminal sends it to the child processes too.
    """

    def forward(number: int, frame: FrameType | None) -> None:
        for process in active_children():
            if process.pid is not None:
                os.kill(process.pid, number)

    handlers = {signal.SIGTERM: forward, signal.SIGINT: lambda *_: None}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def distribute(model: nn.Module) -> nn.Module:
    """Wrap a model in `DistributedDataParallel` if there are several processes."""
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
