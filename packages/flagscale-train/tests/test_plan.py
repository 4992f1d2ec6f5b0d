"""Plans: pure, and equal to golden files for each chip. FLAGSCALE_UPDATE_GOLDEN=1 rewrites those."""

import json
import os
from importlib.resources import files
from pathlib import Path

import pytest

from flagscale_config import load, option_table
from flagscale_hw.testing import fake_host
from flagscale_train import Findings, InvalidInput, documents, plan
from flagscale_train.plan import options_for

GOLDEN = Path(__file__).parent / "golden"
HOSTS = {"cpu": ("cpu", 0), "nvidia": ("nvidia", 8)}
RECIPES = ("qwen3/0_6b", "qwen3/tiny", "llama3/8b")


APART = "+train.data.reset_attention_mask=true"


def recipe(name, *overrides):
    family, stem = name.split("/")
    path = files("flagscale_train.recipes") / family / "conf" / f"{stem}.yaml"
    given = [
        "train.data.data_path=/data/text",
        "train.data.tokenizer.tokenizer_model=/tok",
        "experiment.exp_dir=/exp",
    ]
    return load(path, [*given, *overrides]).model_copy(update={"cwd": "/cwd", "source": "/recipe.yaml"})


def planned(name="qwen3/tiny", *overrides, chip="cpu", findings=None):
    return plan(recipe(name, *overrides), fake_host(*HOSTS[chip]), python="python", findings=findings)


def options(made):
    """Return the Megatron words of a plan as a mapping."""
    words = made.processes[0].argv[made.processes[0].argv.index("flagscale_train.worker") + 1 :]
    found, name = {}, ""
    for word in words:
        if word.startswith("--"):
            name = word
            found[name] = []
        else:
            found[name].append(word)
    return found


@pytest.mark.parametrize("chip", HOSTS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_plans_on_each_chip_as_recorded(name, chip):
    made = json.loads(planned(name, chip=chip).to_json())
    del made["facts"]["experiment"]  # flagscale-config's to test
    path = GOLDEN / f"{name.replace('/', '-')}.{chip}.json"
    text = json.dumps(made, indent=2, sort_keys=True) + "\n"
    if os.environ.get("FLAGSCALE_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_the_same_input_gives_the_same_bytes():
    assert planned().to_json() == planned().to_json()


def test_a_run_resumes_from_its_own_folder_by_default():
    words = options(planned())
    assert words["--save"] == words["--load"] == ["/exp/checkpoints"]
    words = options(planned("qwen3/tiny", "+train.system.checkpoint.load=/other"))
    assert (words["--save"], words["--load"]) == (["/exp/checkpoints"], ["/other"])


def test_a_run_may_save_nothing_and_yet_resume():
    words = options(planned("qwen3/tiny", "+experiment.runner.checkpoints.enabled=false"))
    assert [word for word in words if word.startswith("--save")] == []
    assert words["--load"] == ["/exp/checkpoints"]


def test_rules_for_bad_steps_and_old_checkpoints_reach_the_worker():
    rules = "+experiment.runner.bad_steps"
    made = planned(
        "qwen3/tiny",
        f"{rules}={{action: skip, spike_threshold: 0.2, patience: 3}}",
        "+experiment.runner.checkpoints.keep_last=2",
    )
    env = made.processes[0].env
    assert (env["FLAGSCALE_ON_BAD_STEP"], env["FLAGSCALE_SPIKE_THRESHOLD"]) == ("skip", "0.2")
    assert (env["FLAGSCALE_BAD_STEP_PATIENCE"], env["FLAGSCALE_KEEP_LAST"]) == ("3", "2")
    # Megatron's own check would end the run before ours is asked; who wants it names its mode.
    check, mode = "--no-check-for-nan-in-loss-and-grad", "+train.system.rerun_mode=validate_results"
    assert check in options(made)
    assert check not in options(planned("qwen3/tiny", mode))
    off = planned("qwen3/tiny", "+train.system.no_check_for_nan_in_loss_and_grad=true")
    assert off.processes[0].env["FLAGSCALE_ON_BAD_STEP"] == "off"
    assert "FLAGSCALE_ON_BAD_STEP" not in planned().processes[0].env


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["+experiment.runner.bad_steps.action=roll_back", "+experiment.runner.checkpoints.enabled=false"],
            "there is nothing to go back to",
        ),
        (
            ["+experiment.runner.bad_steps.action=skip", "+train.system.rerun_mode=validate_results"],
            "Megatron ends the run at a bad step",
        ),
        (
            [
                "+experiment.runner.checkpoints.keep_last=2",
                "+train.system.checkpoint.save_retain_interval=200",
            ],
            "deletes checkpoints by another rule",
        ),
    ],
)
def test_rules_that_contradict_are_refused(overrides, message):
    with pytest.raises(InvalidInput, match=message):
        planned("qwen3/tiny", *overrides)


