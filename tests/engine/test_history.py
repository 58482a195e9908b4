"""What metrics.json holds after a training was stopped."""

import json

from gn_det.engine.history import cut_metrics


def write(folder, *iterations: int, torn: str = "") -> None:
    lines = [json.dumps({"iteration": i, "loss": i / 10}) + "\n" for i in iterations]
    (folder / "metrics.json").write_text("".join(lines) + torn)


def left(folder) -> list[int]:
    lines = (folder / "metrics.json").read_text().splitlines()
    return [json.loads(line)["iteration"] for line in lines]


def test_what_is_done_again_is_taken_off(tmp_path):
    write(tmp_path, 19, 39, 59, 79)
    assert [line["loss"] for line in cut_metrics(tmp_path, 50)] == [7.9, 5.9]
    assert left(tmp_path) == [19, 39]
    assert cut_metrics(tmp_path, 50) == []


def test_a_torn_line_too(tmp_path):
    for torn in ('{"iteration": 3', '{"iteration": 39, "loss": 1}', "\n", "[]\n", "\0\0"):
        write(tmp_path, 19, torn=torn)
        cut_metrics(tmp_path, 40)
        assert left(tmp_path) == [19], torn


def test_an_earlier_training_in_the_same_folder_stays(tmp_path):
    write(tmp_path, 19, 39, 59, 0, 19, 39)
    cut_metrics(tmp_path, 20)
    assert left(tmp_path) == [19, 39, 59, 0, 19]


def test_a_writer_that_has_it_open_goes_on_at_its_end(tmp_path):
    write(tmp_path, 19, 39)
    with (tmp_path / "metrics.json").open("a") as file:
        cut_metrics(tmp_path, 30)
        file.write(json.dumps({"iteration": 35}) + "\n")
    assert left(tmp_path) == [19, 35]


def test_without_a_file(tmp_path):
    assert cut_metrics(tmp_path, 0) == [] and not list(tmp_path.iterdir())
