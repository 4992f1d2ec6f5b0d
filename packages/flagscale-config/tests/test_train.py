"""FlagScale's train section becomes Megatron options: sections dropped, spellings unified, values typed."""

import pytest

from flagscale_config import check, load


def options(source: str, *overrides: str) -> dict:
    return dict(load(source, overrides).train.options)


def lines(source: str, *overrides: str, severity: str = "error") -> list[str]:
    return [str(problem) for problem in check(source, overrides) if problem.severity == severity]


def one(source: str, *overrides: str, severity: str = "error") -> str:
    (line,) = lines(source, *overrides, severity=severity)
    return line


def test_sections_are_dropped_and_values_typed(tiny):
    experiment = load(tiny)
    assert experiment.train.options == {
        "tensor_model_parallel_size": 1,
        "save_interval": 10,
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "seq_length": 128,
        "max_position_embeddings": 128,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "train_iters": 10,
        "norm_epsilon": 1e-5,
        "lr": 1e-3,
        "data_path": ("corpus",),
    }
    assert (experiment.train.micro_batch_size, experiment.train.global_batch_size) == (1, 4)
    assert experiment.train.train_iters == 10
    assert experiment.train.parallelism.model_size == 1


@pytest.mark.parametrize("section", ["system", "model", "data"])
@pytest.mark.parametrize("name", ["lr-decay-style", "lr_decay_style"])
def test_an_option_may_stand_in_any_section_in_either_spelling(section, name, tiny):
    assert options(tiny, f"+train.{section}.some.name.{name}=cosine")["lr_decay_style"] == "cosine"


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ("seed=7", "seed", 7),
        ("seed='7'", "seed", 7),
        ("seed=1e3", "seed", 1000),
        ("seed=7.0", "seed", 7),
        ("min_lr=1e-6", "min_lr", 1e-6),
        ("min_lr='1e-6'", "min_lr", 1e-6),
        ("min_lr=0", "min_lr", 0.0),
        ("split=1", "split", "1"),
        ("split='100,0,0'", "split", "100,0,0"),
        ("bf16=true", "bf16", True),
        ("bf16=false", "bf16", False),
        ("bf16='true'", "bf16", True),
        ("no_rope_fusion=true", "no_rope_fusion", True),
        ("no_rope_fusion=false", "no_rope_fusion", False),
        ("rope_fusion=false", "no_rope_fusion", True),
        ("apply_rope_fusion=false", "no_rope_fusion", True),
        ("apply-rope-fusion=true", "no_rope_fusion", False),
        ("disable_tp_comm_overlap_ag=true", "no_tp_comm_overlap_ag", True),
        ("no_rl_partial_rollouts=true", "rl_partial_rollouts", False),
        ("persistent_save_interval=10", "save_interval", 10),
        ("mrope_section=[16,24,24]", "mrope_section", (16, 24, 24)),
        ("moe_layer_freq='[0]+[1]*26'", "moe_layer_freq", "[0]+[1]*26"),
        ("moe_layer_freq=[0,1,1]", "moe_layer_freq", "[0,1,1]"),
        ("moe_layer_freq=2", "moe_layer_freq", "2"),
        ("attention_backend=flash", "attention_backend", "flash"),
        ("rampup_batch_size=[32,32,2000000]", "rampup_batch_size", (32, 32, 2000000)),
        ("profile_ranks=7", "profile_ranks", (7,)),
    ],
)
def test_values_become_what_megatron_parses(written, key, value, tiny):
    found = options(tiny, f"++train.model.{written}")[key]
    assert found == value
    assert type(found) is type(value)


def test_data_paths_are_split_at_blanks_as_a_shell_did(tiny):
    assert options(tiny, "train.data.data_path='0.5 /a 0.5 /b'")["data_path"] == ("0.5", "/a", "0.5", "/b")
    assert options(tiny, "train.data.data_path=[0.5,/a b]")["data_path"] == ("0.5", "/a b")


@pytest.mark.parametrize("value", ["null", "None", "'None'"])
def test_null_and_the_word_none_mean_not_given(value, tiny):
    assert "load" not in options(tiny, f"++train.system.checkpoint.load={value}")


def test_the_word_none_is_noted(tiny):
    note = one(tiny, "++train.system.load=None", severity="note")
    assert note.startswith("override '++train.system.load=None': train.system.load: ")
    assert note.endswith('the text "None" is read as null; write null')


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("seed=1.5", "must be an integer (1.5 given)"),
        ("seed=true", "must be an integer (True given)"),
        ("seed=[1]", "takes one integer ([1] given)"),
        ("seed=many", "must be an integer ('many' given)"),
        ("lr=fast", "must be a number ('fast' given)"),
        ("lr=nan", "must be a number (nan given)"),
        ("bf16=1", "must be true or false (1 given)"),
        ("save=true", "must be text (True given); quote it if you mean the word"),
        ("mrope_section=[1,x]", "must be an integer ('x' given)"),
        ("lr_decay_style=cosin", "must be one of "),
        ("iterations_to_skip=[]", "takes at least one value"),
        ("optimizer=adm", "did you mean adam?"),
    ],
)
def test_wrong_values_say_what_is_allowed(written, expected, tiny):
    line = next(line for line in lines(tiny, f"++train.model.{written}") if expected in line)
    assert line.startswith(f"override '++train.model.{written}': train.model.")


def test_wrong_values_in_files_have_their_line(edited):
    source = edited("conf/train/tiny.yaml", "num_layers: 2", "num_layers: two")
    assert one(source) == (
        "conf/train/tiny.yaml:5:3: train.model.num_layers: must be an integer ('two' given)"
    )


