"""A recorded host is detected as the host itself was, on any machine, and keeps no secret when told so."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flagscale_hw import InputError, cli, detect
from flagscale_hw.host import Host
from flagscale_hw.recording import record_host
from flagscale_hw.testing import Faults, fake_host, write_host
from flagscale_hw.topology import topology

PATIENCE_S = 60.0


@pytest.mark.parametrize(
    "chip", ["nvidia", "amd", "ascend", "metax", "iluvatar", "gaudi", "enflame", "tsingmicro", "cpu"]
)
def test_there_and_back(tmp_path, chip):
    write_host(tmp_path / "host", chip, 0 if chip == "cpu" else 4)
    host = Host(tmp_path / "host", {"PATH": "/usr/bin:/bin"})
    seen = record_host(tmp_path / "kept", host=host, timeout_s=PATIENCE_S)
    again = detect(Host(tmp_path / "kept", {"PATH": "/usr/bin:/bin"}), timeout_s=PATIENCE_S)
    assert again.devices == seen.devices
    assert again.devices == fake_host(chip, 0 if chip == "cpu" else 4).devices
    assert (again.num_cpus, again.memory_bytes, again.hostname) == (64, 512 << 30, "fake")
    links = topology(again, Host(tmp_path / "kept"), timeout_s=PATIENCE_S)
    assert links == topology(seen, host, timeout_s=PATIENCE_S)


def test_no_secret_is_kept(tmp_path):
    write_host(tmp_path / "host", "nvidia", 2)
    host = Host(tmp_path / "host", {"PATH": "/usr/bin:/bin"})
    seen = record_host(tmp_path / "kept", host=host, redact=True, timeout_s=PATIENCE_S)
    again = detect(Host(tmp_path / "kept", {"PATH": "/usr/bin:/bin"}), timeout_s=PATIENCE_S)
    secrets = [name for device in seen.devices for name in (device.uuid, device.serial) if name]
    assert len(secrets) == 4
    texts = [path.read_text() for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    assert not [secret for secret in secrets for text in texts if secret in text]
    assert again.hostname == "recorded"
    # The word behind `serial` in the title of a table is the title of the next column.
    assert [one.compute_capability for one in again.devices] == [
        one.compute_capability for one in seen.devices
    ]
    assert seen.devices[0].compute_capability
    assert len({device.uuid for device in again.devices}) == 2
    assert not {device.uuid for device in again.devices} & set(secrets)


def test_only_whole_words_are_secrets_and_paths_have_them_too(tmp_path):
    """A host called `vm` must not take the `vme` out of its processor's features."""
    host, kept = tmp_path / "host", tmp_path / "kept"
    write_host(host, "nvidia", 2)
    box = "0123456789abcdef" * 2
    texts = {
        "etc/hostname": "vm\n",
        "proc/cpuinfo": "processor : 0\nmodel name : x\nflags : fpu vme de\n",
        "proc/self/cgroup": f"0::/pods/{box}\n",
        f"sys/fs/cgroup/pods/{box}/memory.max": "1073741824\n",
        "etc/os-release": "NAME=vm 10.1.2.3 02:42:ac:11:00:02 580.159.04 vm-1\n",
        "dev/tty1": "",
        "dev/loop7": "",
    }
    for path, text in texts.items():
        (host / path).parent.mkdir(parents=True, exist_ok=True)
        (host / path).write_text(text)
    seen = record_host(kept, host=Host(host, {"PATH": "/usr/bin:/bin"}), redact=True, timeout_s=PATIENCE_S)
    again = detect(Host(kept, {"PATH": "/usr/bin:/bin"}), timeout_s=PATIENCE_S)
    assert (again.memory_bytes, len(again.devices)) == (seen.memory_bytes, 2)
    assert again.memory_bytes == 1 << 30
    assert "fpu vme de" in (kept / "proc/cpuinfo").read_text()
    hidden = (kept / "etc/os-release").read_text()
    assert "580.159.04 vm-1" in hidden
    assert "10.1.2.3" not in hidden
    assert "02:42" not in hidden
    assert not [path for path in kept.rglob("*") if box in str(path) or path.name in ("tty1", "loop7")]
    assert not [path for path in kept.rglob("*") if path.is_file() and box in path.read_text()]


def test_a_hang_stays_a_hang_and_a_failure_a_failure(tmp_path):
    write_host(tmp_path / "host", "ascend", 2, faults=Faults(hang=True))
    host = Host(tmp_path / "host", {"PATH": "/usr/bin:/bin"})
    record_host(tmp_path / "kept", host=host, timeout_s=1.0)
    again = detect(Host(tmp_path / "kept", {"PATH": "/usr/bin:/bin"}), timeout_s=1.0)
    assert any("no answer within" in problem.text for problem in again.problems)
    assert len(again.devices) == 2


def test_this_host_can_be_recorded(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("FLAGSCALE_HW_ROOT", raising=False)
    place = str(tmp_path / "kept")
    assert cli.main(["record", place]) == 0
    assert f"flagscale-hw replay {place}" in capsys.readouterr().out
    code = "import flagscale_hw; print(flagscale_hw.detect().memory_bytes)"
    words = [sys.executable, "-m", "flagscale_hw", "replay", place, sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        record_host(tmp_path)
    assert cli.main(["record", str(tmp_path)]) == 2
    assert cli.main(["record", "/proc/nowhere"]) == 2
    assert "name a place that can be written" in capsys.readouterr().err
    assert cli.main(["fake", "cpu", "--out", str(tmp_path)]) == 2