def test_what_the_forward_step_cannot_do_is_refused_before_the_start():
    asked = recipe("qwen3/30b_a3b", "+train.system.overlap_moe_expert_parallel_comm=true")
    with pytest.raises(InvalidInput, match="overlap_moe_expert_parallel_comm: true: the worker's"):
        options_for(asked, fake_host("nvidia", 8), Findings())


def test_a_save_in_the_background_takes_the_strategy_that_is_installed():
    words = options(planned("qwen3/tiny", "+train.system.checkpoint.async_save=true"))
    assert words["--async-strategy"] == ["mcore"]
    there = Findings(installed=frozenset({"nvidia_resiliency_ext"}))
    made = planned("qwen3/tiny", "+train.system.checkpoint.async_save=true", findings=there)
    assert "--async-strategy" not in options(made)


def test_the_cpu_gets_gloo_and_plain_layers_and_the_gpu_its_own():
    on_cpu, on_gpu = planned(), planned(chip="nvidia")
    assert options(on_cpu)["--distributed-backend"] == ["gloo"]
    assert options(on_cpu)["--transformer-impl"] == ["local"]
    assert "--bf16" not in options(on_cpu)
    assert options(on_gpu)["--distributed-backend"] == ["nccl"]
    assert "--transformer-impl" not in options(on_gpu)
    assert "--bf16" in options(on_gpu)
    assert "--no-gradient-accumulation-fusion" not in options(on_gpu)
    assert on_gpu.processes[0].env["FLAGSCALE_PLATFORM"] == "cuda"
    assert on_gpu.processes[0].env["FLAGSCALE_PEAK_FLOPS"] == "9.89e+14"
    assert "TORCH_COMPILE_DISABLE" not in on_gpu.processes[0].env


def test_one_queue_per_device_is_for_all_but_fsdp_which_refuses_it():
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    assert planned(chip="nvidia").processes[0].env[name] == "1"
    sharded = planned(
        "qwen3/tiny",
        "+train.system.use_torch_fsdp2=true",
        "++train.system.no_gradient_accumulation_fusion=true",
        "++train.system.use_distributed_optimizer=false",
        "++train.model.untie_embeddings_and_output_weights=true",
        chip="nvidia",
    )
    assert "--use-torch-fsdp2" in options(sharded)
    assert name not in sharded.processes[0].env


def test_documents_are_kept_apart_by_what_the_layers_take():
    name, plain = "--no-create-attention-mask-in-dataloader", "+train.system.transformer_impl=local"
    assert name in options(planned("qwen3/tiny"))
    for asked in (APART, "+train.data.sft=true"):
        assert name not in options(planned("qwen3/tiny", asked))
        assert name in options(planned("qwen3/tiny", asked, chip="nvidia"))
        chosen = options(planned("qwen3/tiny", asked, plain, chip="nvidia"))
        assert name not in chosen
        assert "--no-rope-fusion" in chosen, "what is chosen takes its other options along"


@pytest.mark.parametrize("version", ["0.17.1", "0.19.2"])
def test_experts_are_balanced_by_sequence_where_megatron_tells_sequences_apart(monkeypatch, version):
    monkeypatch.setattr("flagscale_config.option_table", lambda engine: option_table(engine, version))
    options = {"reset_attention_mask": True, "micro_batch_size": 2, "num_experts": 4}
    found = documents.conflicts({**options, "moe_router_load_balancing_type": "seq_aux_loss"})
    assert ["megatron-core before 0.19" in problem for problem in found] == [True] * (version == "0.17.1")
    assert documents.conflicts({**options, "moe_router_load_balancing_type": "aux_loss"}) == []


def test_what_is_not_installed_is_not_asked_for():
    for installed in ({"transformer_engine"}, {"transformer_engine", "apex"}):
        engine = planned(chip="nvidia", findings=Findings(installed=frozenset(installed)))
        assert "--no-gradient-accumulation-fusion" not in options(engine)
    bare = options(planned(chip="nvidia", findings=Findings(installed=frozenset())))
    assert bare["--transformer-impl"] == ["local"]
    assert "--no-masked-softmax-fusion" in bare
    assert "--tensorboard-dir" not in bare


def test_the_users_word_wins_over_a_default():
    made = planned(
        "qwen3/tiny",
        "+experiment.envs={OMP_NUM_THREADS: 7, HF_TOKEN: abc}",
        "+train.system.fp16=true",
        chip="nvidia",
    )
    assert made.processes[0].env["OMP_NUM_THREADS"] == "7"
    assert "--bf16" not in options(made)
    assert "abc" not in made.to_json()
    assert made.processes[0].env["TOKENIZERS_PARALLELISM"] == "false"
    assert made.secrets == ("HF_TOKEN",)


