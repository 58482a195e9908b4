"""What a report says of runs: folders made for it; tests/engine has real ones."""

import json
import shutil
from pathlib import Path

import pytest
from pycocotools.coco import COCO

from gn_det.evaluation.report import Run, write_report

LINES = [
    {"iteration": 19, "time": 0.3, "total_loss": 3.0, "peak_memory_mib": 900.0},
    {"iteration": 39, "time": 9.0, "total_loss": 2.5, "peak_memory_mib": 950.0},
    # Interrupted, and resumed from iteration 30: iteration 39 comes again
    {"iteration": 39, "time": 0.1, "total_loss": 2.0, "peak_memory_mib": 800.0},
    {"iteration": 59, "time": 0.2, "total_loss": 1.0, "peak_memory_mib": 700.0},
    {"iteration": 60, "bbox/AP": 1.0, "segm/AP": 1.0},
]
# Of a process that was killed
HALF = '{"iteration": 79, "ti'


def perfect(annotations: Path) -> list[dict]:
    """Detections that are the ground truth."""
    truth, found = COCO(str(annotations)), []
    for a in truth.anns.values():
        rle = truth.annToRLE(a)
        if isinstance(rle["counts"], bytes):
            rle = {**rle, "counts": rle["counts"].decode()}
        keys = {key: a[key] for key in ("image_id", "category_id", "bbox")}
        found.append({**keys, "segmentation": rle, "score": 0.9})
    return found


def make_run(folder: Path, norm: str, images: int, seed: int, detections: list[dict]) -> Run:
    """What a training leaves."""
    (folder / "inference").mkdir(parents=True)
    (folder / "metrics.json").write_text("\n".join([*map(json.dumps, LINES), HALF]))
    record = {"seed": seed, "device": "abacus", "parameters": {"trainable": 1234, "frozen": 5}}
    record |= {"versions": {"torch": "2"}, "git_commit": None}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "inference/coco_instances_results.json").write_text(json.dumps(detections))
    return Run(norm, images, seed, folder, "somewhere")


@pytest.fixture
def runs(tmp_path, shapes) -> list[Run]:
    """One model that finds nothing, and one that finds everything."""
    found = {"nothing": [], "all <of it>": perfect(shapes / "instances_val.json")}
    return [make_run(tmp_path / norm, norm, 2, 0, found[norm]) for norm in found]


ABOUT = {"title": "T", "text": "Text.", "facts": {"command": "do it", "noticed": ["<one>", "two"]}}


def report(runs: list[Run], shapes: Path, output: Path) -> dict:
    return write_report(runs, shapes / "instances_val.json", output, ABOUT)


def test_numbers(runs, shapes, tmp_path):
    results = report(runs, shapes, tmp_path)
    assert results == json.loads((tmp_path / "results.json").read_text())
    nothing, everything = results["runs"]
    assert nothing["bbox"]["AP"] == nothing["segm"]["AR100"] == 0
    assert everything["bbox"]["AP"] == everything["segm"]["AP"] == pytest.approx(100)
    # the resumed 0.1 replaces the abandoned 9.0
    assert nothing["seconds_per_iteration"] == 0.2
    assert nothing["peak_memory_mib"] == 900
    assert results["best"]["norm"] == "all <of it>"
    truth = json.loads((shapes / "instances_val.json").read_text())
    assert results["validation"]["pictures"] == len(truth["images"])


