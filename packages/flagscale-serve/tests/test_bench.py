"""Load on a server: what is asked, what is counted, and the page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from flagscale_serve.bench import Answered, Measured, Workload, measure, parse_slo, percentile
from flagscale_serve.chat import Server
from flagscale_serve.errors import InvalidService, NotServing

SHORT = ("--input-len", 8, "--output-len", 4, "--requests", 6, "--warmups", 1)


@pytest.fixture
def served(shell, model_dir):
    done = shell("run", model_dir, "--detach")
    assert done.returncode == 0, done.stderr
    return shell.the_status(model_dir)


def test_every_number_follows_from_the_times_of_the_requests():
    level = Measured(
        workload=Workload(num_requests=4),
        wall_s=2.0,
        requests=(
            Answered(ttft_s=0.1, gaps_s=(0.02, 0.04), output_tokens=3),
            Answered(ttft_s=0.3, gaps_s=(0.1, 0.1), output_tokens=3),
            Answered(ttft_s=0.2, output_tokens=1),
            Answered(error="it fell over"),
        ),
        generator="none",
    )
    told = level.to_dict({"ttft": 0.25, "tpot": 0.05})
    assert (told["answered"], told["failed"], told["errors"]) == (3, 1, ["it fell over"])
    assert (told["requests_per_s"], told["output_tokens_per_s"]) == (1.5, 3.5)
    # The first keeps both bounds, the second neither, the third has no further token to be late.
    assert (told["goodput_requests_per_s"], told["within_slo"]) == (1.0, 0.5)
    assert told["ttft_ms"]["p50"] == 200
    assert told["ttft_ms"]["p90"] == pytest.approx(280)
    assert told["tpot_ms"]["mean"] == pytest.approx(65)
    assert told["itl_ms"]["max"] == 100
    assert told["e2e_ms"]["max"] == 500
    assert level.goodput({"itl": 0.03}) == 0.5
    assert level.goodput({"e2e": 0.2}) == 1.0
    assert level.goodput({}) == 1.5


def test_percentiles_are_interpolated_between_ranks():
    assert [percentile([4.0, 1.0, 3.0, 2.0], rank) for rank in (0, 50, 75, 100)] == [1, 2.5, 3.25, 4]


def test_an_slo_is_read_with_its_units():
    assert parse_slo("ttft=200ms, tpot=20,e2e=1.5s") == {"ttft": 0.2, "tpot": 0.02, "e2e": 1.5}
    assert parse_slo("") == {}
    for wrong in ("speed=3", "ttft", "ttft=fast", "ttft=0", "ttft=-1", "ttft=1,ttft=2"):
        with pytest.raises(InvalidService, match="slo"):
            parse_slo(wrong)


class Page(HTMLParser):
    """Counts what a page holds, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.fetched += [value for name, value in attrs if name in ("src", "href")]


