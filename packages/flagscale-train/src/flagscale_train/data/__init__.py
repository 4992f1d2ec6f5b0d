"""Data preparation: text to a tokenizer, text to Megatron's `.bin/.idx` files. Needs no torch."""

from flagscale_train.data.datasets import DatasetFacts, inspect, merge
from flagscale_train.data.encode import tokenize
from flagscale_train.data.facts import Tokenized
from flagscale_train.data.vocabulary import TrainedTokenizer, train_tokenizer

__all__ = [
    "DatasetFacts",
    "Tokenized",
    "TrainedTokenizer",
    "inspect",
    "merge",
    "tokenize",
    "train_tokenizer",
]
