"""A model's whole life on this machine, through all five packages, with nothing faked.

    corpus -> tokenizer -> .bin/.idx -> Megatron training on 2 processes, killed half-way and resumed
    -> Hugging Face checkpoint -> logits compared -> served -> asked -> stopped

Every step is a command a user could type (each is printed before it runs), except the proofs, which use
transformers as the independent implementation. A second run reuses what is there; `--fresh` starts over.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from flagscale_hw import detect

SCRIPTS = Path(sys.executable).parent
RECIPE = "qwen3/tiny"
VOCABULARY = 4096
PROMPT = "def __init__(self"
LOGITS_TOLERANCE = 1e-4
# float32, so that a greedy answer can be compared word for word; bf16 rounds near-ties either way.
SERVE_FILE = """\
experiment:
  exp_name: demo
  exp_dir: {exp_dir}
  task: {{type: serve}}
serve:
  - serve_id: demo
    engine_args: {{model: {model}, dtype: float32}}
"""


class DemoError(Exception):
    """A step did not do what it promised."""


class Demo:
    """The folder of one demo and the commands run in it."""

    def __init__(self, root: Path, steps: int) -> None:
        """Keep everything below `root`; train for `steps` iterations."""
        self.root, self.steps = root, steps
        self.tokenizer, self.data, self.hf = root / "tokenizer", root / "data" / "stdlib", root / "hf"
        self.train, self.serve = root / "train", root / "serve"
        self.facts: dict[str, Any] = {}
        # Two processes on a CPU show data parallelism; a chip takes one process each.
        self.processes = min(len(detect().devices), 2) or 2
        self.env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

    # --- running commands -------------------------------------------------------------------------------

    def command(self, *words: object) -> list[str]:
        """Turn a command of ours into argv, and show it as a user would type it."""
        name, *rest = map(str, words)
        print(f"\n$ {shlex.join([name, *rest])}", flush=True)
        return [shutil.which(name, path=f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}") or name, *rest]

    def run(self, *words: object, quiet: bool = False, expected: int = 0) -> str:
        """Run one command to its end.

        Raises:
            DemoError: it exited with anything but the expected code.
        """
        argv = self.command(*words)
        done = subprocess.run(
            argv, env=self.env, text=True, stdout=subprocess.PIPE if quiet else None, check=False
        )
        if done.returncode != expected:
            raise DemoError(f"{words[0]} {words[1]} exited with {done.returncode}, not {expected}")
        return done.stdout or ""

    # --- the steps --------------------------------------------------------------------------------------

    def corpus(self) -> Path:
        """Copy this Python's own standard library (sources only, no tests) as the text to learn."""
        target = self.root / "corpus"
        if target.exists():
            return target
        stdlib, draft = Path(sysconfig.get_path("stdlib")), self.root / "corpus.part"
        shutil.rmtree(draft, ignore_errors=True)
        for source in sorted(stdlib.rglob("*.py")):
            inner = source.relative_to(stdlib)
            if {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"} & set(inner.parts):
                continue
            (draft / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, draft / inner)
        draft.rename(target)
        return target

    def prepare(self) -> None:
        """Train a byte-pair tokenizer on the corpus, then write Megatron's .bin/.idx with it."""
        corpus = self.corpus()
        if not self.tokenizer.exists():
            vocabulary = ["--vocab-size", VOCABULARY, "--output", self.tokenizer]
            self.run("flagscale-train", "data", "train-tokenizer", corpus, *vocabulary)
        if not self.data.with_suffix(".idx").exists():
            self.data.parent.mkdir(exist_ok=True)
            wanted = ["--tokenizer", self.tokenizer, "--output", self.data, "--workers", "2"]
            self.run("flagscale-train", "data", "tokenize", corpus, *wanted)

    def training_words(self) -> list[object]:
        """Return the experiment and its overrides, as every training command takes them."""
        return [
            RECIPE,
            f"experiment.exp_dir={self.train}",
            f"train.data.data_path={self.data}",
            f"train.data.tokenizer.tokenizer_model={self.tokenizer}",
            f"train.model.train_iters={self.steps}",
            f"experiment.runner.nproc_per_node={self.processes}",
        ]

    def train_and_resume(self) -> None:
        """Train, cut the power half-way, resume, and compare the steps trained twice."""
        if not self.finished():
            if not self.steps_of_all_runs():
                self.train_until_killed()
            self.run("flagscale-train", "run", *self.training_words())
        self.check_learning()
        runs = [list(events(path, "step")) for path in self.event_files()]
        if len(runs) < 2:
            raise DemoError(f"{self.train}: expected a killed and a resumed run: use --fresh")
        first = {event["iteration"]: event for run in runs[:-1] for event in run}
        again = {event["iteration"]: event for event in runs[-1]}
        twice = sorted(first.keys() & again.keys())
        if not twice:
            raise DemoError("no step was trained both before and after the kill: nothing to compare")
        worst = max(abs(first[i][key] - again[i][key]) for i in twice for key in ("loss", "grad_norm"))
        if worst:
            raise DemoError(f"steps {twice[0]}-{twice[-1]} differ by {worst:.3g} after resuming: expected 0")
        self.facts |= {"killed_at": max(first), "resumed_from": min(again) - 1, "twice": len(twice)}

    def check_learning(self) -> None:
        """A demo that learned nothing has failed: the held-out loss must fall clearly below chance."""
        losses = [event["loss"] for path in self.event_files() for event in events(path, "eval")]
        bound = 0.75 * math.log(VOCABULARY)
        if losses[-1] > bound:
            raise DemoError(
                f"held-out loss {losses[-1]:.3f}: expected below 0.75 ln({VOCABULARY}) = {bound:.3f}"
            )

    def train_until_killed(self) -> None:
        """Start the training, and kill all of it at once, ten steps past the half-way checkpoint.

        Every process gets SIGKILL, as in a power cut: if asked first, it would save a checkpoint, and then no
        step would be trained twice.
        """
        argv = self.command("flagscale-train", "run", *self.training_words())
        launcher = subprocess.Popen(argv, env=self.env)
        target = self.steps // 2 + 10
        try:
            for event in follow(self.event_files, "step", alive=lambda: launcher.poll() is None):
                if event["iteration"] >= target:
                    break
            else:
                raise DemoError(f"training ended with {launcher.wait()} before step {target}")
            for pid in survivors(self.train):
                os.kill(pid, signal.SIGKILL)
            print(f"\n--- every process of the training was killed (SIGKILL) at step {target} ---")
        finally:
            launcher.kill()
            launcher.wait()
        wait_until_gone(self.train)
        # A run that nobody saw end is lost, and `status` says so by its exit code too.
        self.run("flagscale-train", "status", self.train / "runs" / "latest", expected=4)

    def convert(self) -> None:
        """Write the Hugging Face checkpoint and verify it bit by bit."""
        checkpoints = self.train / "checkpoints"
        if not self.hf.exists():
            self.run(
                "flagscale-convert", "run", checkpoints, self.hf, "--to", "hf", "--tokenizer", self.tokenizer
            )
        self.run("flagscale-convert", "verify", checkpoints, self.hf)

    def compare_logits(self) -> None:
        """Megatron's logits against transformers', same weights, same tokens, fp32."""
        import torch
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.hf)
        text = (self.corpus() / "zipfile" / "__init__.py").read_text()
        tokens = tokenizer(text)["input_ids"][: 2 * 128]
        batch = [tokens[:128], tokens[128:]]
        (self.root / "tokens.json").write_text(json.dumps(batch))
        out = self.root / "logits.safetensors"
        words = ["--tokens", self.root / "tokens.json", "--output", out]
        self.run("flagscale-train", "logits", *self.training_words(), *words)
        ours = load_file(out)["logits"].float()
        model = AutoModelForCausalLM.from_pretrained(self.hf, dtype=torch.float32)
        with torch.inference_mode():
            theirs = model(torch.tensor(batch)).logits
        if ours.shape != theirs.shape:
            raise DemoError(f"logits: Megatron gives {tuple(ours.shape)}, transformers {tuple(theirs.shape)}")
        difference = float((ours - theirs).abs().max())
        if not difference < LOGITS_TOLERANCE:
            raise DemoError(f"logits differ by {difference:.3g}: expected less than {LOGITS_TOLERANCE}")
        self.facts |= {"logits_difference": difference, "logits_rms": float(theirs.pow(2).mean().sqrt())}
        self.facts["parameters"] = sum(p.numel() for p in model.parameters())
        ids = tokenizer(PROMPT, return_tensors="pt")
        answer = model.generate(**ids, max_new_tokens=48, do_sample=False)
        self.facts["expected"] = tokenizer.decode(
            answer[0, ids["input_ids"].shape[1] :], skip_special_tokens=True
        )

    def serve_and_ask(self) -> None:
        """Serve the converted model, ask it over HTTP, compare with transformers.generate, stop it."""
        run_dir, file = self.serve / time.strftime("%Y%m%d-%H%M%S"), self.root / "serve.yaml"
        file.write_text(SERVE_FILE.format(exp_dir=self.serve, model=self.hf))
        # The default on a chip is vLLM; this environment has it only where someone installed it beside us.
        engine = [] if importlib.util.find_spec("vllm") else ["--engine", "transformers"]
        self.run("flagscale-serve", "run", file, "--detach", "--run-dir", run_dir, *engine)
        try:
            status = json.loads(self.run("flagscale-serve", "status", run_dir, "--json", quiet=True))
            instance = status["instances"][0]
            url, model = instance["url"], instance["model"]
            body = {"model": model, "prompt": PROMPT, "max_tokens": 48, "temperature": 0}
            print(f"\n$ curl {url}/completions -d '{json.dumps(body)}'", flush=True)
            reply = httpx.post(f"{url}/completions", json=body, timeout=120)
            reply.raise_for_status()
            answer = reply.json()["choices"][0]["text"]
            print(f"{PROMPT}{answer}")
        finally:
            self.run("flagscale-serve", "stop", run_dir)
        wait_until_gone(run_dir)
        if answer != self.facts["expected"]:
            raise DemoError(
                f"the server said {answer!r}, transformers.generate said {self.facts['expected']!r}"
            )
        self.facts |= {"answer": answer, "url": url}

    # --- reading what the training wrote ----------------------------------------------------------------

    def event_files(self) -> list[Path]:
        """Return the event files of all runs, oldest first."""
        return sorted((self.train / "runs").glob("[0-9]*/events.jsonl"))

    def steps_of_all_runs(self) -> list[dict[str, Any]]:
        """Every step, oldest first; a step trained twice is reported as it was last."""
        latest = {event["iteration"]: event for path in self.event_files() for event in events(path, "step")}
        return [latest[iteration] for iteration in sorted(latest)]

    def finished(self) -> bool:
        """Tell whether the last step was trained."""
        steps = self.steps_of_all_runs()
        return bool(steps) and steps[-1]["iteration"] >= self.steps


