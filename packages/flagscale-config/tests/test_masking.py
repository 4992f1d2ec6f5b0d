import pytest

from flagscale_config import ConfigError, check, cli, load
from flagscale_config.errors import Origin, Problem
from flagscale_config.masking import is_secret, masked, masked_line, masked_override, masked_text


@pytest.mark.parametrize(
    "key",
    [
        "wandb_api_key",
        "WANDB_API_KEY",
        "api_key",
        "api-key",
        "apikey",
        "hf_token",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "GITHUB_TOKEN",
        "CI_JOB_TOKEN",
        "token",
        "access_token",
        "aws_secret_access_key",
        "AWS_SECRET_ACCESS_KEY",
        "client_secret",
        "password",
        "DB_PASSWORD",
        "passwd",
        "private_key",
        "credentials",
        "PGPASSWORD",
        "MYSQL_PWD",
        "clientSecret",
        "accessToken",
        "Authorization",
        "SESSION_COOKIE",
        "signing_key",
        "AWS_SESSION_TOKEN",
        "GITHUB_PAT",
        "passphrase",
    ],
)
def test_secrets_are_recognised(key):
    assert is_secret(key)


@pytest.mark.parametrize(
    "key",
    [
        "tokenizer",
        "tokenizer_path",
        "max_tokens",
        "pad_token",
        "fim_prefix_token",
        "max_num_batched_tokens",
        "vocab_size",
        "keyword",
        "key",
        "action_key",
        "state_key",
        "author",
        "OMP_NUM_THREADS",
        "skip_tokenizer_init",
        "PWD",
        "allow_ambiguous_pad_tokens",
        "num_speculative_tokens",
        "image_token",
        "vision_start_token",
        "ssl_keyfile",
        "compass",
    ],
)
def test_ordinary_keys_are_not(key):
    assert not is_secret(key)


def test_masking_keeps_the_shape():
    tree = {"a": {"api_key": ["x", "y"], "b": 1, "token": None}, "l": [{"password": "p"}], "c": ("t",)}
    assert masked(tree) == {
        "a": {"api_key": "***", "b": 1, "token": None},
        "l": [{"password": "***"}],
        "c": ["t"],
    }


SECRET = "q7Kp-Zz81-wXy"


@pytest.mark.parametrize(
    "text",
    [
        f"https://me:{SECRET}@host/x",
        f"postgresql://me:a@{SECRET}@host/db",
        f"https://{SECRET}@github.com/x",
        f"Authorization: Bearer {SECRET}",
        f"curl -H 'Authorization: Basic {SECRET}' http://x",
        f"{{'Authorization': 'Bearer {SECRET}'}}",
        f"export HF_TOKEN={SECRET}; python x.py",
        f"python x.py --api-key {SECRET} --port 1",
        f"python x.py --api-key={SECRET}",
        f"http://host/x?access_token={SECRET}&y=1",
        f"Bearer {SECRET}",
    ],
)
def test_secrets_in_texts_are_masked(text):
    assert SECRET not in masked_text(text)
    assert "***" in masked_text(text)
    assert SECRET not in str(masked({"command": text, "list": [text]}))


@pytest.mark.parametrize(
    "text",
    [
        "did you mean api_key?",
        "git clone ssh://git@host/x",
        "a: 1, b=2",
        "token parallel 8",
        "multi-token prediction",
        "basic training",
    ],
)
def test_other_texts_stay(text):
    assert masked_text(text) == text