def test_an_unknown_key_names_the_nearest(edited):
    source = edited("conf/train/tiny.yaml", "tensor_model_parallel_size", "tensor_model_paralel_size")
    assert one(source) == (
        "conf/train/tiny.yaml:2:3: train.system.tensor_model_paralel_size: unknown key; did you mean "
        "tensor_model_parallel_size?"
    )


def test_a_misspelt_required_option_is_one_error(edited):
    source = edited("conf/train/tiny.yaml", "micro_batch_size", "micro_batch_sise")
    assert one(source).endswith("micro_batch_sise: unknown key; did you mean micro_batch_size?")
    source = edited("conf/train/tiny.yaml", "hidden_size", "hiden_size")
    assert one(source).endswith("hiden_size: unknown key; did you mean hidden_size?")


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("train.model.nnodes", "it belongs under experiment.runner"),
        ("train.lr", "unknown key; it belongs under train.model.optimizer.lr_scheduler"),
        ("train.modle", "unknown key; did you mean model?"),
        ("train.model.gpu_memory_utilization", "it belongs under serve[].engine_args"),
        ("experiment.lr", "it belongs under train.model.optimizer.lr_scheduler"),
        ("experiment.nnodes", "it belongs under experiment.runner"),
        ("experiment.runner.exp_name", "it belongs under experiment"),
        ("experiment.runer", "did you mean runner?"),
        ("experiment.runner.deploy.prot", "did you mean port?"),
        ("experiment.task.kind", "unknown key; allowed: backend, entrypoint, type"),
        ("lr", "it belongs under train.model.optimizer.lr_scheduler"),
        ("experimnt", "did you mean experiment?"),
    ],
)
def test_unknown_keys_anywhere_say_where_they_belong(where, expected, tiny):
    line = one(tiny, f"+{where}=1")
    assert line.startswith(f"override '+{where}=1': {where}: unknown key")
    assert expected in line


def test_one_option_in_two_places_must_have_one_value(edited):
    source = edited("conf/train/tiny.yaml", "num_layers: 2", "num_layers: 2\n          lr: 2e-3")
    assert one(source) == (
        "conf/train/tiny.yaml:15:30: train.model.optimizer.lr_scheduler.lr: given twice: 0.001 here, "
        "0.002 as train.model.lr at conf/train/tiny.yaml:6:3; keep one"
    )
    same = edited("conf/train/tiny.yaml", "num_layers: 2", "num_layers: 2\n          lr: 0.001")
    assert options(same)["lr"] == 1e-3


def test_contradicting_switches_are_refused(tiny):
    assert "given twice" in one(tiny, "+train.model.no_rope_fusion=true", "+train.data.rope_fusion=true")
    name = "yarn_correction_range_round_to_int"
    assert f"contradicts no_{name}" in one(tiny, f"+train.model.{name}=true", f"+train.model.no_{name}=true")


def test_flagscale_options_are_renamed_dropped_or_refused(tiny):
    assert options(tiny, "+train.data.tokenizer.tokenizer_path=/t")["tokenizer_model"] == "/t"
    found = options(tiny, "+train.data.tokenizer.tokenizer_type=QwenTokenizerFS")
    assert found["tokenizer_type"] == "HuggingFaceTokenizer"
    dropped = one(tiny, "+train.data.tokenizer.legacy_tokenizer=true", severity="note")
    assert "has no effect: Megatron 0.19 has one tokenizer implementation" in dropped
    for name in ("multiple_of", "engram_seed", "norm_init_weight"):
        assert "is not an option of Megatron 0.19" in one(tiny, f"+train.model.{name}=1")
    assert "contradict" not in "".join(lines(tiny, "+train.data.tokenizer_path=/t"))
    both = one(tiny, "+train.data.tokenizer_path=/t", "+train.data.tokenizer_model=/u")
    assert "given twice" in both


def test_extra_args_go_through_verbatim(tiny):
    assert load(tiny, ["+train.extra_args=[--my-flag,3]"]).train.extra_args == ("--my-flag", "3")
    mapping = load(tiny, ["+train.extra_args={my_flag:true,other:[1,2],off:false,text:a b}"]).train.extra_args
    assert mapping == ("--my-flag", "--other", "1", "2", "--text", "a b")
    assert "must be a list of words or a mapping" in one(tiny, "+train.extra_args=word")


def test_sections_must_be_mappings(tiny):
    assert "must be a mapping ('x' given)" in lines(tiny, "~train.data", "+train.data=x")[0]
    assert one(tiny, "train=[1]").endswith(
        "train: is a folder of files; choose one of them by name; available: tiny"
    )


def test_a_task_section_must_be_a_mapping(project):
    project({"e.yaml": "experiment: {exp_name: a, task: {type: train, backend: megatron}}\ntrain: [1]\n"})
    assert "train: must be a mapping of system, model and data ([1] given)" in one("e.yaml")


def test_a_task_without_its_section_says_so(tiny):
    assert "there is no `train` section; name its file in defaults (- train: NAME)" in one(tiny, "~train")


def test_a_backend_belongs_to_a_type_of_task(tiny):
    line = one(tiny, "experiment.task.type=rl", "++rl={}")
    assert "megatron is no backend of rl tasks (it is one of train); allowed: verl" in line


def test_origins_of_options_are_found_under_any_name(tiny):
    experiment = load(tiny, ["train.model.num_layers=4"])
    assert str(experiment.origin("train.options.lr")) == "conf/train/tiny.yaml:14:30"
    assert str(experiment.origin("train.model.optimizer.lr_scheduler.lr")) == "conf/train/tiny.yaml:14:30"
    assert experiment.origin("train.options.num_layers").override == "train.model.num_layers=4"
    assert str(experiment.origin("experiment.exp_name")) == "conf/tiny.yaml:3:3"
