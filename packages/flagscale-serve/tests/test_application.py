"""Composed applications: what is refused, what is planned, and, where Ray Serve is, what they answer."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import httpx
import pytest

import flagscale_hw as hw

CLASSES = """
import neighbour


class Clean:
    def forward(self, text, times=1):
        return neighbour.strip(text) * times


class Length:
    def forward(self, text):
        if text == "break":
            raise RuntimeError("too much")
        return len(text)


class Tell:
    async def forward(self, text, length):
        return {"text": text, "length": length}
"""
DEPLOY = """
runner:
  deploy:
    enable_composition: true
    use_fs_serve: true
    name: /tell
    request:
      - {arg: text, type: str}
      - {arg: times, type: "Optional[int]", required: false, default: 1}
"""
ITEMS = """
- serve_id: clean
  module: %(module)s
  name: Clean
- serve_id: length
  module: %(module)s
  name: Length
  depends: [clean]
  resources: {num_replicas: 2, num_gpus: 0}
- serve_id: tell
  module: %(module)s
  name: Tell
  depends: [clean, length]
"""


@pytest.fixture
def composed(serve_file, tmp_path):
    """Write a serve file of a graph of classes, with changes."""
    (tmp_path / "classes").mkdir()
    module = tmp_path / "classes" / "mine.py"
    module.write_text(CLASSES)
    (module.parent / "neighbour.py").write_text("def strip(text):\n    return text.strip()\n")

    def write(*changes: tuple[str, str], deploy: str = DEPLOY) -> object:
        items = ITEMS % {"module": module}
        for old, new in changes:
            assert old in items
            items = items.replace(old, new)
        return serve_file(items, experiment=deploy)

    return write


def test_the_plan_shows_the_graph_and_what_will_run(shell, composed):
    done = shell("plan", composed())
    assert done.returncode == 0, done.stderr
    for line in ("clean <- the request", "length <- clean", "tell <- clean, length"):
        assert line in done.stdout
    assert "ready when GET http://127.0.0.1:{port:application}/tell gives ready" in done.stdout
    made = json.loads(shell("plan", composed(), "--port", 9100, "--json").stdout)
    assert made["ports"] == {"application": 9100}
    graph = json.loads(next(one["text"] for one in made["files"] if one["path"] == "application.json"))
    assert [(one["name"], one["num_replicas"]) for one in graph["steps"]] == [
        ("clean", 1),
        ("length", 2),
        ("tell", 1),
    ]


def test_without_ray_it_says_what_to_install(shell, composed):
    shell.env["FAKE_MISSING"] = "ray"
    done = shell("run", composed())
    assert done.returncode == 3
    assert "has no ray: install it there with `pip install 'flagscale-serve[ray]'`" in done.stderr
    assert shell.engine_pids() == []


WRONG = {
    "no class": (("name: Tell", "name: Told"), "class 'Told': not in the file, whose classes are: Clean"),
    "no file": (("mine.py\n  name: Tell", "yours.py\n  name: Tell"), "yours.py: No such file"),
    "circle": (("name: Clean", "name: Clean\n  depends: [tell]"), "a circle"),
    "two ends": (("depends: [clean, length]", "depends: [clean]"), "length, tell: nobody depends on them"),
    "too few": (("name: Tell\n", "name: Length\n"), "Length.forward takes 1 values: it depends on clean"),
    "fields": (("name: Clean", "name: Length"), "Length.forward takes no times"),
    "a model": (("  name: Tell\n", "  engine_args: {model: /m}\n"), "give module"),
    "no devices": (("num_gpus: 0", "num_gpus: 0.5"), "resources.num_gpus: 1 devices in all"),
    "half more": (("num_gpus: 0", "num_gpus: 1.5"), "num_gpus: 1.5: a whole number, or a part"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_graph_of_classes_is_refused(shell, composed, case):
    change, message = WRONG[case]
    done = shell("plan", composed(change))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "is_known"),
    [("list[str]", True), ("Optional[dict[str, int]]", True), ("open('x')", False), ("str.mro", False)],
)
def test_a_type_is_never_run(shell, composed, text, is_known):
    deploy = DEPLOY.replace("type: str", f'type: "{text}"')
    done = shell("plan", composed(deploy=deploy))
    assert (done.returncode == 0) == is_known
    assert ("are allowed: correct it" in done.stderr) != is_known


def test_several_hosts_are_refused_by_name(shell, composed):
    deploy = DEPLOY.replace("runner:\n", "runner:\n  docker: some-image\n")
    done = shell("plan", composed(deploy=deploy))
    assert done.returncode == 2
    assert (
        "experiment.runner.docker: 'some-image': a composed application runs on this machine" in done.stderr
    )


# On a busy machine Ray gives up waiting for its own processes after 30 s, which no option changes.
TIRED_RAY = """
import sys

if any(word.endswith("ray_application.py") for word in sys.orig_argv):
    from ray._private import services

    plain = services.get_node

    def get_node(*args, **options):
        services.get_node = plain
        raise Exception("The current node timed out during startup.")

    services.get_node = get_node
"""


@pytest.mark.transformers
def test_it_answers_what_its_classes_say_and_leaves_nothing(shell, composed, alive, everybody, tmp_path):
    """Also where Ray's first start fails: half of it has started by then."""
    assert importlib.util.find_spec("ray"), "ray[serve] is not installed here"
    (tmp_path / "tired").mkdir()
    (tmp_path / "tired" / "sitecustomize.py").write_text(TIRED_RAY)
    shell.env["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "tired"), os.environ.get("PYTHONPATH", "")])
    shell.env["FLAGSCALE_SERVE_PYTHON"] = sys.executable
    done = shell("run", composed(), "--detach", "--timeout", 180)
    assert done.returncode == 0, done.stderr
    status = shell.the_status()
    log = Path(status["instances"][0]["log"]).read_text()
    assert log.count("Ray did not start, once more: The current node timed out") == 1
    url = status["instances"][0]["url"]
    assert url.endswith("/tell")
    assert url in done.stdout

    def ask(**body: object) -> httpx.Response:
        return httpx.post(url, json=body, timeout=60, trust_env=False)

    assert ask(text=" word ").json() == {"text": "word", "length": 4}
    assert ask(text=" word ", times=2).json() == {"text": "wordword", "length": 8}
    for body, word in (({}, "text: Field required"), ({"text": "x", "y": 1}, "y: Extra")):
        refused = ask(**body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, 400)
        assert word in refused.json()["error"]["message"]
    broken = ask(text="break")
    assert (broken.status_code, broken.json()["error"]["message"]) == (500, "RuntimeError: too much")
    assert httpx.get(url, timeout=60, trust_env=False).json()["request"][0]["arg"] == "text"
    asked = shell("chat", "-m", "Hello")
    assert asked.returncode == 2
    assert "no language model" in asked.stderr

    pids = everybody(status)
    assert len(pids) > 6
    assert shell("stop").returncode == 0
    assert not [pid for pid in pids if alive(pid)]
    (process,) = hw.open_run(Path(status["run_dir"])).status().processes
    assert process.exit_code == 0  # it ended by itself, after the requests under way
