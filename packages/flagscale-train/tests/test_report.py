"""The page on a training, from events as real runs write them."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from flagscale_train.chart import Series, draw, short
from flagscale_train.cli import main
from flagscale_train.errors import NotFound
from flagscale_train.report import report

KILLED = "the supervisor was killed by signal 9"
VOID = {"meta", "path", "circle"}


class Page(HTMLParser):
    """Checks that elements close, and collects text and what would be fetched."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.texts, self.elements = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("src", "href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


@pytest.fixture
def experiment(recorded_experiment, tmp_path):
    """An experiment of two recorded runs: one whose supervisor was killed, one that resumed."""
    folder = shutil.copytree(recorded_experiment, tmp_path / "recorded")
    (folder / "runs" / "latest").symlink_to(max(path.name for path in (folder / "runs").iterdir()))
    return folder


def test_the_page_tells_of_both_runs(experiment):
    path = report(experiment)
    assert path == experiment / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.links == [], "nothing is fetched"
    assert "http" not in path.read_text(encoding="utf-8")
    for told in ("2 runs", KILLED, "resuming from", "finished after step 20"):
        assert told in page.text
    assert ("meta", {"name": "viewport", "content": "width=device-width,initial-scale=1"}) in page.elements
    charts = [attrs["aria-label"] for tag, attrs in page.elements if tag == "svg"]
    assert charts == [
        "loss, held-out loss",
        "gradient norm",
        "tokens per second",
        "memory",
        "learning rate",
    ]
    assert ("small", {"class": "s1"}) in page.elements, "whose colour the dots are"
    assert "\u25cf held-out loss" in page.text
    marks = [attrs for tag, attrs in page.elements if attrs.get("class") == "mark"]
    assert len(marks) == len(charts), "where the second run resumed"


PHONE_PX = 360
MARGINS_PX = 2 * 16


def test_the_page_fits_a_phone(experiment):
    """What no browser is at hand to show: nothing is wider than the screen, nothing is too small to read."""
    raw = report(experiment).read_text(encoding="utf-8")
    page = Page(raw)
    assert ("meta", {"name": "viewport", "content": "width=device-width,initial-scale=1"}) in page.elements
    for attributes in (attributes for _, attributes in page.elements):
        assert not {"width", "height", "style"} & attributes.keys(), "sizes are the style sheet's"
    style = re.search("<style>(.*?)</style>", raw, re.DOTALL)[1]
    for unwanted in ("url(", "@import", "px;width"):
        assert unwanted not in style
    for name, value in re.findall(r"[;{ ](width|min-width|height):([^;}]+)", style):
        assert value in {"100%", "auto"} or (name == "min-width" and float(value[:-3]) * 16 < PHONE_PX / 3)
    # Columns of charts and cards shrink to one where a screen has no room for two.
    assert "minmax(min(100%,26rem),1fr)" in style
    assert "body{overflow-wrap:anywhere}" in style, "long paths and option names"
    narrow, size = re.search(r"@media\(max-width:(\d+)rem\).*svg text\{font-size:(\d+)px\}", style).groups()
    assert int(narrow) * 16 >= PHONE_PX
    for tag, attributes in page.elements:
        if tag == "svg":
            width = float(attributes["viewbox"].split()[2])
            assert int(size) * (PHONE_PX - MARGINS_PX) / width >= 10, "labels of at least 10 px"


def test_a_step_that_was_no_number_is_told(experiment):
    events = max((experiment / "runs").glob("[0-9]*")) / "events.jsonl"
    records = [json.loads(line) for line in events.read_text().splitlines()]
    last = max((record for record in records if record["event"] == "step"), key=lambda one: one["iteration"])
    last.update(loss=None, not_finite=["loss"], skipped=True)
    events.write_text("".join(json.dumps(record) + "\n" for record in records))
    page = Page(report(experiment).read_text(encoding="utf-8"))
    assert "step 20: loss not a number, update left out" in page.text
    assert "loss not a number" in page.text, "the newest figure"


def test_a_step_trained_twice_counts_as_it_was_last(experiment):
    runs = sorted((experiment / "runs").glob("[0-9]*"))
    losses = [
        {
            event["iteration"]: event["loss"]
            for event in map(json.loads, (run / "events.jsonl").read_text().splitlines())
            if event["event"] == "step"
        }
        for run in runs
    ]
    assert losses[0].keys() & losses[1].keys(), "the recorded runs overlap"
    last = losses[1][max(losses[1])]
    page = Page(report(experiment).read_text(encoding="utf-8"))
    assert f"{last:.4f}" in page.text
    line = next(attrs["d"] for tag, attrs in page.elements if attrs.get("class") == "line s0")
    assert len(re.split("[ML]", line)) - 1 == len(losses[0] | losses[1])


def test_one_run_alone(experiment):
    first = sorted((experiment / "runs").glob("[0-9]*"))[0]
    path = report(first)
    assert path == first / "report.html"
    text = Page(path.read_text(encoding="utf-8")).text
    assert "1 run," in text
    assert "finished after step 20" not in text


def test_configuration_versions_and_chips_are_there_and_text_is_escaped(experiment):
    plan_file = max((experiment / "runs").glob("[0-9]*")) / "plan.json"
    plan = json.loads(plan_file.read_text())
    plan["facts"]["megatron_options"] |= {"data_path": "<script>alert(1)</script>", "wandb_api_key": "s3cret"}
    plan_file.write_text(json.dumps(plan))
    raw = report(experiment).read_text(encoding="utf-8")
    page = Page(raw)
    assert "<script" not in raw
    assert "s3cret" not in raw
    for told in ("num_layers", "torch", "megatron", "chip", "cpu", "float32"):
        assert told in page.texts or told in page.text


def test_the_command_writes_where_it_is_told(experiment, tmp_path, capsys):
    assert main(["report", str(experiment), "--output", str(tmp_path / "page" / "x.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page" / "x.html")
    assert main(["report", str(experiment), "--output", "/proc/x.html"]) == 2
    assert main(["report", str(tmp_path)]) == 3
    with pytest.raises(NotFound):
        report(tmp_path)


def test_a_chart_keeps_every_spike_and_leaves_gaps():
    points = [(n, 100.0 if n == 7_777 else 1.0) for n in range(20_000)]
    text = draw([Series("loss", points)])
    assert text.count("L") < 1000
    high = min(float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", text.split('class="line')[1]))
    assert high < 30, "the spike reaches the top"
    text = draw([Series("loss", [(1, 1.0), (2, None), (3, float("nan")), (4, 2.0), (5, 2.5)])])
    assert text.count('class="line s0"') == 2
    assert draw([Series("loss", [(1, None)])]) == '<p class="none">no values</p>'
    assert draw([Series("loss", [(1, 0.0)])]).startswith("<svg")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12_500, "12.5k"),
        (3_200_000, "3.2M"),
        (0.0012, "0.0012"),
        (0.0006, "6e-4"),
        (-1.25e-5, "-1.25e-5"),
        (6.25, "6.25"),
        (0, "0"),
    ],
)
def test_numbers_are_short(value, text):
    assert short(value) == text
