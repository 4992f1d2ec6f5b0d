import pytest

from flagscale_config.masking import is_secret, masked


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
