"""A key explained: value, place, engine option, and where it may stand."""

import json

import pytest

from flagscale_config import ConfigError, cli, explain


def one(source, key, *overrides):
    (found,) = explain(source, key, overrides)
    return found


def test_an_option_is_explained_by_its_engine(tiny):
    found = one(tiny, "lr")
    assert found.key == "train.model.optimizer.lr_scheduler.lr"
    assert (found.value, str(found.origin)) == (0.001, "conf/train/tiny.yaml:14:30")
    assert found.words == ("--lr", "0.001")
    assert found.engine.startswith("megatron ")
    assert found.type == "float"
    assert "learning rate" in found.help
    assert found.sections[0] == "train.model.optimizer.lr_scheduler"
    assert found.is_set
    assert found.problems == ()


@pytest.mark.parametrize(
    "key",
    [
        "train.model.num_layers",
        "train.options.num_layers",
        "model.num_layers",
        "num_layers",
        "num-layers",
        "train.num_layers",
    ],
)
def test_a_key_may_be_given_in_any_form(key, tiny):
    assert one(tiny, key).key == "train.model.num_layers"


@pytest.mark.parametrize("key", ["experiment.runner.nnodes", "runner.nnodes", "nnodes"])
def test_keys_of_flagscale_are_explained_by_the_contract(key, tiny):
    found = one(tiny, key)
    assert (found.key, found.value, found.engine) == ("experiment.runner.nnodes", 1, "")
    assert found.help.startswith("Number of hosts")
    assert found.sections == ("experiment.runner",)


def test_a_key_that_is_not_set_has_its_default(tiny):
    found = one(tiny, "ffn_hidden_size")
    assert (found.key, found.origin, found.is_set) == ("train.model.ffn_hidden_size", None, False)
    assert one(tiny, "ray_port").value == 6379
    assert one(tiny, "no_rope_fusion").value is False


def test_overrides_and_problems_are_shown(tiny):
    found = one(tiny, "seq_length", "train.model.seq_length=999999")
    assert str(found.origin) == "override 'train.model.seq_length=999999'"
    assert [problem.code for problem in found.problems] == ["config/arithmetic"]


def test_rules_that_look_at_an_option_are_named(tiny):
    assert any("batches" in rule for rule in one(tiny, "global_batch_size").checks)
    assert one(tiny, "tensorboard_dir").checks == ()


def test_incomplete_files_are_explained_too(edited):
    source = edited("conf/train/tiny.yaml", "data_path: corpus", "data_path: ???")
    found = one(source, "data_path")
    assert (found.value, found.words) == ("???", ())
    assert [problem.code for problem in found.problems] == ["config/required"]
    assert one(source, "hidden_size").value == 64


def test_each_serve_item_is_explained(project):
    project(
        {
            "s.yaml": """
            experiment: {exp_name: x, task: {type: serve}}
            serve:
              - {serve_id: a, engine_args: {model: A, port: 1}}
              - {serve_id: b, engine_args: {model: B, no-enable-prefix-caching: true}}
            """
        }
    )
    assert [(found.key, found.value) for found in explain("s.yaml", "model")] == [
        ("serve.0.engine_args.model", "A"),
        ("serve.1.engine_args.model", "B"),
    ]
    found = one("s.yaml", "enable_prefix_caching")
    assert (found.value, found.words) == (False, ("--no-enable-prefix-caching",))


def test_secrets_are_masked(tiny):
    found = one(tiny, "HF_TOKEN", "+experiment.envs.HF_TOKEN=verysecret")
    assert "verysecret" not in json.dumps(found.to_dict())
    assert found.value == "***"


def test_unknown_keys_are_refused_with_the_nearest(tiny, capsys):
    with pytest.raises(ConfigError, match=r"did you mean train\.model\.hidden_size") as caught:
        explain(tiny, "hiden_size")
    assert caught.value.problems[0].suggestion == "train.model.hidden_size"
    assert cli.main(["explain", tiny, "zzzzz"]) == 2
    assert "`flagscale-config show FILE` lists the keys" in capsys.readouterr().err


def test_the_command_prints_it(tiny, capsys):
    assert cli.main(["explain", tiny, "num_layers", "train.model.num_layers=4"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "train.model.num_layers: 4"
    assert out[1] == "  from       override 'train.model.num_layers=4'"
    assert "  becomes    --num-layers 4" in out
    assert cli.main(["explain", tiny, "num_layers", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["words"] == ["--num-layers", "2"]
    assert cli.main(["explain", tiny, "num_layers", "hidden_size"]) == 2
    assert "one key" in capsys.readouterr().err
