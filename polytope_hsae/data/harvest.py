"""Harvest: run the language model over a corpus and write activations with their labels, shard by shard.

The plan (which context goes into which shard) follows from the inputs alone, and the manifest is rewritten
after every shard, so a harvest that was killed goes on at the next shard and ends with the same bytes.
Shapes: N rows of a shard, n rows of a chunk, d residual width, V vocabulary, M concept tokens, R children,
P parents, c contexts of a shard.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polytope_hsae.data.concepts import Concepts
from polytope_hsae.data.corpus import SPLITS, Documents, context_batches, contexts, split_documents
from polytope_hsae.data.store import FORMAT, MANIFEST, ActivationStore, read_manifest
from polytope_hsae.fileio import sha256_file, sha256_json, write_json, write_tensors
from polytope_hsae.lm import FINAL_HOOK, LanguageModel
from polytope_hsae.lm.loading import DTYPES
from polytope_hsae.parsing import shown

CHUNK_LOGITS = 1 << 24  # logits held at once while beliefs are computed: 64 MiB

Progress = Callable[[int, int], None]


class Beliefs(NamedTuple):
    """Per row: the likeliest child of the likeliest parent, that parent's likeliest token, that parent's mass."""

    child: Tensor
    token: Tensor
    prob: Tensor


class _Shard(NamedTuple):
    file: str
    split: str
    contexts_c3: Tensor
    rows_c: Tensor


def harvest(
    lm: LanguageModel,
    documents: Documents,
    concepts: Concepts | None,
    folder: Path | str,
    *,
    hook: str = FINAL_HOOK,
    context_length: int = 256,
    batch_tokens: int = 8192,
    shard_rows: int = 65_536,
    dtype: str = "float32",
    belief: bool = True,
    belief_threshold: float = 0.3,
    seed: int = 0,
    split: Sequence[float] = (0.8, 0.05, 0.15),
    members: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> ActivationStore:
    """Write the activation store of `documents` at `hook` into `folder` and open it.

    Documents are split by `split` (train, val, test) and `seed`, unless `members` gives the document numbers (int64)
    of every split. `belief` adds the belief labels (docs/method.md §3) when the model has a head and `concepts` are
    given. `progress(rows done, rows in all)` is called after every batch. A folder with a harvest of the same settings
    is continued. Raises ValueError when its settings differ (naming them), for a split without rows, for contexts or
    tokens that the model cannot read, and for activations that `dtype` cannot hold.
    """
    if dtype not in DTYPES:
        raise ValueError(f"data.dtype: found {dtype!r}, allowed: {', '.join(DTYPES)}")
    lm.require_context(context_length)
    largest = int(documents.tokens.max())
    if largest >= lm.vocab_size:
        raise ValueError(f"corpus: found token {largest}, allowed: 0 to {lm.vocab_size - 1}, what {lm.name} reads")
    folder = Path(folder)
    index = ConceptIndex(concepts, lm) if belief and lm.has_head and concepts is not None else None
    if members is None:
        members = split_documents(documents.n_documents, split, seed)
    else:
        split = [len(members[name]) for name in SPLITS]
    plan = _plan(documents, members, context_length, shard_rows)
    manifest = {
        "format": FORMAT,
        "model": lm.name,
        "revision": lm.revision,
        "hook": hook,
        "tokenizer_sha256": lm.tokenizer_sha256,
        "documents_sha256": documents.sha256(),
        "start_id": documents.start_id,
        "concepts_sha256": sha256_json(concepts.to_json()) if concepts is not None and index is not None else None,
        "belief": index is not None,
        "belief_threshold": belief_threshold,
        "context_length": context_length,
        "batch_tokens": batch_tokens,
        "shard_rows": shard_rows,
        "seed": seed,
        "split": list(split),
        "dtype": dtype,
        "n_documents": documents.n_documents,
        "rows": {name: sum(int(s.rows_c.sum()) for s in plan if s.split == name) for name in SPLITS},
    }
    done = _resume(folder, manifest)
    total = sum(int(shard.rows_c.sum()) for shard in plan)
    counted = sum(shard["rows"] for shard in done)

    def count(rows: int) -> None:
        nonlocal counted
        counted += rows
        if progress is not None:
            progress(counted, total)

    for shard in plan[len(done) :]:
        columns = _harvest_shard(lm, documents, index, shard, manifest, count)
        path = folder / shard.file
        write_tensors(path, columns)
        entry = {"file": shard.file, "split": shard.split, "rows": columns["token"].numel()}
        done.append({**entry, "bytes": path.stat().st_size, "sha256": sha256_file(path)})
        state = {"width": columns["acts"].shape[1], "complete": len(done) == len(plan), "shards": done}
        write_json(folder / MANIFEST, {**manifest, **state})
    return ActivationStore.open(folder)


def planned_rows(documents: Documents, members: Mapping[str, Tensor], context_length: int) -> dict[str, int]:
    """How many rows a harvest will have of every split. Raises ValueError for a split without any."""
    return {name: int(_rows(documents, name, ids, context_length)[1].sum()) for name, ids in members.items()}


def _rows(documents: Documents, split: str, doc_ids: Tensor, context_length: int) -> tuple[Tensor, Tensor]:
    """Contexts [n, 3] of a split and the rows of each [n]. Raises ValueError where there is none."""
    contexts_n3 = contexts(documents, doc_ids, context_length)
    if not len(contexts_n3):
        raise ValueError(f"corpus: the documents of {split} give no rows")
    return contexts_n3, contexts_n3[:, 2] - int(documents.start_id is None)


def _plan(documents: Documents, members: Mapping[str, Tensor], context_length: int, shard_rows: int) -> list[_Shard]:
    """Contexts of every split cut into shards of at most `shard_rows` rows (or one context)."""
    plan: list[_Shard] = []
    for name, doc_ids in members.items():
        contexts_n3, rows_n = _rows(documents, name, doc_ids, context_length)
        first, number = 0, 0
        while first < rows_n.numel():
            fitting = int((rows_n[first:].cumsum(0) <= shard_rows).sum())
            last = first + max(1, fitting)
            plan.append(_Shard(f"{name}-{number:05d}.safetensors", name, contexts_n3[first:last], rows_n[first:last]))
            first, number = last, number + 1
    return plan


def _resume(folder: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries of the shards that an earlier harvest of the same settings finished; leftovers of a kill are removed."""
    for leftover in sorted(folder.glob(".*.tmp")):
        leftover.unlink()
    if not (folder / MANIFEST).is_file():
        return []
    found = read_manifest(folder)
    for key, value in manifest.items():
        if found.get(key) != value:
            raise ValueError(f"{folder}: harvested with {key} {shown(found.get(key))}, asked for {value!r}")
    for shard in found["shards"]:
        path = folder / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            raise ValueError(f"{path}: the shard is missing or truncated, delete the folder to harvest anew")
    return [{**shard} for shard in found["shards"]]