def events(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Events of one kind in a run's events file; a last line cut off by a kill is left out."""
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            event = json.loads(line)
            if event["event"] == kind:
                yield event


def follow(files: Any, kind: str, alive: Any, deadline_s: float = 900.0) -> Iterator[dict[str, Any]]:
    """Yield events of the newest run as they come, until it is not `alive` any more."""
    seen, end = 0, time.monotonic() + deadline_s
    while time.monotonic() < end:
        living = alive()
        found = list(events(files()[-1], kind)) if files() else []
        yield from found[seen:]
        seen = len(found)
        if not living:
            return
        time.sleep(0.2)


def ancestors() -> set[int]:
    """Return this process and everything above it: the shell that started us may well name our folder."""
    found, pid = set(), os.getpid()
    while pid > 0:
        found.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def survivors(folder: Path) -> dict[int, str]:
    """Processes (pid and words) beside this one that carry `folder` in their arguments or environment."""
    found, mark, above = {}, str(folder).encode(), ancestors()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if int(process.name) not in above and (mark in words or mark in environment):
            found[int(process.name)] = words.replace(bytes(1), b" ").decode(errors="replace")[:100]
    return found


def wait_until_gone(folder: Path, deadline_s: float = 10.0) -> None:
    """Return once no process works in `folder`.

    Raises:
        DemoError: something is still there after `deadline_s` seconds.
    """
    end = time.monotonic() + deadline_s
    while left := survivors(folder):
        if time.monotonic() > end:
            raise DemoError(f"still running after {deadline_s:.0f} s: {left}")
        time.sleep(0.1)


def main() -> int:
    """Run the demo and print its page."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--dir", type=Path, default=Path("outputs/demo"), help="where everything goes")
    parser.add_argument("--steps", type=int, default=400, help="training iterations (even)")
    parser.add_argument("--fresh", action="store_true", help="throw the folder away and start over")
    given = parser.parse_args()
    root = given.dir.resolve()
    if given.fresh:
        shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    demo, started = Demo(root, given.steps), time.monotonic()
    try:
        for step in (
            demo.prepare,
            demo.train_and_resume,
            demo.convert,
            demo.compare_logits,
            demo.serve_and_ask,
        ):
            step()
    except (DemoError, httpx.HTTPError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 4
    from demo_page import page

    print(page(demo, wall_s=time.monotonic() - started))
    return 0


if __name__ == "__main__":
    sys.exit(main())
