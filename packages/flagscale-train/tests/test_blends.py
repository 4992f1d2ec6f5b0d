"""Blends, splits and resets, by Megatron's own datasets from the words of the plan."""

import json
import random
import subprocess
import sys
from array import array
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from flagscale_config import load, render_megatron
from flagscale_hw import detect
from flagscale_train import splits
from flagscale_train.data.indexed import IndexedWriter
from flagscale_train.findings import examine
from flagscale_train.plan import options_for

pytestmark = [pytest.mark.megatron, pytest.mark.every_megatron, pytest.mark.filterwarnings("ignore")]

EOD = 511
"""The end of a document for a NullTokenizer of 512 tokens, the last of which older Megatrons add."""
MEGATRON = tuple(map(int, version("megatron-core").split(".")[:2])) if find_spec("megatron") else (0, 19)
TOKENIZER = f"train.data.tokenizer.vocab_size={512 - (MEGATRON < (0, 18))}"
LENGTH = 32
RESET = [
    f"+train.data.{name}=true" for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
]


def documents(first, count, seed, longest=60):
    """Make documents whose ids tell them: the dataset by the range, the document by its first two ids."""
    chance = random.Random(seed)
    made = []
    for number in range(count):
        body = [first + chance.randrange(100) for _ in range(chance.randrange(8, longest))]
        made.append([first + 100 + number // 10, first + 110 + number % 10, *body, EOD])
    return made


A, B, C = documents(0, 40, 1), documents(150, 30, 2), documents(300, 20, 3, longest=14)


def write(prefix, made):
    with IndexedWriter(prefix, "H") as writer:
        for ids in made:
            writer.add(array("H", ids).tobytes(), [len(ids)])
    return str(prefix)


@pytest.fixture(scope="module")
def place(tmp_path_factory, write_experiment):
    """Every case's samples, from one process that imports Megatron once."""
    folder = tmp_path_factory.mktemp("blends")
    experiment = write_experiment(folder)
    a, b, c = (write(folder / name, made) for name, made in (("a", A), ("b", B), ("c", C)))
    alone = [write(folder / f"alone{number}", [ids]) for number, ids in enumerate(C[:2])]
    data, no_split = "train.data.data_path", ["~train.data.data_path", "~train.data.split"]
    absolute = "train.model.position_embedding_type=learned_absolute"
    cases = {
        "weighted": ([f"{data}=[3,{a},1,{b}]"], [80, 12, 0], False),
        "unweighted": ([f"{data}=[{a},{b}]"], [20, 2, 0], False),
        "too short": ([f"{data}=[{a},{b}]"], [2000, 2, 0], False),
        "per split": (
            [*no_split, f"+train.data.train_data_path=[1,{a},1,{c}]", f"+train.data.valid_data_path={b}"],
            [40, 8, 0],
            False,
        ),
        "reset": ([f"{data}={c}", "train.data.split='1,0,0'", *RESET], [12, 0, 0], False),
        "seen": ([f"{data}={c}", "train.data.split='1,0,0'"], [4, 0, 0], True),
        "unseen": ([f"{data}={c}", "train.data.split='1,0,0'", *RESET], [4, 0, 0], True),
        "unseen, absolute": (
            [f"{data}={c}", "train.data.split='1,0,0'", absolute, *RESET],
            [4, 0, 0],
            True,
        ),
        **{
            f"alone {number}{name}": (
                [f"{data}={prefix}", "train.data.split='1,0,0'", *more, *RESET],
                [1, 0, 0],
                True,
            )
            for number, prefix in enumerate(alone)
            for name, more in (("", []), (", absolute", [absolute]))
        },
    }
    jobs = [
        job(experiment, folder / f"{name}.safetensors", overrides, samples, losses)
        for name, (overrides, samples, losses) in cases.items()
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("blended_batches.py")
    done = subprocess.run(
        [sys.executable, script, folder / "jobs.json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def job(experiment, out, overrides, samples, losses):
    found = load(experiment, [*overrides, TOKENIZER], task="train")
    findings = examine(found)
    assert findings.problems == ()
    options = options_for(found, detect(), findings)
    return {
        "argv": list(render_megatron({**options, "data_cache_path": str(out.with_suffix(""))})),
        "samples": samples,
        "losses": losses,
        "env": {"FLAGSCALE_PLATFORM": "cpu", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        "out": str(out),
    }


def samples_of(place, name):
    from safetensors.numpy import load_file

    return load_file(place / f"{name}.safetensors")


def stream_has(made, whole):
    """Whether a sample's ids stand next to each other in these documents, in any order of them."""
    pieces, rest = [], list(whole)
    while EOD in rest:
        cut = rest.index(EOD) + 1
        pieces.append(rest[:cut])
        rest = rest[cut:]
    first = [ids for ids in made if ids[-len(pieces[0]) :] == pieces[0]] if pieces else made
    middle = all(piece in made for piece in pieces[1:])
    last = (
        any(ids[: len(rest)] == rest for ids in made) if pieces else any(contains(ids, rest) for ids in made)
    )
    return bool(first) and middle and last


def is_of_a(whole):
    return max(token for token in whole if token != EOD) < 150


def contains(ids, part):
    return any(ids[start : start + len(part)] == part for start in range(len(ids)))


def wholes(samples, split):
    return [
        [*tokens, labels[-1]]
        for tokens, labels in zip(samples[f"{split}.tokens"], samples[f"{split}.labels"], strict=True)
    ]


def test_weights_are_the_shares_of_samples_and_splits_keep_their_documents(place):
    samples = samples_of(place, "weighted")
    bounds = {"train": (slice(0, 36), slice(0, 27)), "valid": (slice(36, 40), slice(27, 30))}
    for split, wanted in (("train", 80), ("valid", 12)):
        found = wholes(samples, split)[:wanted]
        of_a = [whole for whole in found if is_of_a(whole)]
        assert abs(len(of_a) - wanted * 3 / 4) <= 1
        parts = [made[part] for made, part in zip((A, B), bounds[split], strict=True)]
        for whole in found:
            # Documents follow each other over the end of an epoch too.
            assert stream_has(parts[0 if whole in of_a else 1], whole)


def test_without_weights_every_token_is_used_once(place):
    samples = samples_of(place, "unweighted")
    assert len(samples["train.tokens"]) == 20
    assert not any(name.startswith("test") for name in samples)


def test_a_blend_that_is_too_short_is_refused_before_the_first_step(place):
    said = (place / "too short.refused").read_text()
    count = sum((sum(map(len, made[:bound])) - 1) // LENGTH for made, bound in ((A, 36), (B, 27)))
    assert f"gives {count} samples for train, and 2000 are asked for: give weights" in said


def test_each_split_has_its_own_data(place):
    samples = samples_of(place, "per split")
    for split, allowed in (("train", A + C), ("valid", B)):
        for whole in wholes(samples, split):
            assert stream_has(A if is_of_a(whole) else allowed, whole)
    assert {min(whole) >= 150 for whole in wholes(samples, "valid")} == {True}


def test_positions_masks_and_losses_begin_anew_with_each_document(place):
    samples = samples_of(place, "reset")
    assert any((tokens[:-1] == EOD).any() for tokens in samples["train.tokens"]), "or nothing is tested"
    for tokens, positions, counts, hidden in zip(
        *(samples[f"train.{key}"] for key in ("tokens", "position_ids", "loss_mask", "attention_mask")),
        strict=True,
    ):
        document, start = 0, 0
        numbers, expected = [], []
        for place_here, token in enumerate(tokens):
            numbers.append(document)
            expected.append(place_here - start)
            if token == EOD:
                document, start = document + 1, place_here + 1
        assert positions.tolist() == expected
        assert counts.tolist() == [float(token != EOD) for token in tokens]
        for row in range(LENGTH):
            sees = [column <= row and numbers[column] == numbers[row] for column in range(LENGTH)]
            assert (~hidden[0, row]).tolist() == sees


@pytest.mark.parametrize("kind", ["", ", absolute"])
def test_a_document_is_read_as_if_it_stood_alone(place, kind):
    packed = samples_of(place, f"unseen{kind}")
    compared = 0
    for number in range(2):
        lone = samples_of(place, f"alone {number}{kind}")
        ids = C[number]
        for tokens, losses in zip(packed["train.tokens"].tolist(), packed["losses"], strict=True):
            for start in range(1, LENGTH - len(ids)):
                if tokens[start : start + len(ids)] == ids:
                    single = lone["train.tokens"][0].tolist().index(ids[0])
                    # The last token's label is the next document, another one here than there.
                    inside = len(ids) - 1
                    theirs = lone["losses"][0][single : single + inside]
                    assert abs(losses[start : start + inside] - theirs).max() < 1e-4
                    compared += 1
    assert compared


def test_without_the_reset_they_do_see_each_other(place):
    seen, unseen = samples_of(place, "seen"), samples_of(place, "unseen")
    assert (seen["train.tokens"] == unseen["train.tokens"]).all()
    assert abs(seen["losses"] - unseen["losses"]).max() > 1e-3


@pytest.mark.parametrize("split", ["98,2,0", "969, 30, 1", "1,0,0", "99,1", "8,1,1", "0.7,0.2,0.1", "1/1/1"])
def test_shares_are_megatrons(split):
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for count in (*range(200), 999, 1001, 123_457):
        theirs = [
            None if part is None else round(part[1] * float(count)) - round(part[0] * float(count))
            for part in matrix
        ]
        assert list(splits.shares(split, count)) == theirs
