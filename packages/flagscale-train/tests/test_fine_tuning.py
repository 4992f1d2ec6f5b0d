"""Fine-tuning by chats and by adapters does what transformers and peft do with the same weights.

Everything is fp32 on the CPU. Losses are near 6, so 1e-5 is two units of the last place or so.
"""

import json
from importlib.metadata import version

import pytest
from trainings import curve, logits_job, train_job, worst

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.filterwarnings("ignore"),  # importing Megatron and peft warns of what is not installed
]

TOLERANCE = 1e-5
LENGTH, SEQUENCES = 112, 8
"""All chats fill this many sequences, so that one step sees each once whatever the order."""

TOKENS = [[(7 * place + 3 * row) % 380 for place in range(24)] for row in range(2)]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}{{ '\\n' }}"
    "{% if message.role == 'assistant' %}{OPEN}{{ message.content }}<|im_end|>{CLOSE}{{ '\\n' }}"
    "{% else %}{{ message.content }}<|im_end|>{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)
PLAIN = CHATML.replace("{OPEN}", "").replace("{CLOSE}", "")
MARKED = CHATML.replace("{OPEN}", "{% generation %}").replace("{CLOSE}", "{% endgeneration %}")

TRAIN = """
system:
  num_workers: 0
  log_interval: 1
  use_distributed_optimizer: true
  checkpoint:
    save_interval: 2
    pretrained_checkpoint: {folder}/megatron
model:
  num_layers: 2
  hidden_size: 64
  ffn_hidden_size: 112
  num_attention_heads: 4
{attention}
  normalization: RMSNorm
  norm_epsilon: 1.0e-6
  swiglu: true
  disable_bias_linear: true
  position_embedding_type: rope
  rotary_base: 10000
  seq_length: {length}
  max_position_embeddings: {length}
  attention_dropout: 0.0
  hidden_dropout: 0.0
  train_iters: 3
  micro_batch_size: 1
  global_batch_size: {sequences}
  eval_interval: 1000
  eval_iters: 0
  clip_grad: 1.0
  weight_decay: 0.1
  optimizer: {{lr: 2.0e-2, min_lr: 0.0, lr_decay_iters: 8, lr_decay_style: cosine}}
data:
  sft: true
  data_path: {folder}/chats.jsonl
  split: 1,0,0
  tokenizer: {{tokenizer_type: HuggingFaceTokenizer, tokenizer_model: {folder}/hf, vocab_size: 384}}
"""
GROUPED = {"head_dim": 24, "num_key_value_heads": 2, "tie_word_embeddings": False}
GROUPED_HERE = "  group_query_attention: true\n  num_query_groups: 2\n  kv_channels: 24\n"
EXPERTS_HERE = """\
  untie_embeddings_and_output_weights: true
  num_experts: 4
  moe_router_topk: 2
  moe_router_load_balancing_type: none
  moe_token_dispatcher_type: alltoall"""
