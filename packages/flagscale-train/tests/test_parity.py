"""Twenty steps of every layout against one process, all of a model from one checkpoint.

Differences of losses and gradient norms are absolute, in fp32; the losses are near 6, the norms near 1. What
one fp32 unit in the last place of a loss is: 4.8e-7.
"""

import pytest
from trainings import curve, events, train_job, worst

pytestmark = pytest.mark.megatron

TOLERANCE = 2e-6
STEPS = 20

SYSTEM, MODEL = "+train.system.", "+train.model."
TWO = "experiment.runner.nproc_per_node=2"
TENSOR = [TWO, f"{SYSTEM}tensor_model_parallel_size=2"]
SEQUENCE = [*TENSOR, f"{SYSTEM}sequence_parallel=true"]
PIPELINE = [TWO, f"{SYSTEM}pipeline_model_parallel_size=2"]
CONTEXT = [TWO, f"{SYSTEM}context_parallel_size=2"]
EXPERT = [TWO, f"{SYSTEM}expert_model_parallel_size=2"]
OVERLAP = [f"{SYSTEM}overlap_grad_reduce=true", f"{SYSTEM}overlap_param_gather=true"]
RECOMPUTE = [f"{SYSTEM}recompute_{name}" for name in ("granularity=full", "method=uniform", "num_layers=1")]
ALL_TO_ALL, ALL_GATHER = (f"{MODEL}moe_token_dispatcher_type={name}" for name in ("alltoall", "allgather"))

EXPERTS = [
    f"{MODEL}num_experts=4",
    f"{MODEL}moe_router_topk=2",
    f"{MODEL}moe_ffn_hidden_size=64",
    f"{MODEL}moe_router_load_balancing_type=aux_loss",
]
LATENT = [
    "train.model.group_query_attention=false",
    "~train.model.num_query_groups",
    "~train.model.kv_channels",
    f"{MODEL}multi_latent_attention=true",
    f"{MODEL}kv_lora_rank=16",
    f"{MODEL}qk_head_dim=16",
    f"{MODEL}qk_pos_emb_head_dim=8",
    f"{MODEL}v_head_dim=12",
    f"{MODEL}rope_type=rope",
    f"{MODEL}no_rope_fusion=true",
    f"{MODEL}untie_embeddings_and_output_weights=true",
]
DEEPSEEK = [
    *LATENT,
    f"{MODEL}q_lora_rank=24",
    f"{MODEL}num_experts=8",
    f"{MODEL}moe_router_topk=4",
    f"{MODEL}moe_ffn_hidden_size=32",
    f"{MODEL}moe_shared_expert_intermediate_size=32",
    f"{MODEL}moe_layer_freq='[0]*1+[1]*1'",
    f"{MODEL}moe_router_score_function=sigmoid",
    f"{MODEL}moe_router_topk_scaling_factor=2.5",
    f"{MODEL}moe_router_enable_expert_bias=true",
    f"{MODEL}moe_router_bias_update_rate=0.001",
    f"{MODEL}moe_router_num_groups=4",
    f"{MODEL}moe_router_group_topk=2",
    f"{MODEL}moe_router_load_balancing_type=seq_aux_loss",
    f"{MODEL}moe_aux_loss_coeff=0.001",
    f"{MODEL}mtp_num_layers=1",
    f"{MODEL}mtp_loss_scaling_factor=0.3",
]
MODELS = {
    "dense": ["train.model.num_layers=4"],
    "experts": [*EXPERTS, f"{MODEL}moe_aux_loss_coeff=0.01"],
    "latent": LATENT,
    "deepseek": DEEPSEEK,
}
LAYOUTS = {
    "dense": {
        "data-overlap": [TWO, *OVERLAP],
        "tensor": TENSOR,
        "sequence": SEQUENCE,
        "pipeline": PIPELINE,
        "interleaved": [*PIPELINE, f"{SYSTEM}num_layers_per_virtual_pipeline_stage=1"],
        "context": CONTEXT,
        "recompute": RECOMPUTE,
    },
    "experts": {
        "data": [TWO],
        "expert-alltoall": [*EXPERT, ALL_TO_ALL],
        "expert-allgather": [*EXPERT, ALL_GATHER],
    },
    "latent": {"tensor": TENSOR, "sequence": SEQUENCE},
    "deepseek": {
        "expert": [*EXPERT, ALL_TO_ALL],
        "pipeline": PIPELINE,
        "sequence": [*SEQUENCE, ALL_TO_ALL],
        "context": [*CONTEXT, ALL_TO_ALL],
    },
}
CASES = [(model, layout) for model, layouts in LAYOUTS.items() for layout in layouts]
EVERY_MEGATRON = {("dense", "tensor"), ("dense", "context"), ("experts", "expert-alltoall")}
"""What the session of the older Megatron trains too: each way in which the seam is called, in short."""
PARAMETERS = [
    pytest.param(*case, id="-".join(case), marks=[pytest.mark.every_megatron] * (case in EVERY_MEGATRON))
    for case in CASES
]
SEEDS = {"experts": [*EXPERT, ALL_TO_ALL]}
"""How the checkpoint is made that all layouts of a model start from; by one process where not said.

So the optimizer's state of experts goes from two ranks to one here, and from one to two with `deepseek`.
"""


def job(experiment, folder, overrides, *, seed=None):
    """Describe one training: of one step, saved, or going on from a `seed` of that kind, unsaved."""
    words = [
        f"train.model.train_iters={1 if seed is None else 1 + STEPS}",
        "train.model.eval_interval=1000",
        "train.model.optimizer.lr_decay_iters=30",
        *overrides,
    ]
    if seed is None:
        return train_job(experiment, folder, words)
    load = {"load": str(seed / "checkpoints")}
    return train_job(experiment, folder, words, changes=load, without=("save", "save_interval"))


@pytest.fixture(scope="module")
def place(request, tmp_path_factory, write_experiment, run_forked):
    """Train what the chosen tests compare, and return the folder of it all."""
    chosen = [item.callspec.params for item in request.session.items if item.path == request.path]
    folder = tmp_path_factory.mktemp("parity")
    experiment = write_experiment(folder)
    jobs = []
    for model, overrides in MODELS.items():
        wanted = [case.get("layout") for case in chosen if case["model"] == model]
        if not wanted:
            continue
        seed = folder / f"{model}-seed"
        jobs.append(job(experiment, seed, [*overrides, *SEEDS.get(model, [])]))
        for layout, more in {"one": [], **LAYOUTS[model]}.items():
            if layout in ("one", *wanted):
                jobs.append(job(experiment, folder / f"{model}-{layout}", [*overrides, *more], seed=seed))
    run_forked(folder, jobs)
    return folder


@pytest.mark.parametrize(("model", "layout"), PARAMETERS)
def test_a_layout_trains_as_one_process_does(place, model, layout, record_property):
    ours, theirs = curve(place / f"{model}-{layout}"), curve(place / f"{model}-one")
    assert len(theirs) == STEPS
    difference = worst(ours, theirs)
    record_property("worst", f"{difference:.1e}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize(("model", "layout"), PARAMETERS)
def test_every_layout_counts_the_same_parameters(place, model, layout):
    (ours,), (theirs,) = (events(place / f"{model}-{name}", "start") for name in (layout, "one"))
    assert ours["parameters"] == theirs["parameters"]


@pytest.mark.parametrize("model", MODELS)
def test_a_model_learns(place, model):
    losses = [loss for _, loss, _ in curve(place / f"{model}-one")]
    assert losses[-1] < losses[0] - 0.05
