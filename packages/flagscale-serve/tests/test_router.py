"""Several instances behind the real router. It runs where vllm-router is installed: `nox -s engines`."""

from __future__ import annotations

import httpx
import pytest

ITEM = """
- serve_id: a
  engine: vllm
  engine_args: {{model: {model}, served_model_name: m, api_key: the-very-key}}
  resources: {{num_replicas: 2}}
"""


@pytest.mark.transformers
def test_copies_answer_at_one_address(shell, serve_file, model_dir, alive):
    path = serve_file(ITEM.format(model=model_dir))
    done = shell("run", path, "--detach", "--timeout", 120)
    assert done.returncode == 0, done.stderr
    status = shell.the_status()
    first, second, router = status["instances"]
    assert (first["behind"], second["behind"], router["behind"]) == ("a-router", "a-router", None)
    assert router["url"] in done.stdout
    assert first["url"] not in done.stdout
    key = {"Authorization": "Bearer the-very-key"}
    body = {"model": "m", "max_tokens": 4}
    for number in range(8):
        answer = httpx.post(
            f"{router['url']}/completions",
            json={**body, "prompt": f"word {number}"},
            headers=key,
            trust_env=False,
        )
        assert answer.json()["choices"][0]["text"] == f"WORD {number}"
    # The key is the instances' own: the router passes it on, and has none in its command line.
    refused = httpx.post(f"{router['url']}/completions", json={**body, "prompt": "x"}, trust_env=False)
    assert refused.status_code == 401
    streamed = shell("chat", "-m", "Hello", "--api-key", "the-very-key")
    assert streamed.stdout.startswith("user=Hello")
    pids = [one["pid"] for one in status["instances"]]
    assert shell("stop").returncode == 0
    assert not [pid for pid in pids if alive(pid)]


def test_a_router_that_is_not_there_is_named_with_its_cure(shell, serve_file, model_dir, monkeypatch):
    monkeypatch.setattr("flagscale_serve.router.MODULE", "no_such_router")
    done = shell("run", serve_file(ITEM.format(model=model_dir)))
    assert done.returncode == 3
    assert "pip install 'flagscale-serve[router]'" in done.stderr
    assert shell.engine_pids() == []