def test_bench_by_our_own_generator(shell, served):
    done = shell("bench", *SHORT, "--concurrency", "1,3", "--slo", "ttft=30s", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [one["concurrency"] for one in told["levels"]] == [1, 3]
    for level in told["levels"]:
        assert (level["answered"], level["failed"], level["generator"]) == (6, 0, "flagscale-serve")
        assert level["output_tokens"] == 6 * 4
        assert level["within_slo"] == 1.0
    assert "   3 at a time: " in done.stderr
    (page,) = (shell.home / served["run_dir"]).glob("bench-*/bench.html")
    assert json.loads(page.with_name("bench.json").read_text()) == told
    found = Page(page.read_text())
    assert found.fetched == []
    assert found.tags["svg"] == 7
    assert "Latency over throughput" in page.read_text()
    assert "Failed requests" not in page.read_text()
    assert told["subject"]["versions"] == {"transformers": "9.9"}
    assert "transformers_launch.py" in told["subject"]["commands"]["model"]
    assert "GiB" in told["subject"]["machine"]
    assert found.tags["tr"] == 3


def test_bench_of_an_address(shell, served, tmp_path):
    url = served["instances"][0]["url"]
    done = shell("bench", url, *SHORT, "--concurrency", 2, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/bench.json").read_text())["model"] == "from-the-list"
    assert str(tmp_path / "out" / "bench.html") in done.stdout


def test_bench_by_vllm_where_the_engine_is_vllm(shell, model_dir):
    assert shell("run", model_dir, "--engine", "vllm", "--detach").returncode == 0
    done = shell("bench", *SHORT, "--concurrency", 2, "--slo", "ttft=200ms", "--api-key", "k", "--json")
    assert done.returncode == 0, done.stderr
    (level,) = json.loads(done.stdout)["levels"]
    assert level["generator"] == "vllm bench serve"
    assert (level["answered"], level["failed"], level["errors"]) == (2, 1, ["it fell over"])
    assert (level["output_tokens_per_s"], level["goodput_requests_per_s"]) == (3.0, 0.5)
    argv = json.loads((shell.home / "pids.bench").read_text())
    asked = dict(pairwise(argv))
    assert (asked["--tokenizer"], asked["--served-model-name"]) == (str(model_dir), "tiny-qwen3")
    assert (asked["--random-input-len"], asked["--random-output-len"]) == ("8", "4")
    assert (asked["--num-prompts"], asked["--max-concurrency"], asked["--num-warmups"]) == ("6", "2", "1")
    assert not asked["--base-url"].endswith("/v1")
    assert "k" not in argv


def test_mistakes_are_told(shell, served):
    for words, code, message in (
        (["--slo", "speed=3"], 2, "slo: 'speed=3'"),
        (["--requests", "0"], 2, "num_requests: 0"),
        (["--concurrency", "0"], 2, "concurrency: 0"),
        (["--concurrency", "many"], 2, "--concurrency"),
        (["--generator", "vllm"], 2, "transformers refuses its requests"),
        (["--out", "/proc/nowhere"], 2, "choose a folder that can be written"),
    ):
        done = shell("bench", *SHORT, "--concurrency", "1", *words)
        assert done.returncode == code
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_server_that_is_gone_is_named():
    nobody = Server(url="http://127.0.0.1:9/v1", model="m")
    with pytest.raises(NotServing, match="nobody answers"):
        measure(nobody, "m", Workload(num_requests=1, concurrency=1), generator="own")


def test_requests_that_are_refused_are_counted(shell, served):
    done = shell("bench", "--output-len", 13, "--requests", 2, "--warmups", 0, "--concurrency", 1, "--json")
    assert done.returncode == 4
    (level,) = json.loads(done.stdout)["levels"]
    assert (level["answered"], level["failed"]) == (0, 2)
    assert level["errors"] == ["HTTP 400: 13 is unlucky"]
    (page,) = (shell.home / served["run_dir"]).glob("bench-*/bench.html")
    assert "<li>1 at a time: 2 x HTTP 400: 13 is unlucky</li>" in page.read_text()


PROFILE = """
- serve_id: a
  engine: vllm
  engine_args: {{model: {model}, served_model_name: m}}
  profile: {{prefix_len: 5, input_len: 6, output_len: 4, num_prompts: 7, range_ratio: {ratio}}}
"""


def test_the_load_of_a_file_is_its_profile(shell, serve_file, model_dir):
    path = serve_file(PROFILE.format(model=model_dir, ratio=1))
    assert shell("run", path, "--detach").returncode == 0
    words = ("bench", path, "--concurrency", 2, "--json")
    assert shell(*words).returncode == 0
    argv = json.loads((shell.home / "pids.bench").read_text())
    said = {word: argv[argv.index(word) + 1] for word in argv if word.startswith(("--random", "--num-p"))}
    assert said == {
        "--random-prefix-len": "5",
        "--random-input-len": "6",
        "--random-output-len": "4",
        "--random-range-ratio": "0",
        "--num-prompts": "7",
    }
    own = shell(*words, "--generator", "own", "--requests", 3, "--warmups", 0)
    (level,) = json.loads(own.stdout)["levels"]
    assert (level["answered"], level["output_tokens"]) == (3, 3 * 4)
    refused = shell("bench", serve_file(PROFILE.format(model=model_dir, ratio=0.5)), "--concurrency", 2)
    assert refused.returncode == 2
    assert "profile.range_ratio: 0.5" in refused.stderr
