"""What metrics.json holds after a training was stopped."""

import json

from gn_det.engine.metrics_file import cut_metrics


def write(folder, *iterations: int, torn: str = "") -> None:
    lines = [json.dumps({"iteration": i, "loss": i / 10}) + "\n" for i in iterations]
    (folder / "metrics.json").write_text("".join(lines) + torn)


def left(folder) -> list[int]:
    lines = (folder / "metrics.json").read_text().splitlines()
    return [json.loads(line)["iteration"] for line in lines]


def test_what_is_done_again_is_taken_out(tmp_path):
    write(tmp_path, 19, 39, 59, 79)
    cut_metrics(tmp_path, 50)
    assert left(tmp_path) == [19, 39]
    cut_metrics(tmp_path, 50)
    assert left(tmp_path) == [19, 39]


def test_wherever_it_stands(tmp_path):
    """The losses of a batch that was passed over are an iteration older than the rest."""
    write(tmp_path, 19, 59, 58, 39)
    cut_metrics(tmp_path, 59)
    assert left(tmp_path) == [19, 58, 39]


def test_a_torn_line_too(tmp_path):
    for torn in ('{"iteration": 3', '{"iteration": 39, "loss": 1}', "\n", "[]\n", "\0\0"):
        write(tmp_path, 19, torn=torn)
        cut_metrics(tmp_path, 40)
        assert left(tmp_path) == [19], torn


def test_lines_of_one_iteration_become_one(tmp_path):
    write(tmp_path, 19, 39, 39)
    cut_metrics(tmp_path, 39, {"iteration": 39, "loss": 3.9, "bbox/AP": 20.0})
    assert left(tmp_path) == [19, 39]
    assert "bbox/AP" in (tmp_path / "metrics.json").read_text().splitlines()[-1]


def test_a_writer_that_has_it_open_goes_on_at_its_end(tmp_path):
    write(tmp_path, 19, 39)
    with (tmp_path / "metrics.json").open("a") as file:
        cut_metrics(tmp_path, 30)
        file.write(json.dumps({"iteration": 35}) + "\n")
    assert left(tmp_path) == [19, 35]


def test_without_a_file(tmp_path):
    cut_metrics(tmp_path, 0)
    assert not list(tmp_path.iterdir())
