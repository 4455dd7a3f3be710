"""Tiny, randomly initialised language models with a word tokenizer, for tests that need a real forward pass."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from polytope_hsae.data.concepts import Child, Concepts, Parent
from polytope_hsae.lm import LanguageModel

VOCAB = 64
WIDTH = 16


def tokenizer(prefix: str = "w") -> PreTrainedTokenizerFast:
    """Words `w1` … `w63` are the tokens 1 … 63; 0 starts a document."""
    vocab = {"<s>": 0, **{f"{prefix}{i}": i for i in range(1, VOCAB)}}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<s>")


def model(kind: str, seed: int = 0) -> PreTrainedModel:
    """`llama` (tied, RMSNorm), `neox` (untied, LayerNorm) or `gemma2` (tied, logit soft-cap); large weights."""
    torch.manual_seed(seed)
    shared: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    grouped = {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    if kind == "llama":
        made: PreTrainedModel = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **grouped, **shared))
    elif kind == "neox":
        made = GPTNeoXForCausalLM(GPTNeoXConfig(tie_word_embeddings=False, **shared))
    else:
        made = Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=2.0, sliding_window=16, **grouped, **shared))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval()


def language_model(kind: str = "llama", seed: int = 0) -> LanguageModel:
    """A tiny model, wrapped."""
    return LanguageModel(model(kind, seed), tokenizer(), name=f"tiny-{kind}", has_head=True)


def save(folder: Path, kind: str = "llama", seed: int = 0) -> Path:
    """Write a tiny model and its tokenizer in Hugging Face format."""
    model(kind, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def concepts(n_parents: int = 3, children: int = 2) -> Concepts:
    """Parents p0 …, each child with three words (two train, one val or test) of one token, from token 1 up."""
    parents, token = [], 1
    for p in range(n_parents):
        made = []
        for c in range(children):
            words = [f"w{token + i}" for i in range(3)]
            held_out = "val" if c % 2 == 0 else "test"
            folds = {"train": words[:2], "val": [], "test": []}
            folds[held_out] = words[2:]
            made.append(Child(f"c{p}{c}", None, folds, {w: [token + i] for i, w in enumerate(words)}))
            token += 3
        parents.append(Parent(f"p{p}", None, made))
    return Concepts(parents)
