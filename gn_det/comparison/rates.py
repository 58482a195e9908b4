"""Choose the learning rate of each norm by trials on a part of the training set."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from ..data.hold_out import hold_out
from ..engine.autoconfig import propose_schedule
from ..engine.train_step import DIVERGED
from ..errors import InputError
from ..evaluation.metrics_file import metrics_of
from ..files import write_whole
from .jobs import Training, run_trainings
from .plan import Cell, Plan, with_keys

# Multiples of the linear rule's learning rate
DEFAULT_RATES = (1.0, 2.0, 4.0, 8.0)
# Length of a short trial: a share of the schedule, and a number of iterations
SHARE, LEAST = 0.25, 100
# Largest share of the comparison's own iterations that short trials may add by default
ALLOWED = 2 / 3
# So many rates of each norm, the best of the short trials, are tried for the whole schedule, unless
# all trials together would take longer than the comparison itself
FINALISTS = 2
# Record of the rates in use, once one was lowered
LOWERED = "rates/lowered.json"
# Below this AP a trial has learned too little to choose a rate by it
MIN_AP = 1.0


@dataclass(frozen=True)
class Trial:
    """A training run of one norm at one learning rate, on a part of the training set.

    Args:
        norm: as in `Cell`.
        images: images per batch.
        factor: multiple of the linear rule's learning rate.
        training: the run.
        final: whether it has the whole schedule.
    """

    norm: str
    images: int
    factor: float
    training: Training
    final: bool = False

    @property
    def cell(self) -> tuple[str, int]:
        """Its norm and number of images per batch."""
        return self.norm, self.images

    @property
    def rate(self) -> float:
        """Its `SOLVER.BASE_LR`."""
        return self.training.cfg.SOLVER.BASE_LR

    @property
    def aps(self) -> list[float]:
        """Box AP and mask AP on the held-out images; empty if the run failed."""
        lines = metrics_of(self.training.folder) if self.training.finished else []
        last = lines[-1] if lines else {}
        return [last[f"{kind}/AP"] for kind in ("bbox", "segm") if f"{kind}/AP" in last]

    @property
    def score(self) -> float:
        """Mean of box AP and mask AP; 0 if the run failed, or an AP is not a number."""
        score = mean(self.aps) if self.aps else 0.0
        return score if math.isfinite(score) else 0.0


def trial_length(iterations: int) -> int:
    """Number of iterations of a short trial for a schedule of `iterations`."""
    return min(max(math.ceil(SHARE * iterations), LEAST), iterations)


def trial_lengths(plan: Plan, factors: Sequence[float]) -> tuple[list[int], list[int]]:
    """The number of iterations of each short trial, and of each one of the whole schedule."""
    first = next(iter(plan.cells)).seed
    lengths = [t.cfg.SOLVER.MAX_ITER for cell, t in plan.cells.items() if cell.seed == first]
    if len(factors) < 2:
        return [], []
    short = [trial_length(n) for n in lengths for _ in factors]
    final = [n for n in lengths if trial_length(n) < n for _ in range(FINALISTS)]
    affordable = sum(short) + sum(final) <= _own_iterations(plan)
    return short, final if affordable else []


def allows_trials(plan: Plan, factors: Sequence[float] = DEFAULT_RATES) -> bool:
    """Whether short trials add at most `ALLOWED` of the comparison's own iterations."""
    return sum(trial_lengths(plan, factors)[0]) <= ALLOWED * _own_iterations(plan)


def _own_iterations(plan: Plan) -> int:
    return sum(training.cfg.SOLVER.MAX_ITER for training in plan.cells.values())


def scaled_rate(training: Training, factor: float) -> float:
    """A multiple of the learning rate of a run, rounded to four digits."""
    return float(f"{factor * training.cfg.SOLVER.BASE_LR:.4g}")


