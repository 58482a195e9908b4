"""Learning rates that a comparison tries, and its choice."""

import json
from itertools import product
from pathlib import Path

import pytest
from small_comparison import comparison, words

from gn_det.comparison.cells import Cell
from gn_det.comparison.compare import parse, rate_factors
from gn_det.comparison.jobs import Training
from gn_det.comparison.plan import make_plan
from gn_det.comparison.rates import (
    Trial,
    choose,
    lower_rates,
    make_trials,
    rates_to_use,
    trial_length,
    trial_rows,
    tune_rates,
)
from gn_det.engine.train_step import DIVERGED
from gn_det.errors import InputError


@pytest.mark.parametrize(("whole", "length"), [(2000, 500), (400, 100), (200, 100), (60, 60)])
def test_length_of_a_trial(whole, length):
    """A quarter of the schedule, and at least 100 iterations."""
    assert trial_length(whole) == length


def test_trials_are_alike_for_all_norms(shapes, tmp_path):
    """Only norm, rate and folder differ, and no validation image is used."""
    plan = comparison(shapes, tmp_path, "--budget", "400")
    trials = make_trials(plan, (1.0, 2.0), None)
    assert [(t.norm, t.factor) for t in trials] == list(product(("LN", "GN"), (1.0, 2.0)))
    for trial in trials:
        cfg, whole = trial.training.cfg, next(iter(plan.cells.values())).cfg
        assert cfg.SOLVER.MAX_ITER == 100 and whole.SOLVER.MAX_ITER == 400
        assert cfg.SOLVER.BASE_LR == pytest.approx(trial.factor * whole.SOLVER.BASE_LR)
        quarters = [step / 4 for step in whole.SOLVER.STEPS]
        assert list(cfg.SOLVER.STEPS) == pytest.approx(quarters, abs=1)
        assert cfg.MODEL.RESNETS.NORM == trial.norm and cfg.SEED == 0
        used = {
            image["file_name"]
            for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
            for image in json.loads(Path(name).read_text())["images"]
        }
        train, val = (json.loads(Path(p).read_text()) for p in (plan.data.train, plan.data.val))
        assert used == {image["file_name"] for image in train["images"]}
        assert not used & {image["file_name"] for image in val["images"]}


def trial(tmp_path, norm: str, factor: float, box: float | None, mask: float = 0.0) -> Trial:
    """A finished trial with these APs, or a failed one."""
    folder = tmp_path / f"{norm}_{factor}"
    folder.mkdir()
    if box is not None:
        line = {"iteration": 9, "bbox/AP": box, "segm/AP": mask}
        (folder / "metrics.json").write_text(json.dumps(line) + "\n")
        (folder / "run.json").write_text("{}")
    opts = ("SOLVER.BASE_LR", str(0.01 * factor))
    training = Training(norm, folder, "Shapes/mask_rcnn_R_18_FPN_gn.yaml", opts)
    return Trial(norm, 2, factor, training)


def test_choice_of_the_rate(tmp_path):
    """The mean of box and mask AP decides, for each norm on its own."""
    trials = [
        trial(tmp_path, "FrozenBN", 1.0, 20.0, 18.0),
        trial(tmp_path, "FrozenBN", 2.0, 30.0, 0.5),
        trial(tmp_path, "FrozenBN", 4.0, None),
        trial(tmp_path, "GN", 1.0, 20.0, 18.0),
        trial(tmp_path, "GN", 2.0, 19.0, 19.5),
        trial(tmp_path, "GN", 4.0, float("nan"), 50.0),
        # None has learned enough to choose: the linear rule is kept
        trial(tmp_path, "LN", 0.5, 0.9),
        trial(tmp_path, "LN", 1.0, 0.0),
    ]
    chosen = {norm: t.factor for (norm, _), t in choose(trials).items()}
    assert chosen == {"FrozenBN": 1.0, "GN": 2.0, "LN": 1.0}
    rows = list(trial_rows(trials))
    assert [row[0] for row in rows if row[-1]] == ["FrozenBN", "GN", "LN"]
    assert rows[2][3] == "failed" and rows[0][3:5] == ["20.0", "18.0"]