def test_a_secret_is_masked_wherever_its_value_turns_up():
    tree = {"envs": {"HF_TOKEN": SECRET}, "cmd": f"login {SECRET} now", "words": ["--api-key", "short", "x"]}
    assert masked(tree) == {
        "envs": {"HF_TOKEN": "***"},
        "cmd": "login *** now",
        "words": ["--api-key", "***", "x"],
    }


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        (f"experiment.envs.HF_TOKEN={SECRET}", "experiment.envs.HF_TOKEN=***"),
        (f"+experiment.envs.DB_PASSWORD='{SECRET} and more'", "+experiment.envs.DB_PASSWORD=***"),
        (f"experiment.envs={{HF_TOKEN:{SECRET},A:b}}", "experiment.envs={HF_TOKEN:***,A:b}"),
        ("a.b=c", "a.b=c"),
        ("~a.token", "~a.token"),
    ],
)
def test_overrides_are_masked(override, shown):
    assert masked_override(override) == shown
    assert str(Origin(override=override)) == f"override '{shown}'"


@pytest.mark.parametrize(
    "text",
    [
        f"envs: {{A: 1, HF_TOKEN: {SECRET}, B: 2}}",
        f"api_key: {SECRET}, and more",
        f"'api_key': '{SECRET}'",
        f"private_key: |\n  first\n  {SECRET}\nother: 1",
        f"api_key:\n- {SECRET}\n",
        f"api_key:\n  - {SECRET}\n",
        f"tokens:\n  access_token: >-\n    {SECRET}\n",
        f"url: https://me:{SECRET}@host",
    ],
)
def test_lines_of_a_file_are_masked(text):
    lines = text.split("\n")
    shown = [masked_line(lines, index) for index in range(len(lines))]
    assert SECRET not in "\n".join(shown)
    assert any("***" in line for line in shown)


@pytest.mark.parametrize("given", [SECRET, [SECRET], {"a": SECRET}, 12345678])
def test_a_problem_never_holds_a_secret(given):
    problem = Problem(
        code="config/value", key="serve.0.api_key", message=f"odd ({given!r} given)", given=given
    )
    for shown in (str(problem), str(problem.to_dict()), repr(problem), str(ConfigError([problem]))):
        assert SECRET not in shown
        assert "12345678" not in shown
    assert problem.given == "***"


def test_no_verb_prints_a_secret(project, capsys):
    project(
        {
            "s.yaml": f"""
            experiment:
              exp_name: x
              task: {{type: serve}}
              envs: {{HF_TOKEN: {SECRET}, PROXY: "https://me:{SECRET}@proxy"}}
              cmds: {{before_start: "export WANDB_API_KEY={SECRET}"}}
            serve:
              - serve_id: m
                engine_args: {{model: A, api_key: {SECRET}, hf_token: {SECRET}}}
            """
        }
    )
    override = f"+experiment.envs.DB_PASSWORD={SECRET}"
    wrong = f"experiment.envs.HF_TOKEN={{a: {SECRET}}}"
    for words in (
        ["check", "s.yaml", override, wrong, "--format", "full"],
        ["check", "s.yaml", override, wrong, "--json"],
        ["show", "s.yaml", override, "--origin", "--all"],
        ["show", "s.yaml", override, "--origin", "--json"],
        ["explain", "s.yaml", "HF_TOKEN", override],
        ["explain", "s.yaml", "DB_PASSWORD", override, "--json"],
        ["explain", "s.yaml", "api_key", "--json"],
        ["explain", "s.yaml", "hf_token"],
        ["explain", "s.yaml", "before_start"],
        ["diff", "s.yaml", "s.yaml", "-b", override, "-b", "~experiment.envs.PROXY"],
        ["diff", "s.yaml", "s.yaml", "-b", override, "--json"],
        ["migrate", "s.yaml"],
        ["check", "s.yaml", f"HF_TOKEN={SECRET}", f"experiment.envs.HF_TOKEN={SECRET} ["],
    ):
        cli.main(words)
        captured = capsys.readouterr()
        assert SECRET not in captured.out + captured.err, words
        assert captured.out + captured.err


def test_origins_and_problems_of_the_library_are_masked(tiny):
    override = f"+experiment.envs.HF_TOKEN={SECRET}"
    assert SECRET not in str(load(tiny, [override]).origin("envs.HF_TOKEN"))
    assert SECRET not in repr(check(tiny, [override, f"experiment.envs.NO_TOKEN={SECRET}"]))