def test_fewer_processes_than_devices_are_told_which():
    made = planned(chip="nvidia")
    assert made.processes[0].env["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_without_a_number_all_devices_or_one_copy_of_the_model_are_used():
    assert planned("llama3/8b", chip="nvidia").facts["layout"] == {
        "processes": 8, "data": 4, "tensor": 2, "pipeline": 1, "context": 1,
    }  # fmt: skip
    assert planned("llama3/8b").facts["layout"]["processes"] == 2


@pytest.mark.parametrize(
    ("tensor", "vocab", "padded"),
    [(1, 1000, "1024"), (2, 1000, "1024"), (4, 1000, "1024"), (2, 1024, "1024"), (2, 1025, "1152")],
)
def test_the_padded_vocabulary_does_not_depend_on_the_tensor_size(tensor, vocab, padded):
    made = planned(
        "qwen3/tiny",
        f"train.system.tensor_model_parallel_size={tensor}",
        "experiment.runner.nproc_per_node=4",
        "train.model.global_batch_size=16",
        findings=Findings(tokenizer_vocab_size=vocab),
    )
    assert options(made)["--padded-vocab-size"] == [padded]


def test_where_the_tensor_size_does_not_divide_megatron_pads():
    findings = Findings(tokenizer_vocab_size=1000)
    sizes = ["train.system.tensor_model_parallel_size=3", "experiment.runner.nproc_per_node=3"]
    shape = ["train.model.num_attention_heads=6", "train.model.num_query_groups=3"]
    assert "--padded-vocab-size" not in options(planned("qwen3/tiny", *sizes, *shape, findings=findings))


def test_the_published_vocabulary_is_kept_where_the_tokenizer_is_smaller():
    made = planned("qwen3/0_6b", findings=Findings(tokenizer_vocab_size=151669))
    assert options(made)["--padded-vocab-size"] == ["151936"]


def test_the_users_shell_text_comes_first_and_our_words_stay_words():
    argv = planned("qwen3/tiny", "+experiment.cmds.before_start=source /venv/bin/activate").processes[0].argv
    assert argv[:4] == ("bash", "-c", 'source /venv/bin/activate\nexec "$@"', "flagscale")
    assert argv[4:7] == ("python", "-m", "flagscale_train.worker.torchrun")


@pytest.mark.parametrize(
    ("overrides", "chip", "said"),
    [
        (
            ["experiment.runner.nproc_per_node=16", "train.model.global_batch_size=64"],
            "nvidia",
            "offers 8 nvidia devices",
        ),
        (
            ["+train.system.transformer_impl=transformer_engine"],
            "cpu",
            "transformer_impl: transformer_engine: on a CPU",
        ),
        (
            ["+train.system.distributed_backend=nccl"],
            "cpu",
            "distributed_backend: nccl: on a CPU it must be gloo",
        ),
        (["+train.system.rope_fusion=true"], "cpu", "no_rope_fusion: false: on a CPU it must be true"),
        (
            ["+train.system.fp8_format=hybrid", "+train.system.bf16=true"],
            "cpu",
            "fp8_format: hybrid: needs a GPU",
        ),
        (
            ["+train.system.ckpt_format=torch"],
            "nvidia",
            "ckpt_format: torch: checkpoints are kept as torch_dist",
        ),
        (
            ["+experiment.runner.nnodes=2", "train.model.global_batch_size=16"],
            "nvidia",
            "no hostfile",
        ),
        (
            [APART, "+train.system.context_parallel_size=2"],
            "nvidia",
            "context_parallel_size: 2: Transformer Engine divides only documents of certain lengths",
        ),
        (
            [APART, "train.system.pipeline_model_parallel_size=2"],
            "nvidia",
            "micro_batch_size: 4: reset_attention_mask with Transformer Engine lays sequences",
        ),
        (
            [APART, "+train.data.create_attention_mask_in_dataloader=true"],
            "nvidia",
            "no_create_attention_mask_in_dataloader: false: Transformer Engine takes no masks",
        ),
        (
            [APART, "+train.data.no_create_attention_mask_in_dataloader=true"],
            "cpu",
            "no_create_attention_mask_in_dataloader: true: plain layers need masks",
        ),
        (
            ["+train.data.dataloader_inter_document_masking=true"],
            "cpu",
            "use reset_attention_mask, which keeps documents apart",
        ),
        (["+train.data.vocab_size=999"], "cpu", "vocab_size: 999: the tokenizer has 1000 tokens"),
        (
            ["+train.model.padded_vocab_size=896"],
            "cpu",
            "padded_vocab_size: 896: the tokenizer has 1000 tokens",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(overrides, chip, said):
    with pytest.raises(InvalidInput) as error:
        planned("qwen3/tiny", *overrides, chip=chip, findings=Findings(tokenizer_vocab_size=1000))
    assert said in str(error.value)
    assert error.value.exit_code == 2


def test_data_of_another_tokenizer_are_refused():
    with pytest.raises(InvalidInput, match="the data hold token 2000, the vocabulary ends at 999"):
        planned(findings=Findings(tokenizer_vocab_size=1000, data_max_token=2000))


def test_every_problem_is_named_at_once():
    with pytest.raises(InvalidInput) as error:
        planned(
            "qwen3/tiny",
            "+train.system.distributed_backend=nccl",
            findings=Findings(problems=("first", "second")),
        )
    assert len(str(error.value).splitlines()) == 3
