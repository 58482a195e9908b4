"""The report, tested with synthetic run folders; tests/comparison has real ones."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from gn_det.evaluation.markdown import literal
from gn_det.evaluation.report import Run, write_report

LINES = [
    {"iteration": 19, "time": 0.3, "total_loss": 3.0, "peak_memory_mib": 900.0},
    {"iteration": 39, "time": 9.0, "total_loss": 2.5, "peak_memory_mib": 950.0},
    # Interrupted, and resumed from iteration 30: iteration 39 is repeated
    {"iteration": 39, "time": 0.1, "total_loss": 2.0, "peak_memory_mib": 800.0},
    {"iteration": 59, "time": 0.2, "total_loss": 1.0, "peak_memory_mib": 700.0},
    {"iteration": 60, "bbox/AP": 1.0, "segm/AP": 1.0},
]
# An incomplete line of a killed process
HALF = '{"iteration": 79, "ti'


def perfect(annotations: Path) -> list[dict]:
    """Detections equal to the ground truth."""
    truth, detections = COCO(str(annotations)), []
    for a in truth.anns.values():
        rle = truth.annToRLE(a)
        if isinstance(rle["counts"], bytes):
            rle = {**rle, "counts": rle["counts"].decode()}
        keys = {key: a[key] for key in ("image_id", "category_id", "bbox")}
        detections.append({**keys, "segmentation": rle, "score": 0.9})
    return detections


def make_run(folder: Path, norm: str, images: int, seed: int, detections: list[dict]) -> Run:
    """Write the files of a finished training run."""
    (folder / "inference").mkdir(parents=True)
    (folder / "metrics.json").write_text("\n".join([*map(json.dumps, LINES), HALF]))
    record = {"seed": seed, "device": "abacus", "parameters": {"trainable": 1234, "frozen": 5}}
    record |= {"versions": {"torch": "2"}, "git_commit": None}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "inference/coco_instances_results.json").write_text(json.dumps(detections))
    return Run(norm, images, seed, folder, "somewhere")


@pytest.fixture
def runs(tmp_path, shapes) -> list[Run]:
    """One model without detections, and one with perfect detections."""
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
    # The 0.1 after the resume replaces the 9.0 before it
    assert nothing["seconds_per_iteration"] == 0.2
    assert nothing["peak_memory_mib"] == 900
    assert results["best"]["norm"] == "all <of it>"
    truth = json.loads((shapes / "instances_val.json").read_text())
    assert results["validation"]["pictures"] == len(truth["images"])


def test_answer_and_escaping(runs, shapes, tmp_path):
    report(runs, shapes, tmp_path)
    sentence = (
        "All <of it> against nothing: box AP 100.0 higher (+100.0 to +100.0), mask AP 100.0 higher "
        "(+100.0 to +100.0) (95% intervals for one seed, over images only)."
    )
    assert sentence.replace("<", "&lt;") in (tmp_path / "report.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert sentence.replace("<of it>", "&lt;of it&gt;") in page
    assert "<of it>" not in page and "<one>" not in page, "escaped"
    assert "abacus" in page


def test_no_difference(shapes, tmp_path):
    """Two models with equal detections: the interval includes 0."""
    found = perfect(shapes / "instances_val.json")[::2]
    runs = [make_run(tmp_path / norm, norm, 2, 0, found) for norm in ("one", "two")]
    results = report(runs, shapes, tmp_path)
    assert "no difference seen in box AP (+0.0 to +0.0)" in results["answer"]
    assert {gap["verdict"] for gap in results["differences"]} == {"no difference seen"}


def test_a_failed_baseline(runs, shapes, tmp_path):
    """The other norm does not become the baseline, and the failure comes first."""
    about = {**ABOUT, "pairs": [("GN", "FrozenBN")], "failed": {"FrozenBN": "1 of 1 runs (NaN)"}}
    folder = tmp_path / "GN"
    alone = [make_run(folder, "GN", 2, 0, perfect(shapes / "instances_val.json"))]
    results = write_report(alone, shapes / "instances_val.json", tmp_path, about)
    assert results["answer"].startswith("FrozenBN FAILED: 1 of 1 runs (NaN).")
    assert "nothing to compare" in results["answer"] and not results["differences"]


def without_masks(detections: list[dict]) -> list[dict]:
    """Perfect boxes with empty masks, as of a mask head that has not learned."""
    size = [detections[0]["segmentation"]["size"]]
    empty = mask_util.encode(np.zeros(size[0], dtype=np.uint8, order="F"))
    rle = {"size": size[0], "counts": empty["counts"].decode()}
    return [{**d, "segmentation": rle} for d in detections]


def test_a_mask_head_that_has_not_learned(shapes, tmp_path):
    """It is named, and is no loss of the norm: box AP decides."""
    truth = perfect(shapes / "instances_val.json")
    found = {"BN": truth[::3], "GN": without_masks(truth)}
    runs = [make_run(tmp_path / norm, norm, 2, 0, found[norm]) for norm in found]
    results = report(runs, shapes, tmp_path)
    box, mask = results["differences"]
    assert box["verdict"] == "higher" and mask["verdict"] == "not learned"
    assert mask["unlearned"] == ["GN"]
    assert "mask head of GN has learned nothing" in results["answer"]
    # The other way round, it is no gain either
    runs = [make_run(tmp_path / f"x{n}", n, 2, 0, found[n]) for n in ("GN", "BN")]
    results = report(runs, shapes, tmp_path)
    assert "Use GN." in results["answer"]


@pytest.mark.parametrize(
    ("found", "advice"),
    [
        ({"BN": 3, "BN/GN": 1, "GN": 2}, "Use BN/GN."),
        ({"BN": 1, "BN/GN": 3, "GN": 3}, "Use BN."),
        ({"BN": 1, "GN": 1}, "no norm is shown to be better than BN"),
    ],
)
def test_advice(found, advice, shapes, tmp_path):
    """Every n-th object is found; the norm that finds most is advised, unless none is better."""
    truth = perfect(shapes / "instances_val.json")
    runs = [make_run(tmp_path / n.replace("/", "-"), n, 2, 0, truth[::k]) for n, k in found.items()]
    assert advice in report(runs, shapes, tmp_path)["answer"]


def test_chosen_pairs(shapes, tmp_path):
    """The backbone alone is compared, too."""
    truth = perfect(shapes / "instances_val.json")
    names = ("BN", "BN/GN", "GN")
    runs = [make_run(tmp_path / n.replace("/", "-"), n, 2, 0, truth) for n in names]
    pairs = [("BN/GN", "BN"), ("GN", "BN"), ("GN", "BN/GN")]
    results = write_report(runs, shapes / "instances_val.json", tmp_path, {**ABOUT, "pairs": pairs})
    got = [(d["norm"], d["baseline"]) for d in results["differences"] if d["of"] == "box"]
    assert got == pairs


def test_ap_too_low_to_compare(shapes, tmp_path):
    """Both APs are below 1, so a significant difference is not reported as one."""
    truth = perfect(shapes / "instances_val.json")
    wrong = [{**d, "bbox": [0, 0, 1, 1], "score": 0.95} for d in truth]
    found = {"one": [], "two": [*truth[:1], *wrong, *wrong]}
    runs = [make_run(tmp_path / norm, norm, 2, 0, found[norm]) for norm in found]
    results = report(runs, shapes, tmp_path)
    ap = {run["norm"]: run["bbox"]["AP"] for run in results["runs"]}
    assert ap["one"] == 0 < ap["two"] < 1
    box, mask = results["differences"]
    assert box["verdict"] == "too low to compare" and mask["verdict"] == "higher"
    text = "box AP too low to compare (both below 1), mask AP"
    assert text in results["answer"] and text in (tmp_path / "report.md").read_text()


@pytest.fixture
def grid(tmp_path, shapes) -> list[Run]:
    """Two norms, two batch sizes, two seeds; larger batches and seeds have more detections."""
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
    """Means and deviations over seeds; differences at equal batch size, over equal seeds."""
    results = report(grid, shapes, tmp_path)
    assert [m["model"] for m in results["models"]] == [
        *("FrozenBN, batch size 1", "GN, batch size 1"),
        *("FrozenBN, batch size 2", "GN, batch size 2"),
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
    assert "At batch size 1 GN against FrozenBN: " in results["answer"]
    assert "; at batch size 2 GN against FrozenBN: " in results["answer"]
    page = (tmp_path / "report.html").read_text()
    # loss, box AP and mask AP by iteration; box and mask AP by batch size
    assert page.count("<svg") == 5


def test_unpaired_seeds(grid, shapes, tmp_path):
    """Norms are compared over their common seeds, as after a failed run."""
    left = [run for run in grid if run.folder.name not in ("GN_1_1", "FrozenBN_2_0")]
    results = report(left, shapes, tmp_path)
    seeds = {(g["images_per_batch"], g["of"]): g["seeds"] for g in results["differences"]}
    assert seeds == {(1, "box"): [0], (2, "box"): [1], (1, "mask"): [0], (2, "mask"): [1]}


def test_boxes_only(shapes, tmp_path):
    """Without masks the report does not mention them."""
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


HOSTILE = [
    "a | b",
    "two\nlines",
    "</td></tr></table><script>alert(1)</script>",
    "![x](http://127.0.0.1/x.png) [y](javascript:y)",
    '"><img src=x onerror=alert(1)>',
    "`code\\` \\| *x* __y__ &lt;b> $z$ \x00\x1b[1m\r",
]


class Page(HTMLParser):
    """Tags of a page with their attributes, and texts of its table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.cells = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