MODELS = {
    "qwen3": ({**GROUPED, "tie_word_embeddings": True}, f"{GROUPED_HERE}  qk_layernorm: true"),
    "deepseek_v3": (
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "tie_word_embeddings": False,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
        },
        """\
  multi_latent_attention: true
  q_lora_rank: 24
  kv_lora_rank: 16
  qk_head_dim: 16
  qk_pos_emb_head_dim: 8
  v_head_dim: 12
  qk_layernorm: true
  rope_type: rope
  no_rope_fusion: true
  untie_embeddings_and_output_weights: true
  moe_layer_freq: "[0]*1+[1]*1"
  num_experts: 4
  moe_router_topk: 2
  moe_ffn_hidden_size: 32
  moe_shared_expert_intermediate_size: 32
  moe_router_load_balancing_type: none
  moe_router_score_function: sigmoid
  moe_router_enable_expert_bias: true
  moe_router_bias_update_rate: 0.1
  moe_router_topk_scaling_factor: 1.5""",
    ),
    "mixtral": (
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        f"{GROUPED_HERE}{EXPERTS_HERE}\n  moe_ffn_hidden_size: 112",
    ),
    "qwen3_moe": (
        {
            **GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        f"{GROUPED_HERE}{EXPERTS_HERE}\n  moe_ffn_hidden_size: 32\n  qk_layernorm: true",
    ),
}
"""What is not the same in all models: for transformers, and as lines for Megatron."""
EXPERIMENT = """
defaults: [_self_, {{train: tiny}}]
experiment:
  exp_name: tiny
  exp_dir: {folder}/exp
  task: {{type: train, backend: megatron}}
  runner: {{nproc_per_node: 1}}
  envs: {{OMP_NUM_THREADS: 1}}
"""
LORA = [
    "+train.model.peft_type=lora",
    "+train.model.lora_dim=4",
    "+train.model.lora_alpha=8",
    "+train.model.lora_out_init_method=normal",  # so that even the first step tells what an adapter does
]
TWO = "experiment.runner.nproc_per_node=2"
TENSOR = [TWO, "+train.system.tensor_model_parallel_size=2"]
SEQUENCE = [*TENSOR, "+train.system.sequence_parallel=true"]
CONTEXT = [TWO, "+train.system.context_parallel_size=2"]
PIPELINE = [TWO, "+train.system.pipeline_model_parallel_size=2"]
RECOMPUTE = [
    "+train.system.recompute_granularity=full",
    "+train.system.recompute_method=uniform",
    "+train.system.recompute_num_layers=1",
]
TRAININGS = {
    "full-one": [],
    "full-data": [TWO, "train.model.micro_batch_size=2"],
    "full-sequence": SEQUENCE,
    "full-pipeline": PIPELINE,
    "full-context": CONTEXT,
    "lora-one": LORA,
    "lora-data": [*LORA, TWO, *RECOMPUTE],
    "lora-tensor": [*LORA, *TENSOR],
    "lora-sequence": [*LORA, *SEQUENCE],
    "lora-pipeline": [*LORA, *PIPELINE],
}
# Some of what Megatron keeps in one layer, by Hugging Face's names.
PARTS = [*LORA, *TENSOR, "+train.model.lora_target_modules=[q_proj,v_proj,up_proj,down_proj]"]
ADAPTED = {"one": LORA, "parts": PARTS}
"""Trainings whose adapters are exported."""
EVERY_MEGATRON = ("lora-one", "lora-sequence", "lora-resumed", "lora-one-logits")
"""What the session of the older Megatron trains too."""


def chats():
    """Chats of both shapes, of one answer and of several."""
    found = []
    for number in range(14):
        question, answer = (
            f"what is {number} and {number}?",
            "it is " + "one more than " * (number % 5) + "that",
        )
        if number % 3 == 0:
            turns = [("human", question), ("gpt", answer), ("human", "really?"), ("gpt", "yes")]
            found.append(
                {"system": "be brief", "conversations": [{"from": who, "value": text} for who, text in turns]}
            )
        else:
            said = [("user", question), ("assistant", answer)]
            found.append({"messages": [{"role": role, "content": text} for role, text in said]})
    return found


def openai(chat):
    """Return a chat's messages in OpenAI's shape, without our code."""
    if "messages" in chat:
        return chat["messages"]
    roles = {"human": "user", "gpt": "assistant"}
    turns = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in chat["conversations"]]
    return [{"role": "system", "content": chat["system"]}, *turns]