def test_says_what_was_found(runs, shapes, tmp_path):
    report(runs, shapes, tmp_path)
    sentence = (
        "All <of it> against nothing: box AP 100.0 higher (+100.0 to +100.0), mask AP 100.0 higher "
        "(+100.0 to +100.0) (95% intervals for one seed, so of the pictures alone)."
    )
    assert sentence in (tmp_path / "report.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert sentence.replace("<of it>", "&lt;of it&gt;") in page
    assert "<of it>" not in page and "<one>" not in page, "escaped"
    assert "abacus" in page and "1,234" in page


def test_no_difference(shapes, tmp_path):
    """Two models that find the same: the interval holds 0, and it is said."""
    found = perfect(shapes / "instances_val.json")[::2]
    runs = [make_run(tmp_path / norm, norm, 2, 0, found) for norm in ("one", "two")]
    results = report(runs, shapes, tmp_path)
    assert "no difference seen in box AP (+0.0 to +0.0)" in results["answer"]
    assert {gap["verdict"] for gap in results["differences"]} == {"no difference seen"}


def test_too_little_learnt(shapes, tmp_path):
    """One object found against none: an interval that lies above 0, of models that know nothing."""
    truth = perfect(shapes / "instances_val.json")
    wrong = [{**d, "bbox": [0, 0, 1, 1], "score": 0.95} for d in truth]
    found = {"one": [], "two": [*truth[:1], *wrong, *wrong]}
    runs = [make_run(tmp_path / norm, norm, 2, 0, found[norm]) for norm in found]
    results = report(runs, shapes, tmp_path)
    ap = {run["norm"]: run["bbox"]["AP"] for run in results["runs"]}
    assert ap["one"] == 0 < ap["two"] < 1
    box, mask = results["differences"]
    assert box["verdict"] == "too little learnt" and mask["verdict"] == "higher"
    told = "too little learnt to compare box AP (both below 1), mask AP"
    assert told in results["answer"] and told in (tmp_path / "report.md").read_text()


@pytest.fixture
def grid(tmp_path, shapes) -> list[Run]:
    """Two norms, two batch sizes, two seeds; the more is found, the larger the batch and seed."""
    truth = perfect(shapes / "instances_val.json")
    runs = []
    for seed in (0, 1):
        for images in (1, 2):
            for norm, missed in (("FrozenBN", 6), ("GN", 3)):
                some = [d for i, d in enumerate(truth) if i % (missed * images + seed)]
                folder = tmp_path / f"{norm}_{images}_{seed}"
                runs.append(make_run(folder, norm, images, seed, some))
    return runs


def test_seeds_and_batches(grid, shapes, tmp_path):
    """Means and deviations over seeds; differences at the same batch, over the same seeds."""
    results = report(grid, shapes, tmp_path)
    assert [m["model"] for m in results["models"]] == [
        *("FrozenBN, 1 a batch", "GN, 1 a batch", "FrozenBN, 2 a batch", "GN, 2 a batch")
    ]
    entries = {(r["norm"], r["images_per_batch"], r["seed"]): r for r in results["runs"]}
    for model in results["models"]:
        key = model["norm"], model["images_per_batch"]
        one, two = (entries[(*key, seed)]["segm"]["AP"] for seed in (0, 1))
        assert model["segm"]["AP"]["mean"] == pytest.approx((one + two) / 2)
        assert model["segm"]["AP"]["sd"] == pytest.approx(abs(one - two) / 2**0.5)
    assert len(results["differences"]) == 4
    for gap in results["differences"]:
        images, kind = gap["images_per_batch"], {"box": "bbox", "mask": "segm"}[gap["of"]]
        gaps = [
            entries["GN", images, s][kind]["AP"] - entries["FrozenBN", images, s][kind]["AP"]
            for s in (0, 1)
        ]
        assert gap["mean"] == pytest.approx(sum(gaps) / 2) and gap["low"] <= gap["mean"]
    assert results["answer"].startswith("At 1 a batch GN against FrozenBN: ")
    assert "; at 2 a batch GN against FrozenBN: " in results["answer"]
    page = (tmp_path / "report.html").read_text()
    # loss, box AP and mask AP over the training; box and mask AP by batch
    assert page.count("<svg") == 5


def test_unpaired_seeds(grid, shapes, tmp_path):
    """After a failure the seeds that both have are compared."""
    left = [run for run in grid if run.folder.name not in ("GN_1_1", "FrozenBN_2_0")]
    results = report(left, shapes, tmp_path)
    seeds = {(g["images_per_batch"], g["of"]): g["seeds"] for g in results["differences"]}
    assert seeds == {(1, "box"): [0], (2, "box"): [1], (1, "mask"): [0], (2, "mask"): [1]}


def test_boxes_alone(shapes, tmp_path):
    """Nothing is said of masks where there are none."""
    truth = json.loads((shapes / "instances_val.json").read_text())
    for annotation in truth["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(truth))
    shutil.copytree(shapes / "images", tmp_path / "images")
    found = [
        {k: v for k, v in d.items() if k != "segmentation"}
        for d in perfect(shapes / "instances_val.json")
    ]
    runs = [make_run(tmp_path / norm, norm, 2, 0, found) for norm in ("one", "two")]
    write_report(runs, tmp_path / "boxes.json", tmp_path, ABOUT)
    assert "mask" not in (tmp_path / "report.md").read_text()


# In a real browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def page(grid, shapes, tmp_path):
    """The report in headless Chromium; what its console says fails the test."""
    playwright = pytest.importorskip("playwright.sync_api")
    report(grid, shapes, tmp_path)
    said = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, offline=True)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto((tmp_path / "report.html").as_uri())
        yield page
        browser.close()
    assert not said


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_in_a_browser(page):
    """Every picture shows, tables sort by what is clicked, pictures open large and close."""
    shown = "[...document.images].filter(i => i.alt).every(i => i.complete && i.naturalWidth > 0)"
    assert page.evaluate(shown) and page.locator(".pictures img").count() >= 3
    table = page.locator("table.sortable").first
    column = 3  # box AP
    head = table.locator("th").nth(column)
    for direction in ("descending", "ascending"):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == direction
        cells = table.locator(f"tbody tr td:nth-child({column + 1})").all_inner_texts()
        values = [float(cell.split()[0]) for cell in cells]
        assert values == sorted(values, reverse=direction == "descending")
        assert len(set(values)) > 1
    small = page.locator(".pictures button").first
    small.click()
    dialog = page.locator("dialog")
    assert dialog.is_visible()
    width = "(image) => image.getBoundingClientRect().width"
    large = dialog.locator("img").evaluate(width)
    assert large > 1.5 * small.locator("img").evaluate(width)
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_on_a_phone_and_on_paper(page, tmp_path):
    """Nothing but wide tables is wider than the screen, and these scroll by themselves."""
    page.set_viewport_size({"width": 375, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.evaluate("[...document.querySelectorAll('svg')].every(s => s.clientWidth > 250)")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 720, "height": 1000})
    wide = "[...document.querySelectorAll('.wide')].filter(w => w.scrollWidth > w.clientWidth + 1)"
    assert page.evaluate(f"{wide}.length") == 0, "paper cannot scroll"
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