@pytest.fixture
def hostile(shapes, tmp_path) -> Path:
    """A report with hostile names of classes, images, norms, folders and facts."""
    truth = json.loads((shapes / "instances_val.json").read_text())
    for category, name in zip(truth["categories"], HOSTILE, strict=True):
        category["name"] = name
    for entry in truth["images"]:
        name = entry["file_name"]
        entry |= {"file_name": str(shapes / "images" / name), "listed_as": HOSTILE[4] + name}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    found = perfect(shapes / "instances_val.json")
    runs = [
        make_run(tmp_path / folder, norm, 2, 0, found[::2] if norm == "one" else found)
        for folder, norm in (("one", "one"), ("a` `` |<b>", HOSTILE[4] + "|$x^{$"))
    ]
    about = {**ABOUT, "title": HOSTILE[2], "text": HOSTILE[3]}
    write_report(runs, tmp_path / "truth.json", tmp_path, about | {"facts": {"names": HOSTILE}})
    return tmp_path


def test_hostile_names_in_markdown(hostile):
    """Each name is the text of one table cell, without markup."""
    text = (hostile / "report.md").read_text()
    assert text.isprintable() or set(filter(lambda c: not c.isprintable(), text)) == {"\n"}
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 4
    for table in tables:
        # An escaped bar is text
        rows = [re.split(r"(?<!\\)(?:\\\\)*\|", row) for row in table.splitlines()]
        assert len({len(row) for row in rows}) == 1 and set(rows[1][1:-1]) == {"---"}
    names = [row.split(" | ")[0] for row in tables[-1].splitlines()[2:]]
    assert len(names) == len(HOSTILE) and names[1] == "| two lines"
    outside = re.sub(r"(`+).*?\1", "", text.replace("\\`", ""))
    assert "<" not in outside and "](" not in outside.replace("\\](", "")
    assert "```a` `` |<b>```" in text.replace(f"{hostile}/", "")


