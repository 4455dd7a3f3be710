"""Stores, models, concepts and codes in memory, of which everything is known."""

import numpy as np
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from polytope_hsae.data.store import FORMAT, LABELS
from polytope_hsae.evaluation.row_codes import SparseActivations
from polytope_hsae.fileio import sha256_file, write_json, write_tensors
from polytope_hsae.lm import LanguageModel
from polytope_hsae.models.codes import Codes


class Store:
    """Columns by split, `acts` among them."""

    device = torch.device("cpu")

    def __init__(self, **splits):
        self.splits = splits

    @property
    def width(self):
        return next(iter(self.splits.values()))["acts"].shape[1]

    def n_rows(self, split):
        return len(self.splits[split]["acts"])

    def column(self, split, name):
        return self.splits[split][name]

    def acts(self, split, rows):
        return self.splits[split]["acts"][rows]

    def batches(self, split, batch_size):
        for start in range(0, self.n_rows(split), batch_size):
            yield self.acts(split, slice(start, start + batch_size)), start


def write_store(folder, splits, shard_rows):
    """An activation store of columns by split, `acts` among them; labels that are not given are 0."""
    shards = []
    for split, given in splits.items():
        n = len(given["acts"])
        columns = {name: torch.zeros(n, dtype=dtype) for name, dtype in LABELS.items()} | given
        columns["norm"] = given["acts"].norm(dim=1)
        for part, rows in enumerate(torch.arange(n).split(shard_rows)):
            path = folder / f"{split}-{part:05d}.safetensors"
            write_tensors(path, {name: column[rows] for name, column in columns.items()})
            made = {"file": path.name, "split": split, "rows": len(rows), "bytes": path.stat().st_size}
            shards.append({**made, "sha256": sha256_file(path)})
    sizes = {split: len(given["acts"]) for split, given in splits.items()}
    about = {"format": FORMAT, "dtype": "float32", "rows": sizes, "width": given["acts"].shape[1], "complete": True}
    write_json(folder / "manifest.json", {**about, "shards": shards})
    return folder


class FakeConcepts:
    """Parent 0 has children 0 and 1, parent 1 children 2 and 3; tokens[fold][child] lists ids."""

    def __init__(self, tokens, parents=(0, 0, 1, 1)):
        self.tokens, self.child_parent_R = tokens, list(parents)
        self.n_parents, self.n_children = max(parents) + 1, len(parents)

    def child_tokens(self, folds=("train", "val", "test")):
        return [
            sorted(token for fold in folds for token in self.tokens[fold][child]) for child in range(self.n_children)
        ]

    def token_to_child(self, vocab_size, folds=("train", "val", "test")):
        out = torch.full((vocab_size,), -1, dtype=torch.int32)
        for child, ids in enumerate(self.child_tokens(folds)):
            out[ids] = child
        return out


class FakeSAE:
    """Latent l is relu(h_l); decodes to scale * h, or to `offset`; child 0 of parent 0 copies its parent."""

    data_scale = torch.ones(())

    def __init__(self, width, n_parents=None, n_children=0, scale=1.0, offset=None, directions=None):
        self.width, self.n_parents, self.n_children = width, n_parents or width, n_children
        self.scale, self.offset, self.directions = scale, offset, directions
        self.h = None

    def encode(self, h):
        self.h = h
        index = torch.arange(self.n_parents).expand(len(h), -1)
        value = h[:, : self.n_parents].relu()
        child_index = index[:, :1] * self.n_children
        child_value = value[:, :1] if self.n_children else value[:, :0]
        return Codes(index, value, child_index[:, : child_value.shape[1]], child_value)

    def decode(self, codes):
        return self.h * self.scale if self.offset is None else self.offset.expand_as(self.h)

    def write_directions(self):
        return torch.eye(self.n_parents, self.width) if self.directions is None else self.directions


def sparse(dense):
    dense = np.asarray(dense, dtype=np.float32)
    return SparseActivations(np.broadcast_to(np.arange(dense.shape[1]), dense.shape), dense, dense.shape[1])


def language_model():
    """Two Llama layers of width 16 with large weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    return LanguageModel(LlamaForCausalLM(config), tiny.tokenizer(), name="tiny", has_head=True)


def sampled_ids(lm):
    """Contexts [6, 10] sampled from the model, so that ablating it costs cross-entropy."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 40, (6, 1), generator=generator)
    for _ in range(9):
        probs = lm.model(input_ids=ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probs, 1, generator=generator)], dim=1)
    return ids