def _harvest_shard(
    lm: LanguageModel,
    documents: Documents,
    index: "ConceptIndex | None",
    shard: _Shard,
    manifest: dict[str, Any],
    count: Callable[[int], None],
) -> dict[str, Tensor]:
    """All columns of one shard, rows in the order of its contexts."""
    n_rows = int(shard.rows_c.sum())
    first_row_c = shard.rows_c.cumsum(0) - shard.rows_c
    columns = _label_columns(documents, shard, n_rows)
    dtype = DTYPES[manifest["dtype"]]
    hook = manifest["hook"]
    for members, ids_BT, mask_BT in context_batches(documents, shard.contexts_c3, manifest["batch_tokens"]):
        needs_final = index is not None and hook != FINAL_HOOK
        captured = lm.capture(ids_BT, hook, mask=mask_BT, final=needs_final)
        # Position 0 has seen nothing of the document: it is not stored.
        kept_BT = mask_BT.bool()
        kept_BT[:, 0] = False
        places = torch.arange(ids_BT.shape[1]) - 1
        row_n = (first_row_c[members][:, None] + places)[kept_BT]
        acts_nd = captured.acts[kept_BT.to(lm.device)]
        stored_nd = acts_nd.to(dtype)
        if not torch.isfinite(stored_nd).all():
            raise ValueError(f"data.dtype: {manifest['dtype']} cannot hold the activations at {hook}, or they are NaN")
        if "acts" not in columns:
            columns["acts"] = torch.empty(n_rows, stored_nd.shape[1], dtype=dtype)
        columns["acts"][row_n] = stored_nd.cpu()
        columns["norm"][row_n] = stored_nd.float().norm(dim=1).cpu()
        if index is not None:
            final_nd = acts_nd if captured.final is None else captured.final[kept_BT.to(lm.device)]
            beliefs = index.beliefs(final_nd, manifest["belief_threshold"])
            columns["belief_concept"][row_n] = beliefs.child.int().cpu()
            columns["belief_token"][row_n] = beliefs.token.int().cpu()
            columns["belief_prob"][row_n] = beliefs.prob.cpu()
        count(row_n.numel())
    return columns