def test_ordinary_names_stay_readable_in_markdown():
    names = ["traffic light", "R-50", "BN*", "BN*, batch size 2", "shapes_val", "R&D"]
    names += ["+1.0", "1.5"]
    assert [literal(name) for name in names] == names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("- a", r"\- a"),
        ("1. a", r"1\. a"),
        ("# a", r"\# a"),
        ("> a", r"\> a"),
        ("---", r"\---"),
        ("*a*b", r"\*a\*b"),
        ("_a_", r"\_a\_"),
        ("~~a~~", r"\~\~a\~\~"),
        ("<!-- a", "&lt;!-- a"),
        ("&#60;", "&amp;#60;"),
        ("[a](b)", r"[a\](b)"),
        ("[a]: b", r"[a\]: b"),
        ("[a]", r"[a\]"),
        ("a\\|", r"a\\\|"),
        ("a\u2028b\u202ec", "a b c"),
    ],
)
def test_markdown_markup_is_escaped(name, expected):
    assert literal(name) == expected


def test_hostile_names_in_html(hostile):
    page = Page((hostile / "report.html").read_text())
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and tags.count("table") == 6
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(i["src"].startswith("data:image/jpeg;base64,") for i in images if "src" in i)
    assert not [name for _, attributes in page.tags for name in attributes if name[:2] == "on"]
    assert any(HOSTILE[4] in attributes["alt"] for attributes in images)
    assert {*HOSTILE[:5]} <= {*page.cells}


# Tests in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def page(grid, shapes, tmp_path):
    """The report in headless Chromium; any console message fails the test."""
    playwright = pytest.importorskip("playwright.sync_api")
    report(grid, shapes, tmp_path)
    messages = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, offline=True)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto((tmp_path / "report.html").as_uri())
        yield page
        browser.close()
    assert not messages


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_in_a_browser(page):
    """All images load, tables sort by the clicked column, and images can be enlarged."""
    shown = "[...document.images].filter(i => i.alt).every(i => i.complete && i.naturalWidth > 0)"
    assert page.evaluate(shown) and page.locator(".images img").count() >= 3
    table = page.locator("table.sortable").first
    column = 1  # box AP
    head = table.locator("th").nth(column)
    for direction in ("descending", "ascending"):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == direction
        cells = table.locator(f"tbody tr td:nth-child({column + 1})").all_inner_texts()
        values = [float(cell.split()[0]) for cell in cells]
        assert values == sorted(values, reverse=direction == "descending")
        assert len(set(values)) > 1
    small = page.locator(".images button").first
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
    """Only wide tables exceed the screen, and scroll on their own; in print nothing does."""
    page.set_viewport_size({"width": 375, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.evaluate("[...document.querySelectorAll('svg')].every(s => s.clientWidth > 250)")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 720, "height": 1000})
    wide = "[...document.querySelectorAll('.wide')].filter(w => w.scrollWidth > w.clientWidth + 1)"
    assert page.evaluate(f"{wide}.length") == 0, "paper cannot scroll"
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
