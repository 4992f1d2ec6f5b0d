"""What a log says about a start and about its end."""

from __future__ import annotations

import pytest

from flagscale_serve.progress import Phases, Tail, details


def test_a_tail_gives_whole_lines_once(tmp_path):
    log = tmp_path / "a.log"
    tail = Tail(log)
    assert tail.lines() == []
    log.write_bytes(b"one\ntw")
    assert tail.lines() == ["one"]
    with log.open("ab") as file:
        file.write(b"o\n 10%\r 20%\r 30%\nrest")
    assert tail.lines() == ["two", " 30%"]
    assert tail.lines() == []
    assert tail.lines(is_over=True) == ["rest"]


def test_phases_follow_the_engines_words():
    phases = Phases("vllm")
    assert phases.current == "importing the engine"
    assert phases.read("INFO Loading weights took 1 s")
    assert not phases.read("INFO Loading weights took 2 s")
    assert not phases.read("WARNING TORCH_COMPILE_DISABLE is set, disabling torch.compile.")
    assert phases.read("INFO:     Application startup complete.")
    assert phases.current == "waiting for the first token"
    assert phases.last_line == "INFO:     Application startup complete."


SGLANG_STARTS = """\
[2026-11-28 19:29:26] server_args=ServerArgs(model_path='/m', tokenizer_path='/m')
[2026-11-28 19:29:40] {connect} begin.
[2026-11-28 19:29:41] {connect} ends. elapsed=0.52 s
[2026-11-28 19:29:41] Load weight begin. avail mem=138.91 GB
[2026-11-28 19:29:43] Load weight end. elapsed=1.62 s, type=Qwen3ForCausalLM, avail mem=137.10 GB
[2026-11-28 19:29:43] Memory pool end. avail mem=97.44 GB
[2026-11-28 19:29:44] Capture target decode CUDA graph begin. backend=full
[2026-11-28 19:29:49] Capture target decode CUDA graph end. elapsed=5.04 s
INFO:     Application startup complete.
"""


@pytest.mark.parametrize("connect", ["Init torch distributed", "Init parallel"])
def test_phases_of_sglang_are_those_of_0_5_17_and_0_5_23(connect):
    phases = Phases("sglang")
    seen = [
        phases.current for line in SGLANG_STARTS.format(connect=connect).splitlines() if phases.read(line)
    ]
    assert seen == [
        "starting the engine",
        "connecting the devices",
        "loading weights",
        "making room for keys and values",
        "capturing graphs",
        "waiting for the first token",
    ]


def test_details_are_the_lines_below_the_quoted_one(tmp_path):
    log = tmp_path / "a.log"
    log.write_text(
        "Traceback (most recent call last):\n  File x\nValidationError: 1 validation error for Config\n"
        "  Value error, no such thing\n    For information visit y\nlater\n"
    )
    reason = "a: exited with code 1: ValidationError: 1 validation error for Config"
    assert details(reason, log) == "Value error, no such thing; For information visit y"
    assert details("something else", log) == ""
    assert details(reason, tmp_path / "missing.log") == ""


def test_what_stumbled_is_explained_by_what_was_raised_for_it(tmp_path):
    log = tmp_path / "a.log"
    chained = "\nDuring handling of the above exception, another exception occurred:\n\nTraceback:\n"
    log.write_text(
        f"Traceback (most recent call last):\n  File x\nKeyError: 'nosuch'\n{chained}  File y\n"
        "ValueError: model type `nosuch` is not known\n"
    )
    assert details("a: exited with code 1: KeyError: 'nosuch'", log) == (
        "ValueError: model type `nosuch` is not known"
    )
    log.write_text("KeyError: 'nosuch'\n  a hint\nlater\nValueError: of something else\n")
    assert details("a: exited with code 1: KeyError: 'nosuch'", log) == "a hint"
