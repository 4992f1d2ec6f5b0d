"""Make a random Qwen3 with a byte-level tokenizer, and say what it answers; runs in the engine's own Python.

Usage: tiny_model.py DIR PROMPT NUM_TOKENS [DIR ...]

Each further directory gets a model with other numbers. What a model answers is in `expected.json` beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
    )


def make_model(tokenizer, seed):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.5,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config).to(torch.float32)
    # Only letters can win: half a UTF-8 character is spelled differently by every engine.
    letters = set(tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz")))
    others = [i for i in range(len(tokenizer)) if i not in letters]
    with torch.no_grad():
        model.lm_head.weight[others] = 0
    return model


def main():
    first, prompt, num_tokens, *others = sys.argv[1:]
    for seed, folder in enumerate([first, *others], start=7):
        write(Path(folder), seed, prompt, int(num_tokens))


def write(folder, seed, prompt, num_tokens):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    said = [{"role": "user", "content": prompt}]
    asked = {
        "completion": prompt,
        "chat": tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False),
    }
    answers = {}
    for name, text in asked.items():
        ids = tokenizer(text, return_tensors="pt").input_ids
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
        )
        answers[name] = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    (folder.parent / "expected.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
