"""Checks across vLLM's options: twins of what vLLM refuses while it builds its configuration.

vLLM 0.32 makes them after its imports, half a minute into every start; here they need neither vLLM nor a
device. The twins are proven against vLLM's own parser and `EngineArgs.create_engine_config` by
`tests/test_vllm_twins.py`. What depends on the devices of the machine, on installed packages or on the
weights is vLLM's alone: the world size against the devices present, Ray, kernels and attention backends,
quantization of a checkpoint, architectures that cannot be pipelined. Not proven without a GPU: layouts with
prefill-context parallelism and `enable_dbo`, which vLLM on a CPU refuses or ignores.

One module per subject: `parallel`, `scheduling` (batches, cache, LoRA), `model` (against the model's own
numbers, where its `config.json` is here or it is a published one), `speculative`, `features`; `options` is
what they look at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flagscale_config.arithmetic.vllm import features, model, parallel, scheduling, speculative
from flagscale_config.arithmetic.vllm.options import VllmOptions
from flagscale_config.findings import Findings
from flagscale_config.places import Path

__all__ = ["check_vllm"]

_SUBJECTS = (parallel, scheduling, model, speculative, features)


def check_vllm(
    given: Mapping[str, Any], places: Mapping[str, Path], findings: Findings, envs: Mapping[str, Any]
) -> None:
    """Report every contradiction between the options of one vLLM.

    Args:
        given: options by canonical name, typed by vLLM's table.
        places: where each stands in the file; the place under "" is that of the options as a whole.
        findings: where contradictions are reported.
        envs: environment variables that the file sets; some of vLLM's limits can be lifted by one.
    """
    options = VllmOptions(given, places, findings, envs)
    for subject in _SUBJECTS:
        for check in subject.CHECKS:
            check(options)