def make_trials(
    plan: Plan, factors: Sequence[float], group_by: str | None, earlier: Sequence[Trial] = ()
) -> list[Trial]:
    """The trials of all norms and batch sizes, for the first seed.

    Every norm gets the same rates, iterations and images. Trials are evaluated on training images
    that are held out, so the validation set has no part in the choice.

    Args:
        plan: of the comparison.
        factors: multiples of the plan's learning rate.
        group_by: as in `hold_out`.
        earlier: short trials that were run; with them, the trials of the whole schedule are made.

    Raises:
        InputError: if the training set is too small to hold images out.
    """
    folder = plan.output / "rates"
    train, held_out = hold_out(Path(plan.data.train), folder / "data", group_by)
    trials = []
    first = next(iter(plan.cells)).seed
    for cell, training in plan.cells.items():
        mine = [trial for trial in earlier if trial.cell == (cell.norm, cell.images)]
        tried = finalists(mine) if earlier else factors
        for factor in tried if cell.seed == first else ():
            name = f"{cell.norm.replace('/', '-')}_{cell.images}_x{factor:g}"
            name += "_whole" if earlier else ""
            keys = {
                **(_one_evaluation(training) if earlier else _short_schedule(cell, training)),
                "SOLVER.BASE_LR": scaled_rate(training, factor),
                "DATASETS.TRAIN": (str(train),),
                "DATASETS.TEST": (str(held_out),),
                "OUTPUT_DIR": str((folder / name).resolve()),
            }
            title = f"{cell.norm}, batch size {cell.images}, rate x{factor:g}"
            title += ", whole schedule" if earlier else ""
            run = with_keys(training, keys, name=title, folder=(folder / name).resolve())
            trials.append(Trial(cell.norm, cell.images, factor, run, bool(earlier)))
    return trials


def finalists(trials: Sequence[Trial]) -> list[float]:
    """The factors of the `FINALISTS` best short trials of a norm, in the order of the trials.

    If no trial has learned enough to choose by it, there are none.
    """
    best = sorted(trials, key=lambda trial: -trial.score)[:FINALISTS]
    learned = any(trial.score >= MIN_AP for trial in trials)
    return [trial.factor for trial in trials if trial in best and learned]


def _short_schedule(cell: Cell, training: Training) -> dict[str, object]:
    """The keys of a trial's schedule: that of the run, shortened."""
    cfg = training.cfg
    length = trial_length(cfg.SOLVER.MAX_ITER)
    wanted = ("SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS")
    proposals = propose_schedule(cfg, length * cell.images, cell.images, "")
    return {p.key: p.value for p in proposals if p.key in wanted} | _one_evaluation(training)


def _one_evaluation(training: Training) -> dict[str, object]:
    """Keys for an evaluation at the end, and no checkpoint before it."""
    period = 2 * training.cfg.SOLVER.MAX_ITER
    return {"TEST.EVAL_PERIOD": 0, "SOLVER.CHECKPOINT_PERIOD": period}


def choose(trials: Sequence[Trial]) -> dict[tuple[str, int], Trial]:
    """The trial with the best rate for each norm and batch size.

    The highest mean of box AP and mask AP counts, among those of the whole schedule if there are
    any. If all are below `MIN_AP`, the rate closest to the linear rule's is kept.
    """
    chosen: dict[tuple[str, int], Trial] = {}
    for cell in dict.fromkeys(trial.cell for trial in trials):
        mine = [trial for trial in trials if trial.cell == cell]
        whole = [trial for trial in mine if trial.final and trial.aps]
        # A rate may be too high only for the whole schedule
        failed = min((t.rate for t in mine if t.final and not t.aps), default=math.inf)
        short = [trial for trial in mine if not trial.final and trial.rate < failed]
        chosen[cell] = max(whole or short or mine, key=lambda trial: trial.score)
        if chosen[cell].score < MIN_AP:
            chosen[cell] = min(mine, key=lambda trial: abs(math.log(trial.factor)))
    return chosen