def _label_columns(documents: Documents, shard: _Shard, n_rows: int) -> dict[str, Tensor]:
    """Columns that follow from the tokens, and the belief columns as they stand without beliefs."""
    prefix = 0 if documents.start_id is None else 1
    skip = 1 - prefix
    doc_c, offset_c, length_c = shard.contexts_c3.unbind(1)
    doc_N = doc_c.repeat_interleave(shard.rows_c)
    place_N = torch.cat([torch.arange(int(o) + skip, int(o) + int(n)) for o, n in zip(offset_c, length_c, strict=True)])
    next_N = documents.tokens[(place_N + 1).clamp(max=documents.n_tokens - 1)].clone()
    next_N[shard.rows_c.cumsum(0) - 1] = -1
    return {
        "token": documents.tokens[place_N],
        "next_token": next_N,
        "doc": doc_N.int(),
        "pos": (place_N - documents.starts[doc_N]).int(),
        "belief_concept": torch.full((n_rows,), -1, dtype=torch.int32),
        "belief_token": torch.full((n_rows,), -1, dtype=torch.int32),
        "belief_prob": torch.zeros(n_rows),
        "norm": torch.zeros(n_rows),
    }


class ConceptIndex:
    """Which vocabulary entries belong to which child and parent, on the model's device."""

    def __init__(self, concepts: Concepts, lm: LanguageModel) -> None:
        self.lm = lm
        child_M = [row for row, tokens in enumerate(concepts.child_tokens()) for _ in tokens]
        token_M = [token for tokens in concepts.child_tokens() for token in tokens]
        if token_M and max(token_M) >= lm.vocab_size:
            raise ValueError(f"concepts: token {max(token_M)} is beyond the vocabulary of {lm.vocab_size}")
        self.token_M = torch.tensor(token_M, dtype=torch.int64, device=lm.device)
        self.child_M = torch.tensor(child_M, dtype=torch.int64, device=lm.device)
        self.parent_R = torch.tensor(concepts.child_parent_R, dtype=torch.int64, device=lm.device)
        self.parent_M = self.parent_R[self.child_M]
        self.n_parents = concepts.n_parents

    def beliefs(self, final_nd: Tensor, threshold: float) -> Beliefs:
        """What the model expects next at every final residual [n,d], among the concepts.

        `prob` is the mass of the parent with the most probability, `token` its likeliest token, `child` its
        likeliest child (by summed mass) where `prob` >= `threshold`, else -1.
        """
        size = max(1, CHUNK_LOGITS // self.lm.vocab_size)
        chunks = [self._chunk(chunk_nd, threshold) for chunk_nd in final_nd.split(size)]
        return Beliefs(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))

    def _chunk(self, final_nd: Tensor, threshold: float) -> Beliefs:
        # The softmax in place: the logits are the largest thing here, and only concept tokens are kept of them.
        logits_nV = self.lm.logits_from_final(final_nd)
        odds_nV = logits_nV.sub_(logits_nV.amax(1, keepdim=True)).exp_()
        prob_Mn = odds_nV[:, self.token_M].T / odds_nV.sum(1)
        mass_Rn = prob_Mn.new_zeros(len(self.parent_R), prob_Mn.shape[1]).index_add_(0, self.child_M, prob_Mn)
        mass_Pn = mass_Rn.new_zeros(self.n_parents, prob_Mn.shape[1]).index_add_(0, self.parent_R, mass_Rn)
        prob_n, parent_n = mass_Pn.max(0)
        child_n = mass_Rn.masked_fill(self.parent_R[:, None] != parent_n, -1.0).argmax(0)
        best_n = prob_Mn.masked_fill(self.parent_M[:, None] != parent_n, -1.0).argmax(0)
        return Beliefs(child_n.where(prob_n >= threshold, -1), self.token_M[best_n], prob_n)
