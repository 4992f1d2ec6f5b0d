"""Load by `vllm bench serve`, in a Python that has vLLM.

What does not live here: what its times mean (`measured.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

from flagscale_serve.bench.measured import Answered, Measured, Workload
from flagscale_serve.chat import Server
from flagscale_serve.engines.vllm import MODULE
from flagscale_serve.errors import RequestFailed

__all__ = ["GENERATOR", "measure"]

GENERATOR = "vllm bench serve"
_LIMIT_S = 3600.0
# What vLLM's command line asks of a process that has no use for an accelerator or a hub.
_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONSAFEPATH": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def measure(server: Server, model: str, workload: Workload, *, python: str, api_key: str | None) -> Measured:
    """Load a server once.

    Args:
        server: where; its `tokenizer` is a directory.
        model: the name that clients write.
        workload: how much.
        python: interpreter that has vLLM.
        api_key: the server's key.

    Raises:
        RequestFailed: the program failed; quotes its last words.
    """
    with tempfile.TemporaryDirectory(prefix="flagscale-bench-") as folder:
        result = Path(folder) / "result.json"
        env = {**os.environ, **_ENV}
        if api_key:
            env["OPENAI_API_KEY"] = api_key
        try:
            done = subprocess.run(
                _argv(server, model, workload, python, result),
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                env=env,
                timeout=_LIMIT_S,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RequestFailed(f"{GENERATOR}: {error}: try it by hand") from None
        if done.returncode or not result.exists():
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise RequestFailed(
                f"{GENERATOR}: exit {done.returncode}: {' '.join(said)}: is the server still there?"
            )
        return _read(json.loads(result.read_text(encoding="utf-8")), workload)


def _argv(server: Server, model: str, workload: Workload, python: str, result: Path) -> list[str]:
    return [
        *(python, "-m", MODULE, "bench", "serve"),
        *("--backend", "openai", "--base-url", server.url.removesuffix("/v1")),
        *("--endpoint", "/v1/completions"),
        *("--model", str(server.tokenizer), "--tokenizer", str(server.tokenizer)),
        *("--served-model-name", model),
        *("--dataset-name", "random", "--random-range-ratio", "0", "--seed", str(workload.seed)),
        *("--random-input-len", str(workload.input_len), "--random-output-len", str(workload.output_len)),
        *("--random-prefix-len", str(workload.prefix_len)),
        *("--num-prompts", str(workload.num_requests), "--max-concurrency", str(workload.concurrency)),
        *("--num-warmups", str(workload.num_warmups)),
        *("--ignore-eos", "--temperature", "0", "--disable-tqdm", "--ready-check-timeout-sec", "0"),
        *("--save-result", "--save-detailed"),
        *("--result-dir", str(result.parent), "--result-filename", result.name),
    ]


def _read(found: dict[str, list[float]], workload: Workload) -> Measured:
    rows = zip(found["ttfts"], found["itls"], found["output_lens"], found["errors"], strict=True)
    return Measured(
        workload=workload,
        wall_s=float(found["duration"]),  # type: ignore[arg-type] # the one field that is no list
        requests=tuple(
            # A request that failed without a word still has no tokens.
            Answered(error=str(error or "no token"))
            if error or not tokens
            else Answered(ttft_s=ttft, gaps_s=tuple(gaps), output_tokens=int(tokens))  # type: ignore[arg-type]
            for ttft, gaps, tokens, error in rows
        ),
        generator=GENERATOR,
    )
