"""The reports in a browser, wide and as on a phone."""

import re
from pathlib import Path

import pytest
from browser import ask
from test_report import category, numbers, save_run
from trees import small_visa

import spd_fast
from spd_fast.evaluate import EvaluateConfig
from spd_fast.report import write_report
from spd_fast.reproduce import ReproduceConfig, reproduce

# What must hold of every page.
SOUND = """
const images = [...document.images];
const root = document.documentElement;
const found = {
  width: window.innerWidth,
  overflow: root.scrollWidth - root.clientWidth,
  unseen: images.filter((image) => !(
    image.complete && image.naturalWidth && image.getBoundingClientRect().width)).length,
  images: images.length,
  silent: images.filter((image) => !image.alt.trim()).length,
  unnamed: [...document.querySelectorAll("button, input")].filter(
    (e) => !(e.textContent.trim() || e.closest("label")?.textContent.trim())).length,
  lost: [...document.querySelectorAll("a[href^='#']")].filter(
    (a) => !document.querySelector(a.getAttribute("href"))).length,
};
"""
TABLE = """
const table = document.querySelector("table[data-sortable]");
const titles = () => [...table.tBodies[0].rows].filter(
  (row) => row.getClientRects().length).map((row) => row.cells[0].textContent.trim());
const buttons = table.tHead.querySelectorAll("button");
"""


def sound(found: dict, images: int, width: int) -> None:
    assert found["width"] == width
    assert found["images"] == images > 0
    for name in ("overflow", "unseen", "silent", "unnamed", "lost"):
        assert found[name] == 0, name


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    scores = {"candle": 0.5, "pcb1": 0.9, "cashew": 0.7, "fryum": 0.8}
    found = [category(root, n, image=numbers(au_roc=score)) for n, score in scores.items()]
    found[3]["image"]["au_pr"] = None
    run = save_run(root, "one", found)
    write_report([run], root / "report.html", "A report")
    return root / "report.html"


@pytest.mark.parametrize("width", [1280, 390])
def test_report(report, width, tmp_path):
    question = (
        SOUND
        + TABLE
        + """
        found.before = titles();
        found.buttons = buttons.length;
        found.low = Math.min(...[...buttons].map((b) => b.getBoundingClientRect().height));
        buttons[1].click();
        found.falling = titles();
        found.said = buttons[1].parentElement.getAttribute("aria-sort");
        buttons[1].click();
        found.rising = titles();
        buttons[1].click();
        found.again = titles();
        found.silence = buttons[1].parentElement.getAttribute("aria-sort");
        buttons[2].click();
        found.without = titles();
        buttons[2].click();
        buttons[0].click();
        found.named = titles();
        buttons[0].click();
        buttons[0].click();
        const shown = (name) => [...document.querySelectorAll(`[data-category=${name}]`)]
            .filter((element) => element.getClientRects().length).length;
        document.querySelector("[data-filter] details").open = true;
        const boxes = [...document.querySelectorAll("[data-filter] input")];
        found.boxes = boxes.map((box) => box.closest("label").textContent.trim());
        found.all = shown("pcb1");
        boxes[1].click();
        found.less = [titles(), shown("pcb1"), shown("candle")];
        found.note = document.querySelector("[role=status]").textContent;
        const [all, none] = document.querySelectorAll("[data-filter] button");
        none.click();
        found.none = [titles(), document.querySelector("[role=status]").textContent];
        all.click();
        found.back = [titles(), shown("pcb1"), document.querySelector("[role=status]").textContent];
        return found;
        """
    )
    found, complaints = ask(report, width, question, tmp_path)
    assert complaints == []
    sound(found, 4 * 2, width)
    before = ["Candle", "Pcb1", "Cashew", "Fryum", "Mean"]
    assert found["before"] == found["again"] == before
    assert found["buttons"] == 1 + 9 and found["low"] >= 32
    assert found["falling"] == ["Pcb1", "Fryum", "Cashew", "Candle", "Mean"]
    assert found["rising"] == ["Candle", "Cashew", "Fryum", "Pcb1", "Mean"]
    assert (found["said"], found["silence"]) == ("descending", None)
    assert found["without"] == ["Candle", "Pcb1", "Cashew", "Fryum", "Mean"]  # no value: last
    assert found["named"] == ["Candle", "Cashew", "Fryum", "Pcb1", "Mean"]
    assert found["boxes"] == before[:-1]
    assert found["all"] == 1 + 1 + 4 + 1  # the row, the link, four curves, the pictures
    assert found["less"] == [["Candle", "Cashew", "Fryum", "Mean"], 0, found["all"]]
    assert found["note"] == "3 of the 4 categories are shown. Means are over all 4."
    assert found["none"] == [["Mean"], "None of the 4 categories are shown. Means are over all 4."]
    assert found["back"] == [before, found["all"], ""]


