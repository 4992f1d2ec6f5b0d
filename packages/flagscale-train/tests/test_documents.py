"""Documents that share a sequence are kept apart alike by masks and by bounds.

Bounds are what Transformer Engine takes. Its attention cannot run here; what stands for it attends to each
document alone. What is told to it, and all that follows from sequences being laid one behind another, is the
real thing.
"""

import pytest
from test_blends import MEGATRON, TOKENIZER, C, write
from test_parity import MODELS
from trainings import curve, train_job, worst

pytestmark = [pytest.mark.megatron, pytest.mark.every_megatron]

TOLERANCE = 2e-6
RESET = ["+train.data.reset_position_ids=true", "+train.data.reset_attention_mask=true"]
BOUNDED = {"no_create_attention_mask_in_dataloader": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory, write_experiment, run_forked):
    folder = tmp_path_factory.mktemp("documents")
    experiment = write_experiment(folder)
    data = f"train.data.data_path={write(folder / 'short', C)}"
    jobs = []
    # Older ones balance experts over all sequences that stand one behind another; the plan refuses that.
    size = 1 if MEGATRON < (0, 18) else 2
    for model in ("dense", "deepseek"):
        words = [*MODELS[model], TOKENIZER, data, "train.data.split='1,0,0'", "train.model.train_iters=3"]
        words.append(f"train.model.micro_batch_size={size}")
        for name, more, changes in (("seen", [], {}), ("masked", RESET, {}), ("bounded", RESET, BOUNDED)):
            job = train_job(experiment, folder / f"{model}-{name}", [*words, *more], changes=changes)
            jobs.append(job | {"bounded": name == "bounded"})
    run_forked(folder, jobs)
    return folder


@pytest.mark.parametrize("model", ["dense", "deepseek"])
def test_bounds_keep_documents_apart_as_masks_do(place, model, record_property):
    seen, masked, bounded = (curve(place / f"{model}-{name}") for name in ("seen", "masked", "bounded"))
    difference = worst(bounded, masked)
    record_property("worst", f"{difference:.1e}")
    assert difference <= TOLERANCE
    assert worst(seen, masked) > 100 * TOLERANCE, "the documents are told apart"
