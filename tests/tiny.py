"""Tiny, randomly initialised language models for tests that need a real forward pass.

With a word tokenizer of 64 tokens (`model`, `save`), or of many families with a real tokenizer (`save_family`).
"""

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
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
from polytope_hsae.data.corpus import PACKAGED_TOKENIZER, PACKAGED_TOKENS
from polytope_hsae.data.wordnet import load_wordnet, single_words
from polytope_hsae.fileio import read_tensors
from polytope_hsae.lm import LanguageModel

VOCAB = 64
WIDTH = 16
CAUSAL_FAMILIES = ("llama", "gpt_neox", "gpt2", "gemma2", "qwen2")
OF_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "gpt_neox": {"tie_word_embeddings": False},
    "gpt2": {},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 32, "final_logit_softcapping": 10.0},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "bert": {},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 32},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 32},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "phi": {},
    "bloom": {},
    "mpt": {"max_seq_len": 128},
    "falcon": {"new_decoder_architecture": False},
    "olmo2": {"num_key_value_heads": 2},
    "cohere": {"num_key_value_heads": 2},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 4.0},
    "gpt_oss": {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"state_size": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "electra": {"embedding_size": 16},
}
ENCODERS = ("bert", "electra")


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


def family(kind: str, tokenizer: PreTrainedTokenizerFast, *, context: int = 128, seed: int = 0) -> PreTrainedModel:
    """A tiny model of a family, encoders as masked LMs and all others causal.

    It has an embedding for 8 tokens more than the tokenizer's, and reads at most `context` tokens.
    """
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind != "gpt2":
        sizes["intermediate_size"] = 64
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer) + 8,
        max_position_embeddings=context,
        initializer_range=0.1,
        **sizes,
        **special,
        **OF_FAMILY[kind],
    )
    torch.manual_seed(seed)
    return (AutoModelForMaskedLM if kind in ENCODERS else AutoModelForCausalLM).from_config(config).eval()


def packaged_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of textbook-lm-9m."""
    return AutoTokenizer.from_pretrained(str(PACKAGED_TOKENIZER))


def save_family(
    folder: Path, kind: str, tokenizer: PreTrainedTokenizerFast | None = None, *, context: int = 128, **options: Any
) -> Path:
    """Write a tiny model of a family in Hugging Face format, with a tokenizer or a copy of the packaged one.

    `options` go to `save_pretrained`; a `dtype` is that of the weights.
    """
    made = family(kind, tokenizer or packaged_tokenizer(), context=context)
    made.to(options.pop("dtype", torch.float32)).save_pretrained(folder, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    else:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(PACKAGED_TOKENIZER / file, folder)
    return folder


def packaged_texts(count: int) -> list[str]:
    """The first documents of the packaged sample, as text."""
    tensors, _ = read_tensors(PACKAGED_TOKENS)
    starts = tensors["doc_start"][: count + 1].tolist()
    rows = [tensors["tokens"][first:last].tolist() for first, last in pairwise(starts)]
    return packaged_tokenizer().batch_decode(rows, skip_special_tokens=True)


def train_tokenizer(size: int = 6000) -> PreTrainedTokenizerFast:
    """Of pieces of words, as BERT's, with many nouns of one token."""
    texts = packaged_texts(400)
    known = set(" ".join(texts).split())
    texts += 20 * [f" {word}" for word in single_words(load_wordnet("noun")) if word in known]
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    backend = Tokenizer(models.WordPiece(unk_token=special["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=list(special.values()), show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


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
