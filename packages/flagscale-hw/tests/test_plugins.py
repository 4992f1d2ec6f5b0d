"""Somebody else's chip: a distribution that is built and installed here, and brings a backend."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest

from flagscale_hw import cli, plugins
from flagscale_hw.backend import backends

MANIFEST = {
    "api": 1,
    "pci": [{"vendor": "0x1edb", "classes": ["0302"]}],
    "nodes": r"vastai\d+",
    "runtime": {"torch_device": "vastai", "visible_devices_variable": "VASTAI_VISIBLE_DEVICES"},
}
CODE = """
import os
from flagscale_hw.backend import Found
from flagscale_hw.machine import Device, Problem, Slice

open(os.environ["WITNESS"], "a").write(f"imported by {os.getpid()}\\n")


def look(host, timeout_s):
    names = [name for name in host.names("/dev") if name.startswith("vastai")]
    part = Slice(uuid="S")
    devices = [Device(chip="vastai", index=int(name[6:]), name="VA16", slices=(part,)) for name in names]
    return Found(tuple(devices), (Problem(where="vastai", text="the fan is loud"),))
"""


def build_wheel(
    folder: Path, *, name="hw-vastai", version="2.1", chip="vastai", manifest=MANIFEST, code=CODE
) -> Path:
    """Write a wheel as a build tool would: the package, its gate, its entry point and its record."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    files = {
        f"{module}/__init__.py": "",
        f"{module}/backend.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[flagscale_hw.backends]\n{chip} = {module}.backend\n",
    }
    if manifest is not None:
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        files[f"{module}/{plugins.MANIFEST}"] = text
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    wheel = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


@pytest.fixture
def install(tmp_path, monkeypatch, tree):
    """Install a wheel outside the tree, without network: pure wheels are unpacked, as installers do."""
    site = tmp_path / "site"
    site.mkdir()
    tree.environ["WITNESS"] = str(tmp_path / "witness")
    (tmp_path / "witness").write_text("")
    monkeypatch.syspath_prepend(str(site))

    def do(**options):
        with zipfile.ZipFile(build_wheel(tmp_path, **options)) as archive:
            archive.extractall(site)
        plugins._scan.cache_clear()

    yield do
    plugins._scan.cache_clear()


def test_a_plugin_describes_its_chip(tree, install, tmp_path):
    install()
    tree.write("dev/vastai0", "")
    tree.write("dev/vastai3", "")
    tree.environ["VASTAI_VISIBLE_DEVICES"] = "3"
    machine = tree.detect()
    assert (machine.chip, [device.index for device in machine.devices]) == ("vastai", [0, 3])
    assert (machine.devices[0].name, machine.devices[0].slices[0].uuid) == ("VA16", "S")
    assert machine.visible_indices == (3,)
    assert [str(problem) for problem in machine.problems] == ["vastai: the fan is loud"]
    assert machine.vendors[0].origin == "hw_vastai 2.1"
    assert "hw_vastai" not in sys.modules  # its code ran in another process
    assert (tmp_path / "witness").read_text().count("imported") == 1


def test_a_plugin_is_not_imported_where_its_chip_is_not(tree, install, tmp_path):
    install(code="raise SystemExit('this must not run')")
    tree.pci("0000:3b:00.0", "0x1edb", "0x020000")  # the vendor's network card
    assert (tree.detect().chip, tree.detect().problems) == ("cpu", ())
    assert (tmp_path / "witness").read_text() == ""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nothing_like_this", "No module named 'nothing_like_this'"),
        ("import os\nos._exit(3)", "ended with code 3"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "ended by signal 11"),
        ("import time\ntime.sleep(600)", "no answer within 2 s"),
        ("def look(host, timeout_s): return 5", "'int' object has no attribute"),
    ],
)
def test_a_plugin_that_breaks_harms_nobody(tree, install, code, said):
    install(code=code)
    tree.write("dev/vastai0", "")
    machine = tree.detect(timeout_s=2.0 if "sleep" in code else 30.0)
    assert machine.chip == "cpu"
    assert any(problem.where == "vastai" and said in problem.text for problem in machine.problems)


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ({**MANIFEST, "api": 2}, "it is made for interface 2 and this is 1: update flagscale-hw"),
        (None, f"there is no {plugins.MANIFEST} beside its module hw_vastai.backend"),
        ("{", "Expecting property name"),
        ("[]", "cannot be used"),
        ({}, "cannot be used"),
        ({**MANIFEST, "nodes": "("}, "cannot be used"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_said_and_ignored(tree, install, manifest, said):
    install(manifest=manifest)
    tree.write("dev/vastai0", "")
    machine = tree.detect()
    assert (machine.chip, len(machine.problems)) == ("cpu", 1)
    assert machine.problems[0].text.startswith("plug-in hw_vastai 2.1: cannot be used: ")
    assert said in machine.problems[0].text


def test_a_plugin_may_take_the_place_of_a_built_in_chip(install):
    before = [backend.chip for backend in backends()]
    install(chip="metax")
    after = backends()
    assert [backend.chip for backend in after] == before
    assert next(backend for backend in after if backend.chip == "metax").origin == "hw_vastai 2.1"


def test_two_plugins_for_one_chip_conflict(install):
    install()
    install(name="other-vastai", version="1.0")
    assert [backend.origin for backend in plugins.plugins()] == ["hw_vastai 2.1"]
    (problem,) = plugins.plugin_problems()
    assert problem.text == "plug-in other_vastai 1.0: not used: hw_vastai 2.1 describes this chip too"


def test_the_verb_lists_them_and_fails_for_one_that_cannot_be_used(install, capsys):
    install()
    assert cli.main(["plugins"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert next(line for line in lines if line[0] == "vastai")[1:3] == ["hw_vastai", "2.1"]
    assert next(line for line in lines if line[0] == "nvidia")[1] == "built-in"
    install(name="other-vastai", version="1.0")
    assert cli.main(["plugins", "--json"]) == 3
    said = capsys.readouterr()
    assert json.loads(said.out)["problems"][0]["where"] == "vastai"
    assert said.err.startswith("error: vastai: plug-in other_vastai 1.0: not used")