def make_tokenizer(folder, template):
    from transformers import AutoTokenizer

    from flagscale_train.data import train_tokenizer

    corpus = folder / "corpus.txt"
    corpus.parent.mkdir(parents=True, exist_ok=True)
    corpus.write_text(" ".join(json.dumps(chat) for chat in chats()))
    train_tokenizer([str(corpus)], folder / "tok", vocab_size=300, overwrite=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tok")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def write_all(folder, kind="qwen3"):
    """Write a random model with its tokenizer, the same for Megatron, the chats and the experiment."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from flagscale_convert import convert, make_plan

    tokenizer = make_tokenizer(folder, PLAIN)
    described, attention = MODELS[kind]
    config = AutoConfig.for_model(
        kind, vocab_size=384, hidden_size=64, num_hidden_layers=2, intermediate_size=112,
        num_attention_heads=4, max_position_embeddings=LENGTH, rms_norm_eps=1e-6, rope_theta=10000.0,
        **described,
    )  # fmt: skip
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + noise / 4 if "norm" in name else noise / 12)
    model.save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    wanted = ".".join(version("megatron-core").split(".")[:2])
    convert(make_plan(folder / "hf", folder / "megatron", to="torch_dist", megatron_version=wanted))
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats()))
    (folder / "conf" / "train").mkdir(parents=True)
    values = {"folder": folder, "length": LENGTH, "sequences": SEQUENCES, "attention": attention}
    (folder / "conf" / "train" / "tiny.yaml").write_text(TRAIN.format(**values))
    path = folder / "conf" / "tiny.yaml"
    path.write_text(EXPERIMENT.format(**values))
    return path


def of_every_megatron(name):
    return pytest.param(name, marks=pytest.mark.every_megatron) if name in EVERY_MEGATRON else name


@pytest.fixture(scope="module")
def place(request, tmp_path_factory, run_forked):
    """Train everything, or only what the chosen tests of every Megatron ask for; return the folder of it."""
    folder = tmp_path_factory.mktemp("tuning")
    experiment = write_all(folder)
    jobs = [train_job(experiment, folder / name, words) for name, words in TRAININGS.items()]
    # The second run resumes where the first one saved.
    jobs += [
        train_job(experiment, folder / "lora-resumed", [*LORA, f"train.model.train_iters={n}"])
        for n in (2, 3)
    ]
    jobs.append(train_job(experiment, folder / "lora-parts", PARTS))
    bounded = {"no_create_attention_mask_in_dataloader": True, "reset_attention_mask": True}
    two = ["train.model.micro_batch_size=2"]
    jobs.append(train_job(experiment, folder / "full-bounded", two, changes=bounded) | {"bounded": True})
    jobs += [adapted_logits(experiment, folder / f"lora-{name}", words) for name, words in ADAPTED.items()]
    chosen = [item for item in request.session.items if item.path == request.path]
    if all(item.get_closest_marker("every_megatron") for item in chosen):
        jobs = [job for job in jobs if job["name"] in EVERY_MEGATRON]
    run_forked(folder, jobs)
    return folder


def adapted_logits(experiment, folder, words):
    return logits_job(experiment, folder, words, checkpoint=folder / "checkpoints", tokens=TOKENS)


def mean_loss(model, folder):
    """Return the mean loss of all answers' tokens, each chat alone, by transformers and its own masks."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    total, count = 0.0, 0
    for chat in chats():
        out = tokenizer.apply_chat_template(
            openai(chat), chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = torch.tensor([out["input_ids"]]), torch.tensor(out["assistant_masks"][1:])
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(
                model(ids).logits[0, :-1], ids[0, 1:], reduction="none"
            )
        total += float((losses * mask).sum())
        count += int(mask.sum())
    return total / count


def test_the_first_loss_from_published_weights_is_that_of_transformers(place, record_property):
    from transformers import AutoModelForCausalLM

    theirs = mean_loss(AutoModelForCausalLM.from_pretrained(place / "hf").eval(), place)
    ours = curve(place / "full-one")[0][1]
    record_property("worst", f"{abs(ours - theirs):.1e}")
    assert f"in {SEQUENCES} sequences" in (place / "full-one" / "log").read_text(), "each chat once in a step"
    assert abs(ours - theirs) < TOLERANCE


@pytest.mark.parametrize(
    "name", [*(of_every_megatron(name) for name in TRAININGS if name[-4:] != "-one"), "full-bounded"]
)
def test_a_layout_tunes_as_one_process_does(place, name, record_property):
    ours, theirs = curve(place / name), curve(place / f"{name.partition('-')[0]}-one")
    assert len(theirs) == 3
    difference = worst(ours, theirs)
    record_property("worst", f"{difference:.1e}")
    assert difference < TOLERANCE


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_tuning_learns_the_answers(place, kind):
    losses = [loss for _, loss, _ in curve(place / f"{kind}-one")]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.every_megatron
def test_adapters_resume_bit_by_bit(place):
    assert curve(place / "lora-resumed") == curve(place / "lora-one")


@pytest.mark.parametrize("name", [pytest.param("one", marks=pytest.mark.every_megatron), "parts"])
def test_peft_and_the_merged_model_compute_what_megatron_does(name, place, tmp_path, record_property):
    targets, difference = exported_difference(place, place / f"lora-{name}", tmp_path)
    record_property("worst", f"{difference:.1e}")
    assert difference < TOLERANCE
    wanted = {"q_proj", "v_proj", "up_proj", "down_proj"}
    assert targets == (wanted if name == "parts" else wanted | {"k_proj", "o_proj", "gate_proj"})


def exported_difference(place, trained, exported):
    """Export adapters both ways; return their layers, and how far logits are from Megatron's at most."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from flagscale_convert.cli import main

    words = ["adapter", str(trained / "checkpoints"), "--base", str(place / "hf")]
    assert main([*words, str(exported / "peft")]) == 0
    assert main([*words, str(exported / "merged"), "--merge"]) == 0
    ours = load_file(trained / "logits")["logits"]
    base = AutoModelForCausalLM.from_pretrained(place / "hf").eval()
    merged = AutoModelForCausalLM.from_pretrained(exported / "merged").eval()
    with torch.no_grad():
        before, whole = (
            model(torch.tensor(TOKENS)).logits[..., : ours.shape[-1]] for model in (base, merged)
        )
        adapter = PeftModel.from_pretrained(base, exported / "peft").eval()
        beside = adapter(torch.tensor(TOKENS)).logits[..., : ours.shape[-1]]
    assert (before - ours).abs().max() > 0.1, "the adapters do something"
    described = json.loads((exported / "peft" / "adapter_config.json").read_text())
    difference = max(float((theirs - ours).abs().max()) for theirs in (beside, whole))
    return set(described["target_modules"]), difference


def test_a_checkpoint_of_adapters_holds_nothing_else(place):
    from flagscale_convert.locate import open_checkpoint

    source = open_checkpoint(place / "lora-one" / "checkpoints").source
    assert len(source.tensors()) == 2 * 4 * 2, "A and B of four layers in two"
    assert all(
        ".lora." in name for name in (*source.tensors(), *source.optimizer_tensors) if "layers" in name
    )
    whole = open_checkpoint(place / "full-one" / "checkpoints").source
    assert source.optimizer_bytes < whole.optimizer_bytes / 3


EXPERT = [TWO, "+train.system.expert_model_parallel_size=2"]
LATENT = {"one": [], "sequence": SEQUENCE, "expert": EXPERT}


@pytest.fixture(scope="module")
def latent(tmp_path_factory, run_forked):
    """Train adapters of latent attention, and return the folder of it all."""
    folder = tmp_path_factory.mktemp("latent")
    experiment = write_all(folder, "deepseek_v3")
    jobs = [train_job(experiment, folder / name, [*LORA, *words]) for name, words in LATENT.items()]
    jobs += [
        train_job(experiment, folder / "resumed", [*LORA, f"train.model.train_iters={n}"]) for n in (2, 3)
    ]
    jobs.append(adapted_logits(experiment, folder / "one", LORA))
    run_forked(folder, jobs)
    return folder


@pytest.mark.parametrize("name", [name for name in LATENT if name != "one"])
def test_adapters_of_latent_attention_train_as_on_one_process(latent, name, record_property):
    difference = worst(curve(latent / name), curve(latent / "one"))
    record_property("worst", f"{difference:.1e}")
    assert difference < TOLERANCE


def test_adapters_of_latent_attention_resume_bit_by_bit(latent):
    assert curve(latent / "resumed") == curve(latent / "one")


def test_peft_and_the_merged_model_have_the_adapters_of_latent_attention(latent, tmp_path, record_property):
    targets, difference = exported_difference(latent, latent / "one", tmp_path)
    record_property("worst", f"{difference:.1e}")
    assert difference < TOLERANCE
    assert targets == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}


EXPERTS = [*LORA, "+train.model.lora_target_modules=[linear_proj,linear_fc1,linear_fc2]"]
EVERY_STEP = "train.system.checkpoint.save_interval=1"


@pytest.fixture(scope="module")
def experts(tmp_path_factory, run_forked):
    """Train adapters of experts, and return the folder of each kind of model."""
    places = {}
    for kind in ("mixtral", "qwen3_moe"):
        folder = places[kind] = tmp_path_factory.mktemp(kind)
        experiment = write_all(folder, kind)
        jobs = [
            train_job(experiment, folder / "one", [*EXPERTS, EVERY_STEP]),
            adapted_logits(experiment, folder / "one", EXPERTS),
        ]
        if kind == "mixtral":
            jobs.append(train_job(experiment, folder / "expert", [*EXPERTS, *EXPERT]))
            jobs += [
                train_job(
                    experiment, folder / "resumed", [*EXPERTS, *more, f"train.model.train_iters={steps}"]
                )
                for steps, more in ((2, EXPERT), (3, []))
            ]
        run_forked(folder, jobs)
    return places


@pytest.mark.parametrize("name", ["expert", "resumed"])
def test_adapters_of_experts_train_alike_on_any_ranks(experts, name, record_property):
    difference = worst(curve(experts["mixtral"] / name), curve(experts["mixtral"] / "one"))
    record_property("worst", f"{difference:.1e}")
    assert difference < TOLERANCE


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_peft_has_the_adapters_of_experts_and_the_losses_of_training(
    kind, experts, tmp_path, record_property
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from flagscale_convert import export_adapter

    place = experts[kind]
    targets, difference = exported_difference(place, place / "one", tmp_path)
    own = {"w1", "w2", "w3"} if kind == "mixtral" else {"gate_proj", "up_proj", "down_proj"}
    assert targets == {"o_proj", *own}
    for step in (1, 2):
        saved = place / "one" / "checkpoints" / f"iter_{step:07}"
        export_adapter(saved, tmp_path / str(step), base=place / "hf")
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(place / "hf"), tmp_path / str(step)
        )
        theirs = mean_loss(model.eval(), place)
        difference = max(difference, abs(curve(place / "one")[step][1] - theirs))
    record_property("worst", f"{difference:.1e}")
    assert difference < TOLERANCE