def test_each_norm_gets_its_own_rate(shapes, tmp_path):
    plan = comparison(shapes, tmp_path, "--seeds", "0", "1")
    rated = plan.with_rates({("LN", 2): 0.04, ("GN", 2): 0.01})
    rates = {(c.norm, c.seed): t.cfg.SOLVER.BASE_LR for c, t in rated.cells.items()}
    assert rates == {("LN", 0): 0.04, ("GN", 0): 0.01, ("LN", 1): 0.04, ("GN", 1): 0.01}


def test_a_single_factor_is_used_without_trials(shapes, tmp_path):
    plan = comparison(shapes, tmp_path)
    before = next(iter(plan.cells.values())).cfg.SOLVER.BASE_LR
    changed, trials = tune_rates(plan, (0.5,), None)
    rates = [t.cfg.SOLVER.BASE_LR for t in changed.cells.values()]
    assert not trials and rates == [before / 2] * 2


@pytest.mark.parametrize(
    ("more", "tried"),
    [
        (["--budget", "400", "--seeds", "0", "1", "2"], True),
        (["--budget", "6", "--seeds", "0", "1", "2"], False),  # trials as long as the runs
        (["--budget", "400", "--seeds", "0"], False),
        (["--budget", "400", "--seeds", "0", "1", "2", "SOLVER.BASE_LR", "0.01"], False),
        (["--budget", "6", "--rates", "1", "3"], True),
    ],
)
def test_trials_by_default(more, tried, shapes, tmp_path):
    args = parse(words(shapes, tmp_path, *more))
    assert (len(rate_factors(args, make_plan(args))) > 1) == tried


def test_no_trials_of_a_tiny_training_set(shapes, tmp_path, capsys):
    """One group cannot be split: by default there are no trials, and --rates is an error."""
    plan = comparison(shapes, tmp_path)
    group = r"^()"
    same, trials = tune_rates(plan, (1.0, 2.0), group, optional=True)
    assert same is plan and not trials and "learning rates" in capsys.readouterr().out
    with pytest.raises(InputError, match="groups"):
        tune_rates(plan, (1.0, 2.0), group)


def test_a_lower_rate_for_a_norm_that_diverged(shapes, tmp_path):
    """All its runs are repeated at the next lower rate; a resumed command keeps it."""
    plan = comparison(shapes, tmp_path, "--seeds", "0", "1", "--norms", "LN", "GN")
    trials = []
    for norm, aps in (("LN", (9.0, 10.0, 11.0)), ("GN", (9.0, 10.0, 11.0))):
        for factor, ap in zip((1.0, 2.0, 4.0), aps, strict=True):
            trials.append(trial(tmp_path, norm, factor, ap, ap))
    plan = plan.with_rates(rates_to_use(plan, trials))
    first = plan.cells[Cell("LN", 2, 0)]
    first.folder.mkdir(parents=True)
    (first.folder / "log.txt").write_text("kept")
    assert lower_rates(plan, trials, {first.name: "out of memory"}) is None
    (tmp_path / "rates").mkdir()
    lower = lower_rates(plan, trials, {first.name: f"iteration 5: {DIVERGED}: loss nan"})
    assert lower is not None and not first.folder.exists()
    assert [p.read_text() for p in (tmp_path / "rates").glob("*/log.txt")] == ["kept"]
    rates = {(c.norm, c.seed): t.cfg.SOLVER.BASE_LR for c, t in lower.cells.items()}
    assert rates == {("LN", 0): 0.02, ("LN", 1): 0.02, ("GN", 0): 0.04, ("GN", 1): 0.04}
    assert rates_to_use(plan, trials) == {("LN", 2): 0.02, ("GN", 2): 0.04}
    last = lower_rates(lower, trials, {first.name: DIVERGED})
    assert last is not None and lower_rates(last, trials, {first.name: DIVERGED}) is None