def tune_rates(
    plan: Plan,
    factors: Sequence[float],
    group_by: str | None,
    at_once: int = 1,
    optional: bool = False,
) -> tuple[Plan, list[Trial]]:
    """Run the trials, and give each norm its best learning rate.

    Args:
        plan, group_by: as in `make_trials`.
        factors: as in `make_trials`; a single one is used without trials, and none changes nothing.
        at_once: as in `run_trainings`.
        optional: whether a training set that is too small for trials is no error.

    Returns:
        the plan with the chosen rates, and the trials.

    Raises:
        InputError: as `make_trials` and `run_trainings`.
    """
    if len(factors) < 2:
        rates = {
            (cell.norm, cell.images): scaled_rate(training, factor)
            for cell, training in plan.cells.items()
            for factor in factors
        }
        return plan.with_rates(rates) if factors else plan, []
    try:
        trials = make_trials(plan, factors, group_by)
    except InputError as error:
        if not optional:
            raise
        print(f"no learning rates are tried: {error}", flush=True)
        return plan, []
    _run(trials, plan, at_once)
    if trial_lengths(plan, factors)[1]:
        whole = make_trials(plan, factors, group_by, trials)
        _run(whole, plan, at_once)
        trials += whole
    return plan.with_rates(rates_to_use(plan, trials)), trials


def _run(trials: Sequence[Trial], plan: Plan, at_once: int) -> None:
    run_trainings([trial.training for trial in trials], plan.output, at_once)
    for trial in trials:
        # Only its AP is needed
        (trial.training.folder / "model_final.pth").unlink(missing_ok=True)


def rates_to_use(plan: Plan, trials: Sequence[Trial]) -> dict[tuple[str, int], float]:
    """The best rate of each norm and batch size, or a lower one if runs diverged at it."""
    rates = {cell: trial.rate for cell, trial in choose(trials).items()}
    record = plan.output / LOWERED
    lowered = json.loads(record.read_text()) if record.is_file() else {}
    return {cell: lowered.get(f"{cell[0]}, {cell[1]}", rate) for cell, rate in rates.items()}


def lower_rates(plan: Plan, trials: Sequence[Trial], failed: Mapping[str, str]) -> Plan | None:
    """Give norms whose runs diverged the next lower rate that was tried.

    A trial is shorter than a run, so a rate may be too high only in the run. All runs of the norm
    are repeated, and the folders of the old ones are moved to those of the trials.

    Args:
        plan: of the comparison, which was executed.
        trials: of the learning rates.
        failed: {name of a failed run: error message}.

    Returns:
        the new plan, or None if no rate can be lowered.
    """
    diverged = {
        (cell.norm, cell.images)
        for cell, training in plan.cells.items()
        if DIVERGED in failed.get(training.name, "")
    }
    lower: dict[tuple[str, int], float] = {}
    for key, rate in rates_to_use(plan, trials).items():
        tried = [t.rate for t in trials if t.cell == key and t.aps and t.rate < rate]
        if key in diverged and tried:
            lower[key] = max(tried)
    if not lower:
        return None
    for cell, training in plan.cells.items():
        if (cell.norm, cell.images) in lower and training.folder.exists():
            rate = training.cfg.SOLVER.BASE_LR
            training.folder.rename(plan.output / "rates" / f"{training.folder.name}_at_{rate:g}")
    rates = rates_to_use(plan, trials) | lower
    with write_whole(plan.output / LOWERED) as file:
        file.write(json.dumps({f"{norm}, {n}": rate for (norm, n), rate in rates.items()}))
    return plan.with_rates(rates)


def trial_rows(trials: Sequence[Trial]) -> Iterator[list[str]]:
    """Rows of a table: norm, images per batch, rate, iterations, box AP, mask AP, the choice."""
    chosen = choose(trials)
    for trial in trials:
        aps = [f"{ap:.1f}" for ap in trial.aps] or ["failed"]
        mark = "chosen" if chosen[trial.cell] is trial else ""
        rate = f"{trial.rate:g} ({trial.factor:g} x the linear rule)"
        length = str(trial.training.cfg.SOLVER.MAX_ITER)
        yield [trial.norm, str(trial.images), rate, length, *(aps + [""] * 2)[:2], mark]
