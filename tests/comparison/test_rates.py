"""Learning rates that a comparison tries, and its choice."""

import json
from itertools import product
from pathlib import Path

import pytest
from small_comparison import comparison, words

from gn_det.comparison import rates
from gn_det.comparison.cells import Cell
from gn_det.comparison.compare import parse, rate_factors
from gn_det.comparison.jobs import Training
from gn_det.comparison.plan import make_plan
from gn_det.comparison.rates import (
    Trial,
    choose,
    finalists,
    lower_rates,
    make_trials,
    rates_to_use,
    trial_length,
    trial_lengths,
    trial_rows,
    tune_rates,
)
from gn_det.engine.train_step import DIVERGED
from gn_det.errors import InputError


@pytest.mark.parametrize(("whole", "length"), [(2000, 500), (400, 100), (200, 100), (60, 60)])
def test_length_of_a_trial(whole, length):
    """A quarter of the schedule, and at least 100 iterations."""
    assert trial_length(whole) == length


@pytest.mark.parametrize(
    ("iterations", "seeds", "wanted"),
    [
        (400, "012", (8 * [100], 4 * [400])),
        (2000, "012", (8 * [500], 4 * [2000])),
        (300, "012", (8 * [100], [])),  # all trials would take longer than the six runs
        (400, "01", (8 * [100], [])),
        (80, "012", (8 * [80], [])),  # the first trials have the whole schedule already
    ],
)
def test_numbers_of_trials(iterations, seeds, wanted, shapes, tmp_path):
    """Four rates in short trials, and the best two of each norm for the whole schedule."""
    plan = comparison(shapes, tmp_path, "--budget", str(iterations), "--seeds", *seeds)
    assert trial_lengths(plan, (1.0, 2.0, 4.0, 8.0)) == wanted


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


def test_trials_of_the_whole_schedule(shapes, tmp_path):
    """They are the runs of the comparison, on other images, at the best rates of each norm."""
    plan = comparison(shapes, tmp_path, "--budget", "400")
    short = [trial(tmp_path, norm, f, ap, ap) for norm in ("LN", "GN") for f, ap in RATED[norm]]
    whole = make_trials(plan, (), None, short)
    assert [(t.norm, t.factor) for t in whole] == [("LN", 2), ("LN", 4), ("GN", 1), ("GN", 2)]
    for one in whole:
        cell = Cell(one.norm, 2, 0)
        found, wanted = one.training.cfg, plan.cells[cell].cfg
        assert one.final and found.SOLVER.BASE_LR == one.factor * wanted.SOLVER.BASE_LR
        for key in ("MAX_ITER", "STEPS", "WARMUP_ITERS", "IMS_PER_BATCH"):
            assert found.SOLVER[key] == wanted.SOLVER[key]
        assert found.DATASETS.TEST != wanted.DATASETS.TEST
    assert not {t.training.folder for t in whole} & {t.training.folder for t in short}


def test_both_kinds_of_trials_are_run(shapes, tmp_path, monkeypatch):
    """In short trials the higher of two rates is better, over the whole schedule the lower one."""
    plan = comparison(shapes, tmp_path, "--budget", "400", "--seeds", *"012")
    before = next(iter(plan.cells.values())).cfg.SOLVER.BASE_LR
    lengths = []

    def run_trainings(trainings, *_):
        lengths.append({training.cfg.SOLVER.MAX_ITER for training in trainings})
        for training in trainings:
            rate, whole = training.cfg.SOLVER.BASE_LR, training.cfg.SOLVER.MAX_ITER == 400
            ap = 20 - rate / before if whole else 10 + rate / before
            training.folder.mkdir(parents=True)
            line = {"iteration": 1, "bbox/AP": ap, "segm/AP": ap}
            (training.folder / "metrics.json").write_text(json.dumps(line) + "\n")
            (training.folder / "run.json").write_text("{}")

    monkeypatch.setattr(rates, "run_trainings", run_trainings)
    rated, trials = tune_rates(plan, (1.0, 2.0, 4.0), None)
    assert lengths == [{100}, {400}] and len(trials) == 2 * (3 + 2)
    assert {t.cfg.SOLVER.BASE_LR for t in rated.cells.values()} == {2 * before}


# Factors and APs of short trials
RATED = {"LN": [(1, 5.0), (2, 8.0), (4, 9.0)], "GN": [(1, 9.0), (2, 8.0), (4, 5.0)]}


def test_the_whole_schedule_decides(tmp_path):
    """A short trial favors high rates. Where both longer ones diverged, a lower rate is chosen."""
    trials = [trial(tmp_path, norm, f, ap, ap) for norm in ("LN", "GN") for f, ap in RATED[norm]]
    assert finalists(trials[:3]) == [2, 4] and finalists(trials[3:]) == [1, 2]
    trials += [trial(tmp_path, "LN", f, ap, ap, final=True) for f, ap in ((2, 31.0), (4, 30.0))]
    trials += [trial(tmp_path, "GN", f, ap, ap, final=True) for f, ap in ((1, 29.0), (2, 30.0))]
    assert [choose(trials)[norm, 2].factor for norm in ("LN", "GN")] == [2, 2]
    diverged = [trial(tmp_path / "again", "LN", f, None, final=True) for f in (2, 4)]
    assert choose([*trials[:3], *diverged])["LN", 2].factor == 1
    poor = [trial(tmp_path / "poor", "LN", f, 0.5) for f in (1, 2, 4)]
    assert finalists(poor) == []


def trial(
    tmp_path, norm: str, factor: float, box: float | None, mask: float = 0.0, final: bool = False
) -> Trial:
    """A finished trial with these APs, or a failed one."""
    folder = tmp_path / f"{norm}_{factor}{'_whole' * final}"
    folder.mkdir(parents=True)
    if box is not None:
        line = {"iteration": 9, "bbox/AP": box, "segm/AP": mask}
        (folder / "metrics.json").write_text(json.dumps(line) + "\n")
        (folder / "run.json").write_text("{}")
    opts = ("SOLVER.BASE_LR", str(0.01 * factor))
    training = Training(norm, folder, "Shapes/mask_rcnn_R_18_FPN_gn.yaml", opts)
    return Trial(norm, 2, factor, training, final)


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
    assert rows[2][4] == "failed" and rows[0][4:6] == ["20.0", "18.0"]


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
