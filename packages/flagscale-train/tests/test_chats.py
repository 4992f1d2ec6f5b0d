"""Chats become the tokens of the tokenizer's own template, with loss on the answers alone; then sequences."""

# ruff: noqa: E501 -- templates are easier to read in one line

import itertools
import json
import random

import pytest

pytest.importorskip("megatron.training", reason="comes with flagscale-train[megatron]")
pytestmark = [pytest.mark.megatron, pytest.mark.filterwarnings("ignore")]

# Jinja drops a newline that follows a tag, so those that count are written out.
HEAD = "{% for message in messages %}<|im_start|>{{ message.role }}{{ '\\n' }}"
INVITE = "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
CHATML = HEAD + "{OPEN}{{ message.content }}<|im_end|>{CLOSE}{{ '\\n' }}{% endfor %}" + INVITE
# As Qwen3's: thoughts of earlier turns are left out, the last answer has some even where it had none.
THINKING = (
    "{% set last = namespace(user=0) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    + HEAD
    + "{% if message.role == 'assistant' %}{OPEN}{% if loop.index0 > last.user %}<think>{{ '\\n\\n' }}</think>{{ '\\n\\n' }}{% endif %}"
    "{{ message.content }}<|im_end|>{CLOSE}{{ '\\n' }}{% else %}{{ message.content }}<|im_end|>{{ '\\n' }}{% endif %}{% endfor %}"
    + INVITE
)
# As Llama 2's: nothing invites, and a blank stands before the end.
BRACKETS = (
    "{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% elif message.role == 'assistant' %}{OPEN} {{ message.content }} <|im_end|>{CLOSE}{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "thinking": THINKING, "brackets": BRACKETS}


def template(name, *, is_marked=False):
    open_, close = ("{% generation %}", "{% endgeneration %}") if is_marked else ("", "")
    text = TEMPLATES[name]
    if is_marked and name == "chatml":
        answer = (
            "{% if message.role == 'assistant' %}" + "{OPEN}{{ message.content }}<|im_end|>{CLOSE}{{ '\\n' }}"
        )
        text = (
            HEAD
            + answer
            + "{% else %}{{ message.content }}<|im_end|>{{ '\\n' }}{% endif %}{% endfor %}"
            + INVITE
        )
    return text.replace("{OPEN}", open_).replace("{CLOSE}", close)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    from flagscale_train.data import train_tokenizer

    folder = tmp_path_factory.mktemp("chats")
    (folder / "corpus.txt").write_text("what is it? it is one more than that, be brief, yes or no " * 20)
    train_tokenizer([str(folder / "corpus.txt")], folder / "tok", vocab_size=300)
    made = AutoTokenizer.from_pretrained(folder / "tok")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template("chatml")
    made.save_pretrained(folder / "chat")
    return made


@pytest.fixture
def renderer(tokenizer):
    from flagscale_train.worker.chats import Renderer

    def make(chat_template):
        tokenizer.chat_template = chat_template
        return Renderer(tokenizer)

    return make


def conversation(chance):
    turns = []
    for _ in range(chance.randrange(1, 4)):
        turns.append({"role": "user", "content": chance.choice(["is it?", "what is é 𝄞?", "more\n"])})
        turns.append({"role": "assistant", "content": chance.choice(["yes", "it is\n\nthat", "no 𝄞", "a"])})
    return turns


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_those_that_transformers_marks(name, renderer, tokenizer):
    ours = renderer(template(name))
    chance = random.Random(3)
    for _ in range(40):
        turns = conversation(chance)
        ids, mask = ours.encode({"messages": turns})
        theirs = tokenizer.apply_chat_template(
            turns,
            chat_template=template(name, is_marked=True),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert ids == list(theirs["input_ids"])
        assert [int(each) for each in mask] == list(theirs["assistant_masks"])
        assert 0 < sum(mask) < len(mask)
    assert renderer(template(name, is_marked=True)).encode({"messages": turns}) == (ids, mask)


def test_both_shapes_say_the_same_and_weight_0_is_not_learned(renderer, tokenizer):
    ours = renderer(template("chatml"))
    turns = [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": "yes"}] * 2
    shared = [{"from": "human", "value": "is it?"}, {"from": "gpt", "value": "yes"}] * 2
    openai = ours.encode({"messages": turns})
    assert ours.encode({"conversations": shared}) == openai
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    assert ours.encode({"messages": parts}) == openai
    ids, mask = ours.encode({"messages": [turns[0], {**turns[1], "weight": 0}, *turns[2:]]})
    assert ids == openai[0]
    assert sum(mask) == sum(openai[1]) / 2
    assert (
        tokenizer.decode([token for token, counts in zip(ids, mask, strict=True) if counts])
        == "yes<|im_end|>"
    )


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ([], "an object with messages or conversations is expected"),
        ({"text": "a"}, r"has neither messages nor conversations \(it has: text\)"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no answer of an assistant"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "begins with an answer"),
        ({"messages": [{"role": "user", "content": 3}]}, "content: int: a text is expected"),
        ({"conversations": [{"from": "me", "value": "a"}]}, "from: me: must be one of human"),
    ],
)
def test_what_is_no_chat_is_told_apart(record, said, renderer, tmp_path):
    from flagscale_train.worker.chats import Chats
    from flagscale_train.worker.refusal import Refusal

    path = tmp_path / "chats.jsonl"
    path.write_text("\n" + json.dumps(record) + "\n")
    with pytest.raises(Refusal, match=f"chats.jsonl:2: .*{said}"):
        Chats.render(path, renderer(template("chatml")), tmp_path / "cache")
    assert list(tmp_path.iterdir()) == [path], "nothing is left half written"


def test_a_template_without_an_end_is_refused(renderer):
    from flagscale_train.worker.refusal import Refusal

    with pytest.raises(Refusal, match="writes nothing after an answer"):
        renderer("{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}")


def test_packing_wastes_little_and_forgets_nobody():
    from flagscale_train.worker.packing import pack

    chance = random.Random(7)
    sizes = [chance.randrange(1, 60) for _ in range(500)]
    boxes = pack(sizes, 64)
    assert sorted(item for box in boxes for item in box) == list(range(500))
    assert all(sum(sizes[item] for item in box) <= 64 for box in boxes)
    assert len(boxes) <= 1.02 * sum(sizes) / 64 + 1
    assert pack([64, 64], 64) == [[0], [1]]
    assert pack([], 64) == []


def test_sequences_keep_chats_apart_and_come_in_the_same_order_again(renderer, tmp_path):
    import torch
    from megatron.core.datasets.utils import Split

    from flagscale_train.worker.chats import Chats
    from flagscale_train.worker.packing import PackedChats

    chance = random.Random(1)
    lines = [json.dumps({"messages": conversation(chance)}) for _ in range(30)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    Chats.render(tmp_path / "chats.jsonl", renderer(template("chatml")), tmp_path / "cache")
    chats = Chats.whole(tmp_path / "cache")
    assert len(chats) == 30

    def packed(**more):
        values = {"length": 160, "num_samples": 1000, "seed": 5, "masks": True, **more}
        return PackedChats([(chats, range(30))], Split.train, **values)

    ours, bounds = packed(), packed(masks=False)
    count = ours.num_sequences
    assert len(ours) == 1000
    seen = []
    for index in range(count):
        sample, other = ours[index], bounds[index]
        ends = torch.unique_consecutive(other["cu_seqlens"]).tolist()
        visible = ~sample["attention_mask"][0]
        for first, last in itertools.pairwise(ends):
            assert torch.equal(
                visible[first:last, first:last], torch.ones(last - first, last - first).tril().bool()
            )
            assert not visible[first:last, :first].any()
            assert not visible[first:last, last:].any()
            assert sample["position_ids"][first:last].tolist() == list(range(last - first))
            here = [sample[name][first:last].tolist() for name in ("tokens", "labels", "loss_mask")]
            if any(here[-1]):
                seen.append(here)
    whole = [chats[index] for index in range(30)]
    # A place counts where the token that it predicts is of an answer.
    assert sorted(seen) == sorted(
        [ids[:-1].tolist(), ids[1:].tolist(), counts[1:].tolist()] for ids, counts in whole
    )
    order = [ours[index]["tokens"].tolist() for index in range(2 * count)]
    assert order[:count] != order[count:], "every epoch has an order of its own"
    assert sorted(order[:count]) == sorted(order[count:])
    again = packed()
    assert [again[index]["tokens"].tolist() for index in range(count, 2 * count)] == order[count:]


def test_answers_behind_the_cut_are_left_out(renderer, tmp_path):
    from megatron.core.datasets.utils import Split

    from flagscale_train.worker.chats import Chats
    from flagscale_train.worker.packing import PackedChats

    chats = [
        [{"role": "user", "content": "is " * 200}, {"role": "assistant", "content": "yes"}],
        [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": "yes " * 200}],
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    Chats.render(tmp_path / "chats.jsonl", renderer(template("chatml")), tmp_path / "cache")
    files = [(Chats.whole(tmp_path / "cache"), range(2))]
    made = PackedChats(files, Split.train, length=64, num_samples=None, seed=1, masks=True)
    assert (made.num_chats, made.num_cut, made.num_dropped, len(made)) == (1, 1, 1, 1)
