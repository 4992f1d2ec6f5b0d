"""What was trained under several layouts goes to Hugging Face and back with every bit."""

import pytest
from test_parity import ALL_TO_ALL, DEEPSEEK, EXPERT, EXPERTS, PIPELINE, SEQUENCE, SYSTEM
from trainings import train_job

pytestmark = pytest.mark.megatron

DENSE = ["train.model.num_layers=4"]
TRAINED = {
    "dense-sequence": [*DENSE, *SEQUENCE],
    "dense-interleaved": [*DENSE, *PIPELINE, f"{SYSTEM}num_layers_per_virtual_pipeline_stage=1"],
    "experts-expert": [*EXPERTS, *EXPERT, ALL_TO_ALL],
    "deepseek-pipeline": [*DEEPSEEK, *PIPELINE],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, write_experiment, run_forked):
    """Train two steps of each, and return the folder of it all."""
    folder = tmp_path_factory.mktemp("exports")
    experiment = write_experiment(folder)
    run_forked(
        folder,
        [
            train_job(experiment, folder / name, ["train.model.train_iters=2", *overrides])
            for name, overrides in TRAINED.items()
        ],
    )
    return folder


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_checkpoint_comes_back_from_hugging_face_bit_by_bit(place, tmp_path, name):
    from flagscale_convert import convert, make_plan, verify

    trained = place / name / "checkpoints"
    convert(make_plan(trained, tmp_path / "hf", to="hf"))
    convert(make_plan(tmp_path / "hf", tmp_path / "back", to="torch_dist"))
    for other in ("hf", "back"):
        report = verify(trained, tmp_path / other, mode="bitwise")
        assert report.is_equal, report.differences
        assert report.num_tensors > 0
