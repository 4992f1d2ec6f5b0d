"""The table for people: colour, narrow terminals, and the live view."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime

import pytest

from flagscale_hw.table import Style, render, style_for
from flagscale_hw.testing import fake_host, faked_host
from flagscale_hw.watch import COLUMNS, watch


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colour_is_for_terminals_and_can_be_refused(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert style_for(io.StringIO(), {}) == Style()
    assert style_for(Terminal(), {}) == Style(has_colour=True, width=100)
    assert not style_for(Terminal(), {"NO_COLOR": "1"}).has_colour
    assert style_for(Terminal(), {"NO_COLOR": ""}).has_colour  # no-color.org: when not empty
    assert not style_for(Terminal(), {"TERM": "dumb"}).has_colour


def hot(machine):
    first, second, *rest = machine.devices
    devices = (
        replace(first, temperature_c=95.0, health="bad", health_reasons=("Xid 79",)),
        replace(second, temperature_c=82.0, memory_used_bytes=second.memory_total_bytes, health="ok"),
        *rest,
    )
    return replace(machine, devices=devices)


def test_what_matters_is_coloured():
    lines = render(hot(fake_host("nvidia", 8)), Style(has_colour=True)).splitlines()
    assert "\x1b[31m95 C\x1b[0m" in lines[3]
    assert "\x1b[31mbad" in lines[3]
    assert "\x1b[33m82 C\x1b[0m" in lines[4]
    assert "\x1b[33m80.0 / 80.0 GiB" in lines[4]
    assert "\x1b[32mok" in lines[4]
    assert "\x1b[" not in lines[5]
    assert "\x1b" not in render(hot(fake_host("nvidia", 8)))


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120])
def test_it_fits_a_narrow_terminal(width):
    machine = fake_host("nvidia", 8)
    lines = render(machine, Style(width=width)).splitlines()
    assert max(map(len, lines)) <= width
    assert all(str(number) == lines[3 + number].split()[0] for number in range(8))
    assert "GiB" in lines[3]


def test_a_wide_terminal_and_a_pipe_have_every_column():
    machine = fake_host("nvidia", 8)
    assert render(machine, Style(width=200)) == render(machine)
    assert render(machine).splitlines()[2].split() == [
        "chip", "device", "memory", "use", "temp", "power", "health", "numa", "bus",
    ]  # fmt: skip


def test_unknown_values_are_a_dash_and_other_vendors_are_named():
    machine = fake_host("enflame", 8)
    bare = replace(machine.devices[0], name=None, memory_total_bytes=None, temperature_c=None, power_w=None)
    other = replace(fake_host("nvidia", 8).devices[0], index=0)
    lines = render(replace(machine, devices=(bare,), others=(other,))).splitlines()
    assert "- / " not in lines[0]
    assert " - " in lines[3]
    assert lines[-1] == "not used: nvidia"


def test_one_picture():
    out = io.StringIO()
    watch(lambda: fake_host("ascend", 8), once=True, out=out)
    assert out.getvalue().count("910B2") == 8
    assert "\x1b" not in out.getvalue()


def test_one_document_per_line():
    out = io.StringIO()
    pictures = iter([fake_host("ascend", 8), fake_host("ascend", 8)])

    def look():
        found = next(pictures, None)
        if found is None:
            raise KeyboardInterrupt
        return found

    with pytest.raises(KeyboardInterrupt):
        watch(look, interval_s=0.01, form="json", out=out)
    lines = out.getvalue().splitlines()
    assert [json.loads(line)["primary"] for line in lines] == ["ascend", "ascend"]


def test_a_terminal_is_left_in_order():
    out = Terminal()
    pictures = iter([fake_host("ascend", 8)])

    def look():
        found = next(pictures, None)
        if found is None:
            raise KeyboardInterrupt
        return found

    with pytest.raises(KeyboardInterrupt):
        watch(look, interval_s=0.01, out=out)
    assert out.getvalue().startswith("\x1b[2J\x1b[?25l")
    assert out.getvalue().endswith("\x1b[?25h")


def test_a_card_that_drops_off_does_not_end_it():
    out = io.StringIO()
    whole = fake_host("ascend", 8)
    pictures = iter([whole, replace(whole, devices=whole.devices[:7])])

    def look():
        found = next(pictures, None)
        if found is None:
            raise KeyboardInterrupt
        return found

    with pytest.raises(KeyboardInterrupt):
        watch(look, interval_s=0.01, out=out)
    assert "8 x ascend" in out.getvalue()
    assert "7 x ascend" in out.getvalue()


def test_ctrl_c_ends_the_verb_quietly():
    words = [sys.executable, "-m", "flagscale_hw", "--timeout", "60", "watch", "--interval", "0.2"]
    # Shells start background jobs with Ctrl-C ignored, which is inherited.
    start = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "os.execvp(sys.argv[1], sys.argv[1:])"
    )
    with (
        faked_host("enflame", 2),
        subprocess.Popen(
            [sys.executable, "-c", start, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ},
        ) as process,
    ):
        seen = ""
        deadline = time.monotonic() + 60
        while "2 x enflame" not in seen:
            assert time.monotonic() < deadline
            seen += process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == ""


def test_lines_for_a_spreadsheet():
    out = io.StringIO()
    bare = replace(fake_host("ascend", 2).devices[1], name="910, B2", temperature_c=None)
    machine = fake_host("ascend", 2)
    watch(lambda: replace(machine, devices=(machine.devices[0], bare)), once=True, form="csv", out=out)
    rows = list(csv.DictReader(io.StringIO(out.getvalue())))
    assert tuple(rows[0]) == COLUMNS
    assert [row["index"] for row in rows] == ["0", "1"]
    assert rows[0]["memory_total_bytes"] == str(64 << 30)
    assert (rows[1]["name"], rows[1]["temperature_c"]) == ("910, B2", "")  # unknown is empty, never 0
    assert datetime.fromisoformat(rows[0]["time"]).tzinfo is not None
