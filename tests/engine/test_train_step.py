"""The training step refuses or skips bad batches before they change the weights."""

import logging

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from gn_det.data.loader import UnreadableSample
from gn_det.engine.train_step import BadBatchError, TrainingStep

GOOD = [{"file_name": "good.png", "x": torch.ones(4, 3)}]
NAN = [{"file_name": "nan.png", "x": torch.full((4, 3), float("nan"))}]
UNREADABLE = [{"file_name": "good.png", "x": torch.ones(4, 3)}, UnreadableSample("gone.png", "No")]


class Model(nn.Module):
    """BatchNorm, whose running statistics depend on the batch, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(3), nn.Linear(3, 1)

    def forward(self, batch: list[dict]) -> dict[str, Tensor]:
        x = torch.cat([sample["x"] for sample in batch])
        return {"loss_cls": self.layer(self.norm(x) + torch.randn_like(x)).square().mean()}


class Diverging(Model):
    """Raises the error of Detectron2's RPN for infinite boxes."""

    def forward(self, batch: list[dict]) -> dict[str, Tensor]:
        raise FloatingPointError("Predicted boxes contain Inf")


class InfiniteGradient(torch.autograd.Function):
    """The identity, with a gradient of Inf."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


class BadGradient(Model):
    def forward(self, batch: list[dict]) -> dict[str, Tensor]:
        return {key: InfiniteGradient.apply(loss) for key, loss in super().forward(batch).items()}


def step(batches: list, skips: int = 0, model: type[nn.Module] = Model, **options) -> TrainingStep:
    torch.manual_seed(0)
    made = model()
    optimizer = torch.optim.SGD(made.parameters(), 0.1, momentum=0.9)
    return TrainingStep(made, batches, optimizer, skips=skips, seed=4, **options)


def run(trained: TrainingStep, iterations: range) -> None:
    with EventStorage():
        for trained.iter in iterations:
            trained.run_step()


@pytest.mark.parametrize(
    ("batch", "model", "words"),
    [
        (NAN, Model, "iteration 0 .*loss_cls nan.*nan.png"),
        (UNREADABLE, Model, r"gone.png \(No\)"),
        (GOOD, Diverging, "Predicted boxes contain Inf.*good.png"),
        (GOOD, BadGradient, "gradient norm nan"),
    ],
)
def test_a_bad_batch_raises(batch, model, words):
    trained = step([batch], model=model)
    before = [p.clone() for p in trained.model.parameters()]
    with pytest.raises(BadBatchError, match=words):
        run(trained, range(1))
    assert all(map(torch.equal, trained.model.parameters(), before))


def test_skipped_batches_have_no_effect(caplog):
    """Except that each takes an iteration."""
    caplog.set_level(logging.WARNING, "gn_det")
    trained, expected = step([GOOD, NAN, UNREADABLE, GOOD], skips=2), step([GOOD, GOOD])
    run(trained, range(4))
    with EventStorage():
        for expected.iter in (0, 3):
            expected.run_step()
    state, expected_state = trained.state_dict(), expected.state_dict()
    assert state.pop("skipped") == 2 and expected_state.pop("skipped") == 0
    assert str(state) == str(expected_state)
    assert all(
        map(torch.equal, trained.model.state_dict().values(), expected.model.state_dict().values())
    )
    first, second = (record.getMessage() for record in caplog.records)
    assert "nan.png" in first and "gone.png" in second and "2 of at most 2" in second


def test_the_number_of_skipped_batches_is_limited():
    trained = step([GOOD, NAN, UNREADABLE], skips=1)
    with pytest.raises(BadBatchError, match=r"iteration 2 .* after 1 skipped"):
        run(trained, range(3))


def test_float16_gradients_that_are_never_finite_raise():
    trained = step([GOOD] * 99, skips=9, model=BadGradient, precision=torch.float16)
    with pytest.raises(BadBatchError, match=r"float16.*SOLVER.AMP.DTYPE bfloat16"):
        run(trained, range(99))


def test_resuming_in_float16():
    """Restores the loss scale and the number of skipped batches."""
    uninterrupted = step([GOOD, NAN, GOOD, GOOD], skips=1, precision=torch.float16)
    run(uninterrupted, range(4))
    first = step([GOOD, NAN], skips=1, precision=torch.float16)
    run(first, range(2))
    first.grad_scaler.update(512.0)
    second = step([GOOD, GOOD], skips=1, precision=torch.float16)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    assert second.grad_scaler.get_scale() == 512 and second.skipped == 1
    run(second, range(2, 4))
    for one, two in zip(uninterrupted.model.parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
