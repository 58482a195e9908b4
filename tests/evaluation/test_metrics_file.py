"""`metrics.json` after an interrupted run is resumed."""

import json

from gn_det.evaluation.metrics_file import drop_metrics_from


def write(folder, *iterations: int, damaged: str = "") -> None:
    lines = [json.dumps({"iteration": i, "loss": i / 10}) + "\n" for i in iterations]
    (folder / "metrics.json").write_text("".join(lines) + damaged)


def iterations(folder) -> list[int]:
    lines = (folder / "metrics.json").read_text().splitlines()
    return [json.loads(line)["iteration"] for line in lines]


def test_repeated_iterations_are_removed(tmp_path):
    write(tmp_path, 19, 39, 59, 79)
    drop_metrics_from(tmp_path, 50)
    assert iterations(tmp_path) == [19, 39]
    drop_metrics_from(tmp_path, 50)
    assert iterations(tmp_path) == [19, 39]


def test_lines_out_of_order(tmp_path):
    """After a skipped batch, the losses of an earlier iteration are written."""
    write(tmp_path, 19, 59, 58, 39)
    drop_metrics_from(tmp_path, 59)
    assert iterations(tmp_path) == [19, 58, 39]


def test_damaged_lines_are_removed(tmp_path):
    for damaged in ('{"iteration": 3', '{"iteration": 39, "loss": 1}', "\n", "[]\n", "\0\0"):
        write(tmp_path, 19, damaged=damaged)
        drop_metrics_from(tmp_path, 40)
        assert iterations(tmp_path) == [19], damaged


def test_lines_of_an_iteration_are_replaced(tmp_path):
    write(tmp_path, 19, 39, 39)
    drop_metrics_from(tmp_path, 39, {"iteration": 39, "loss": 3.9, "bbox/AP": 20.0})
    assert iterations(tmp_path) == [19, 39]
    assert "bbox/AP" in (tmp_path / "metrics.json").read_text().splitlines()[-1]


def test_an_open_writer_appends_at_the_new_end(tmp_path):
    write(tmp_path, 19, 39)
    with (tmp_path / "metrics.json").open("a") as file:
        drop_metrics_from(tmp_path, 30)
        file.write(json.dumps({"iteration": 35}) + "\n")
    assert iterations(tmp_path) == [19, 35]


def test_without_a_file(tmp_path):
    drop_metrics_from(tmp_path, 0)
    assert not list(tmp_path.iterdir())