def test_wide_tables_and_long_names_on_a_phone(tmp_path):
    runs, long = [], "a_name_of_a_folder_that_is_quite_long_without_any_space_in_it"
    for i in range(3):
        root = tmp_path / f"run{i}"
        better = numbers(au_roc=0.5 + i / 10, max_f1=0.5 + i / 10)  # the last one is marked
        found = [category(root, n, image=better, n_examples=1) for n in (long, "chewinggum")]
        runs.append(save_run(root, f"{long}{i}", found))
    write_report(runs, tmp_path / "report.html", "A report")
    question = (
        SOUND
        + TABLE
        + """
        document.querySelector("[data-filter] details").open = true;
        found.overflow = root.scrollWidth - root.clientWidth;
        [found.long, found.short] = [...table.tBodies[0].rows].map((row) => {
          const text = document.createRange();
          text.selectNodeContents(row.cells[0]);
          return text.getBoundingClientRect();
        });
        return found;
        """
    )
    found, complaints = ask(tmp_path / "report.html", 390, question, tmp_path / "profile")
    assert complaints == []
    sound(found, 3 * 2, 390)
    assert found["long"]["width"] < 390 / 2  # the names do not scroll: the numbers need room
    assert found["short"]["height"] < 27  # one line


OTHER = """<!DOCTYPE html><table data-sortable>
<thead><tr><th>Name<th>Kind<th colspan=2>Change</thead>
<tbody><tr class=section><th colspan=4>Some<tr><th>a<td>one<td>+9<td>1<tr><th>b<td>–<td>−30<td>2
<tr class=section><th colspan=4>More<tr><th>c<td>two<td>–<td>3<tr><th>d<td>a third<td>10.5<td>4
<tr class=mean><th>Mean<td><td>0<td>0</tbody></table><script>%s</script>"""


def test_any_table(tmp_path):
    script = Path(spd_fast.__file__).parent / "templates" / "table.js"
    page = tmp_path / "page.html"
    page.write_text(OTHER % script.read_text(encoding="utf-8"), encoding="utf-8")
    question = """
    const order = () => [...document.querySelectorAll("tbody tr:not(.off)")].map(
      (row) => row.cells[0].textContent.trim()).join(" ");
    return [...document.querySelectorAll("button")].map(
      (button) => [1, 2, 3].map(() => { button.click(); return order(); }));
    """
    found, complaints = ask(page, 800, question, tmp_path / "profile")
    original = "Some a b More c d Mean"
    assert complaints == []
    assert found == [
        ["a b c d Mean", "d c b a Mean", original],
        ["d a c b Mean", "c a d b Mean", original],  # a third, one, two
        ["d a b c Mean", "b a d c Mean", original],
    ]


def test_a_page_that_complains_is_noticed(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html><script>nothing.at.all</script>")
    _, complaints = ask(page, 800, "return 1;", tmp_path / "profile")
    assert len(complaints) == 1 and "nothing is not defined" in complaints[0]
    page.write_text("<!DOCTYPE html><img src='http://example.org/a.png'>")
    found, _ = ask(page, 800, SOUND + "return found;", tmp_path / "profile")
    assert (found["unseen"], found["silent"]) == (1, 1)


REPRODUCED = """
const tables = [...document.querySelectorAll("table[data-sortable]")];
found.tables = tables.map((table) => table.tBodies[0].rows.length);
const second = tables[1];
const rows = () => [...second.tBodies[0].rows].filter(
  (row) => row.getClientRects().length).map((row) => row.cells[0].textContent.trim());
found.before = rows();
second.tHead.querySelectorAll("button")[2].click();  // ours: only one category has it
found.sorted = rows();
found.numbers = second.tBodies[0].rows[0].cells[2].textContent;
found.labels = tables.map((table) => [...table.tHead.querySelectorAll("button")].map(
  (button) => button.ariaLabel));
return found;
"""


@pytest.mark.parametrize("width", [1280, 390])
def test_reproduced_tables(reproduced, width, tmp_path):
    found, complaints = ask(reproduced, width, SOUND + REPRODUCED, tmp_path)
    assert complaints == []
    sound(found, 3, width)  # figures 7, 8 and 12
    assert found["tables"] == [8, 13 + 3]  # of table 7 with its three sections
    assert found["before"][:2] == ["Complex structure", "PCB1"] and found["before"][-1] == "Mean"
    assert (found["sorted"][0], found["sorted"][-1]) == ("PCB1", "Mean")
    assert len(found["sorted"]) == 13  # sections are hidden
    assert "[" in found["numbers"]
    assert all(len(set(its)) == len(its) for its in found["labels"])  # told apart when heard
    assert found["labels"][0][0] == "Sort by Pre-training"
    assert re.fullmatch("Sort by .+, .+, paper", found["labels"][0][1])


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    root = tmp_path_factory.mktemp("reproduced")
    visa = small_visa(root / "visa", ("pcb1",))
    settings = EvaluateConfig(data="", out="", n_features=20, workers=2, batch_size=4)
    config = ReproduceConfig(
        targets=("table2", "table7"),
        weights={"simsiam": "random"},
        data={"visa": str(visa)},
        out=str(root / "out"),
        settings=settings,
        backbone="resnet18",
    )
    assert reproduce(config) == {}
    return root / "out" / "reproduce.html"
