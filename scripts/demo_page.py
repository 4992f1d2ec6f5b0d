"""The one page that the demo prints, and its picture."""

from __future__ import annotations

import json
import math
import platform
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from demo import Demo

WIDTH = 78


def page(demo: Demo, *, wall_s: float) -> str:
    """Lay out what was measured; write the loss curve as PNG beside it.

    Raises:
        AssertionError: the held-out loss did not fall clearly; a demo that learned nothing has failed.
    """
    steps = demo.steps_of_all_runs()
    held_out = {e["iteration"]: e["loss"] for path in demo.event_files() for e in read(path, "eval")}
    vocabulary = json.loads((demo.hf / "config.json").read_text())["vocab_size"]
    picture = draw(demo.root / "loss.png", steps, held_out, math.log(vocabulary))
    facts, last = demo.facts, held_out[max(held_out)]
    rate = statistics.median(step["tokens_per_second"] for step in steps[5:])
    lines = [
        "=" * WIDTH,
        f" FlagScale demo: {wall_s / 60:.1f} min on {platform.machine()}, see {near(demo.root)}",
        "=" * WIDTH,
        terminal_curve(steps, held_out),
        f" model       Qwen3 architecture, {facts['parameters']:,} parameters, vocabulary {vocabulary:,}",
        f" loss        {steps[0]['loss']:.3f} at step 1 (ln {vocabulary} = {math.log(vocabulary):.3f})",
        f"             {last:.3f} held out, at step {max(held_out)}",
        f" throughput  {rate:,.0f} tokens/s (median step)",
        f" resume      killed at step {facts['killed_at']}, resumed from {facts['resumed_from']}:",
        f"             {facts['twice']} steps trained twice, loss and gradient norm differ by 0",
        f" logits      Megatron against transformers, fp32: max |diff| {facts['logits_difference']:.2e}",
        f"             (rms of the logits: {facts['logits_rms']:.2f})",
        " answer      equal to transformers.generate, greedy; no process left after stop:",
        *(f"   | {line}" for line in (demo_prompt() + facts["answer"]).splitlines()),
        " files",
        *files(demo, picture),
        " next",
        *(f"   {line}" for line in next_commands(demo)),
        "=" * WIDTH,
    ]
    return "\n".join(lines)


def demo_prompt() -> str:
    """Return what the served model was asked to continue."""
    from demo import PROMPT

    return PROMPT


def read(path: Path, kind: str) -> list[dict[str, Any]]:
    """Return the events of one kind."""
    from demo import events

    return list(events(path, kind))


def draw(path: Path, steps: list[dict[str, Any]], held_out: dict[int, float], start: float) -> Path:
    """Write the loss curve as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot([s["iteration"] for s in steps], [s["loss"] for s in steps], label="training", linewidth=1)
    axis.plot(list(held_out), list(held_out.values()), "o-", label="held out")
    axis.axhline(start, linestyle=":", color="grey", label="ln(vocabulary)")
    axis.set(xlabel="step", ylabel="loss (nats per token)", title="qwen3/tiny on Python's standard library")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def terminal_curve(steps: list[dict[str, Any]], held_out: dict[int, float]) -> str:
    """Draw the same curve in characters."""
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(WIDTH, 16)
    plotext.plot([s["iteration"] for s in steps], [s["loss"] for s in steps], label="training")
    plotext.scatter(list(held_out), list(held_out.values()), marker="o", label="held out")
    plotext.xlabel("step")
    return str(plotext.uncolorize(plotext.build()))


def files(demo: Demo, picture: Path) -> list[str]:
    """List what was made, with sizes."""
    made = [
        demo.tokenizer,
        demo.data.with_suffix(".bin"),
        demo.data.with_suffix(".idx"),
        demo.train / "checkpoints",
        demo.hf,
        picture,
    ]
    return [f"   {size(path) / 1e6:8.1f} MB  {near(path)}" for path in made]


def near(path: Path) -> Path:
    """Shorten a path to what one would type from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return (
        sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        if path.is_dir()
        else path.stat().st_size
    )


def next_commands(demo: Demo) -> list[str]:
    """Commands worth trying with what the demo left behind."""
    return [
        f"flagscale-train status {near(demo.train / 'runs' / 'latest')}",
        f"flagscale-convert inspect {near(demo.train / 'checkpoints')}",
        f"flagscale-serve run {near(demo.hf)}",
        "flagscale-config show qwen3/tiny --origin",
    ]
