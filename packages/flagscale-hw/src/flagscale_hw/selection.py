"""Ask the installed frameworks which chip they would select, and compare that with the chip that is here.

They are asked in a process of another interpreter, because importing torch, a vendor's plug-in or vLLM takes
seconds, can crash, and can hang in a driver. Each answer is printed as soon as it is known.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from flagscale_hw.chips import Runtime, runtime
from flagscale_hw.detection import detect
from flagscale_hw.doctor import Finding
from flagscale_hw.host import Answer, Host, this_host

__all__ = ["Purpose", "examine_selection"]

Purpose = Literal["train", "serve"]

_QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "train": ("python", "torch", "collectives", "transformer_engine", "megatron"),
    "serve": ("python", "torch", "vllm"),
}
_PROGRAM = Path(__file__).with_name("questions.py")


def examine_selection(
    purpose: Purpose,
    *,
    python: str | None = None,
    host: Host | None = None,
    timeout_s: float | None = None,
    ask_timeout_s: float = 120.0,
) -> list[Finding]:
    """Compare what frameworks would select with what is here.

    Args:
        purpose: `train` asks torch, its collectives, Transformer Engine and Megatron; `serve` torch and vLLM.
        python: interpreter that has them; our own when None.
        host: whose chip to compare with; this host's when None.
        timeout_s: see `detect`.
        ask_timeout_s: seconds for all answers together; what is still missing then is a finding.
    """
    host = this_host() if host is None else host
    row = runtime(detect(host, timeout_s=timeout_s).chip)
    interpreter = python or sys.executable
    questions = _QUESTIONS[purpose]
    wanted = {"torch_module": row.torch_module, "collective_backend": row.collective_backend}
    argv = [interpreter, str(_PROGRAM), json.dumps({"questions": questions, **wanted})]
    try:
        answer = Host(environ=host.environ).run(argv, ask_timeout_s)
    except OSError as error:
        text = f"{interpreter}: {error.strerror}"
        hint = "name an interpreter with --python"
        return [Finding(code="HW406", is_good=False, subject="python", text=text, hint=hint)]
    answers = _read(answer.output)
    findings: list[Finding] = []
    for question in questions:
        if question not in answers:
            findings.append(_silent(question, answer, interpreter, ask_timeout_s))
            break  # they are asked one after the other: nothing came of the rest
        findings += _JUDGES[question](answers[question], row)
    return findings


def _read(text: str) -> dict[str, dict[str, Any]]:
    answers: dict[str, dict[str, Any]] = {}
    for line in text.splitlines():
        if line.startswith('{"flagscale_hw": '):  # frameworks print to standard output when they please
            said = json.loads(line)
            answers[said["flagscale_hw"]] = said
    return answers


def _silent(question: str, answer: Answer, interpreter: str, timeout_s: float) -> Finding:
    code = {
        "torch": "HW401",
        "collectives": "HW402",
        "megatron": "HW403",
        "transformer_engine": "HW404",
        "vllm": "HW405",
    }
    if answer.exit_code is None:
        text = f"{interpreter}: no answer within {timeout_s:g} s; it was killed"
        hint = "a driver may hang: import it by hand, or give --ask-timeout more"
    else:
        text = f"{interpreter}: ended with code {answer.exit_code}: {_last_words(answer)}"
        hint = "import it by hand in that interpreter"
    return Finding(code=code.get(question, "HW406"), is_good=False, subject=question, text=text, hint=hint)


def _last_words(answer: Answer) -> str:
    for text in (answer.errors, answer.output):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if lines:
            return lines[-1][:300]
    return "no message"


def _python(said: Mapping[str, Any], _row: Runtime) -> Iterator[Finding]:
    text = f"{said['executable']} ({said['version']})"
    yield Finding(code="HW406", is_good=True, subject="python", text=text)


def _torch(said: Mapping[str, Any], row: Runtime) -> Iterator[Finding]:
    code, subject = "HW401", "torch"
    if said.get("error"):
        packages = " and ".join(filter(None, ["torch", row.torch_module]))
        hint = f"install {packages} for {row.title} there"
        yield Finding(code=code, is_good=False, subject=subject, text=said["error"], hint=hint)
        return
    chosen = said["device"]
    text = f"{said['version']} would select {chosen} ({said['count']} devices)"
    if chosen == row.torch_device:
        yield Finding(code=code, is_good=True, subject=subject, text=text)
        return
    needed = f"with {row.torch_module}" if row.torch_module else f"built for {row.title}"
    hint = f"{row.title} is here, which is {row.torch_device} in torch: install a torch {needed}"
    if said.get("module_error"):
        text += f"; {row.torch_module}: {said['module_error']}"
    yield Finding(code=code, is_good=False, subject=subject, text=text, hint=hint)


def _collectives(said: Mapping[str, Any], row: Runtime) -> Iterator[Finding]:
    name = row.collective_backend
    if said.get("error"):
        hint = "mend torch first"
        yield Finding(code="HW402", is_good=False, subject="torch.distributed", text=said["error"], hint=hint)
    elif said["available"]:
        yield Finding(code="HW402", is_good=True, subject="torch.distributed", text=f"{name} is there")
    else:
        yield Finding(
            code="HW402",
            is_good=False,
            subject="torch.distributed",
            text=f"{name} is not there",
            hint=f"install the torch that {row.title} brings, or FlagCX",
        )


def _transformer_engine(said: Mapping[str, Any], row: Runtime) -> Iterator[Finding]:
    code, subject = "HW404", "transformer_engine"
    if said.get("error"):
        # Plain torch layers do without it, so it is no obstacle.
        text = f"{said['error']}: plain torch layers take its place"
        if row.chip == "nvidia":
            text += ", slower and without fp8: pip install 'transformer-engine[pytorch]' there"
        yield Finding(code=code, is_good=True, subject=subject, text=text)
        return
    text = f"{said['version']}{', with FlagOS dispatch' if said['has_dispatch'] else ''}"
    if said["has_dispatch"] or row.chip == "nvidia":
        yield Finding(code=code, is_good=True, subject=subject, text=text)
    else:
        hint = f"it is NVIDIA's own: install TransformerEngine-FL for {row.title}, or remove it"
        yield Finding(code=code, is_good=False, subject=subject, text=text, hint=hint)


def _megatron(said: Mapping[str, Any], row: Runtime) -> Iterator[Finding]:
    code, subject = "HW403", "megatron"
    if said.get("error"):
        hint = "pip install 'flagscale-train[megatron]' there"
        yield Finding(code=code, is_good=False, subject=subject, text=said["error"], hint=hint)
        return
    platform = said.get("platform")
    if platform is None:
        is_good = row.trains_with == "megatron-core"
        text = f"megatron-core {said['version']}, which knows cuda and, through flagscale-train, cpu"
        hint = "" if is_good else f"install Megatron-LM-FL, which has a platform for {row.title}"
        yield Finding(code=code, is_good=is_good, subject=subject, text=text, hint=hint)
        return
    is_good = platform in (row.torch_device, row.megatron_vendor)
    text = f"Megatron-LM-FL {said['version']} would select the platform {platform}"
    hint = "" if is_good else f"{row.title} is here: make torch.{row.torch_device}.is_available() true first"
    yield Finding(code=code, is_good=is_good, subject=subject, text=text, hint=hint)


def _vllm(said: Mapping[str, Any], row: Runtime) -> Iterator[Finding]:
    code, subject = "HW405", "vllm"
    wanted = {
        "vllm": "a vLLM built for it",
        "plug-in": f"pip install {row.vllm.distribution}",
        "vendor build": "the vendor's build of vLLM",
    }[row.vllm.comes_from]
    if said.get("error"):
        text = said["error"]
        yield Finding(code=code, is_good=False, subject=subject, text=text, hint=f"for {row.title}: {wanted}")
        return
    plugins = ", ".join(said["plugins"]) or "none"
    chosen = said["device"] or "nothing"
    text = f"{said['version']} would select {chosen} ({said['platform']}; plug-ins: {plugins})"
    is_good = said["device"] == row.torch_device
    hint = "" if is_good else f"{row.title} is here, which is {row.torch_device}: {wanted}"
    yield Finding(code=code, is_good=is_good, subject=subject, text=text, hint=hint)


_JUDGES: Mapping[str, Callable[[Mapping[str, Any], Runtime], Iterator[Finding]]] = {
    "python": _python,
    "torch": _torch,
    "collectives": _collectives,
    "transformer_engine": _transformer_engine,
    "megatron": _megatron,
    "vllm": _vllm,
}
