"""A model's latents: how often they fire, on which tokens, where, and which words they read and write.

The parents that are named (by a concept) or fire most often, and their children, are described (docs/design.md,
latents.json). How words are paired with directions: data/vocabulary.py.

Shapes: M positive codes, n rows of one latent, P parents, C children per parent, L described parents, d residual width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polytope_hsae.config import LatentsConfig
from polytope_hsae.data.store import ActivationStore
from polytope_hsae.data.vocabulary import TokenTexts, Words, significant, written_words
from polytope_hsae.evaluation.bootstrap import FloatArray
from polytope_hsae.evaluation.row_codes import IntArray, SparseActivations, row_codes
from polytope_hsae.geometry.causal import CausalGeometry, Space
from polytope_hsae.lm import FINAL_HOOK, LanguageModel
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.hsae import HierarchicalSAE

MIN_TOKEN_ROWS = 3  # rows of a token, for `fires_on`
MIN_WORD_ROWS = 5  # of a word, for a mean activation
CHILD_CONTEXTS = 2

WordList = list[list[Any]]  # [[text, score], ...], best first


@dataclass(frozen=True)
class Names:
    """What is known about a model's latents from elsewhere.

    parents: for a parent its concept (row in concepts.json), whether it was mapped to it, and the metrics there, under
    the keys of UNNAMED; children: for a parent the child concept (row in concepts.json, or None) of each of its slots.
    """

    parents: Mapping[int, Mapping[str, Any]]
    children: Mapping[int, Sequence[int | None]]


UNNAMED: dict[str, Any] = {"concept": None, "mapped": False, "purity": None, "leakage": None, "recall": None}


class RowsOf:
    """The rows on which some latents fire, each latent's together."""

    def __init__(self, codes: SparseActivations, latents_L: IntArray) -> None:
        wanted_P = np.zeros(codes.n_latents, dtype=bool)
        wanted_P[latents_L] = True
        row_M, slot_M = np.nonzero((codes.value_Nk > 0) & wanted_P[codes.index_Nk])
        order_M = np.argsort(codes.index_Nk[row_M, slot_M], kind="stable")
        self._row_M, slot_M = row_M[order_M], slot_M[order_M]
        self._value_M = codes.value_Nk[self._row_M, slot_M].astype(np.float64)
        self._starts_P = np.searchsorted(codes.index_Nk[self._row_M, slot_M], np.arange(codes.n_latents + 1))

    def of(self, latent: int) -> tuple[IntArray, FloatArray]:
        """Rows [n], ascending, and values [n] of one latent."""
        part = slice(self._starts_P[latent], self._starts_P[latent + 1])
        return self._row_M[part], self._value_M[part]


class Places:
    """The tokens of a split's rows and where they stand in their documents."""

    def __init__(self, store: ActivationStore, split: str, text: TokenTexts, options: LatentsConfig) -> None:
        self.token_N, self.doc_N, self.pos_N = (
            store.column(split, name).cpu().numpy().astype(np.int64) for name in ("token", "doc", "pos")
        )
        self.rows_V = np.bincount(self.token_N)
        self.text, self.options = text, options

    def fires_on(self, row_n: IntArray, value_n: FloatArray) -> WordList:
        """[token, mean code over all its rows, rows] of the tokens with the highest mean, best first."""
        token_T, place_n = np.unique(self.token_N[row_n], return_inverse=True)
        mean_T = np.bincount(place_n, weights=value_n, minlength=len(token_T)) / self.rows_V[token_T]
        enough_T = np.flatnonzero(self.rows_V[token_T] >= MIN_TOKEN_ROWS)
        best = enough_T[np.lexsort((token_T[enough_T], -mean_T[enough_T]))][: self.options.words]
        found = zip(token_T[best].tolist(), mean_T[best].tolist(), strict=True)
        return [[self.text(token), significant(mean), int(self.rows_V[token])] for token, mean in found]

    def contexts(self, row_n: IntArray, value_n: FloatArray, count: int) -> list[dict[str, Any]]:
        """Windows about the rows with the largest codes: one for each document, then further ones."""
        strongest_n = np.lexsort((row_n, -value_n))
        _, first = np.unique(self.doc_N[row_n[strongest_n]], return_index=True)  # of every document
        later = np.setdiff1d(np.arange(len(row_n)), first)
        chosen = strongest_n[np.concatenate([np.sort(first), later])[:count]]
        return [self._window(row, row_n, value_n) for row in row_n[chosen].tolist()]

    def _window(self, row: int, row_n: IntArray, value_n: FloatArray) -> dict[str, Any]:
        """The tokens about a row, as far as its document goes on without a gap, with the latent's code on each."""
        near = np.arange(max(0, row - self.options.window), min(len(self.doc_N), row + self.options.window + 1))
        near = near[(self.doc_N[near] == self.doc_N[row]) & (self.pos_N[near] - self.pos_N[row] == near - row)]
        codes = np.zeros(len(near))
        inside = slice(*np.searchsorted(row_n, [near[0], near[-1] + 1]))
        codes[row_n[inside] - near[0]] = value_n[inside]
        return {
            "doc": int(self.doc_N[row]),
            "pos": int(self.pos_N[row]),
            "tokens": [self.text(token) for token in self.token_N[near].tolist()],
            "values": [significant(code) for code in codes.tolist()],
        }


class Lexicon:
    """The words at one hook, made once for all models. `how_reads`, `how_writes`: a sentence each for the reader.

    Writes: rows of the unembedding, paired with a write direction. At the final residual that is the next-token logits
    it raises (before any soft-cap); at an inner hook it is a logit lens.

    Reads: at the final residual an encoder row is a covector like the unembedding's rows, and a word's vector is its
    dual, so the pairing is E^T Sigma^-1 (gamma - mean). At an inner hook, and without an output head, the unembedding
    does not say what is read: there a word's vector is the mean activation of its rows, less the train mean, and the
    metric is that of these means.

    Args: geometry: of the unembedding's rows; split: whose rows give mean activations; train_mean_d [d].
    """

    def __init__(
        self,
        lm: LanguageModel,
        hook: str,
        geometry: CausalGeometry,
        store: ActivationStore,
        split: str,
        train_mean_d: Tensor,
    ) -> None:
        self.text = TokenTexts(lm.tokenizer)
        self.geometry = geometry
        self._read: Words | None = None
        self._written, self.how_writes = written_words(lm, hook, store.width, geometry)
        self._dual = hook == FINAL_HOOK and self._written is not None
        if self._dual:
            self._read = self._written
            self.how_reads = "Causal cosine of the encoder row with the word's unembedding row, less the mean row."
        else:
            self._read = _mean_activations(store, split, train_mean_d)
            self.how_reads = (
                "Causal cosine of the encoder row with the mean activation of the word's rows, less the train mean "
                f"(words with at least {MIN_WORD_ROWS} rows of the {split} split)."
            )

    def reads(self, encoder_Ld: Tensor, n: int) -> list[WordList]:
        """The n words that each encoder row [L, d] reads best; empty lists where there are no words."""
        if self._dual:
            whitened_Ld = self.geometry.whiten(encoder_Ld, Space.COVECTOR)
            encoder_Ld = self.geometry.unwhiten(whitened_Ld, Space.VECTOR)
        return self._named(self._read, encoder_Ld, n)

    def writes(self, decoder_Ld: Tensor, n: int) -> list[WordList]:
        """The n words that each write direction [L, d] raises most; empty lists where there are no words."""
        return self._named(self._written, decoder_Ld, n)

    def _named(self, words: Words | None, directions_Ld: Tensor, n: int) -> list[WordList]:
        if words is None:
            return [[] for _ in directions_Ld]
        found = words.top(directions_Ld, n)
        return [[[self.text(token), significant(score)] for token, score in best] for best in found]


def _mean_activations(store: ActivationStore, split: str, train_mean_d: Tensor) -> Words | None:
    """The mean row of every token with enough rows of the split; None where no token has."""
    token_N = store.column(split, "token").long()
    counts_V = torch.bincount(token_N)
    ids_W = (counts_V >= MIN_WORD_ROWS).nonzero().squeeze(1)
    if not len(ids_W):
        return None
    place_V = torch.full_like(counts_V, len(ids_W))  # all other tokens share one more row
    place_V[ids_W] = torch.arange(len(ids_W))
    sums_Wd = torch.zeros(len(ids_W) + 1, store.width)
    for acts_Bd, start in store.batches(split, 8192):
        sums_Wd.index_add_(0, place_V[token_N[start : start + len(acts_Bd)]], acts_Bd)
    means_Wd = sums_Wd[:-1] / counts_V[ids_W, None]
    centred_Wd = (means_Wd - train_mean_d).double()
    geometry = CausalGeometry.from_activation_covariance(centred_Wd.T @ centred_Wd / len(ids_W))
    return Words(ids_W, means_Wd, train_mean_d, geometry, Space.VECTOR)


def describe_latents(
    sae: SparseAutoencoder,
    store: ActivationStore,
    split: str,
    lexicon: Lexicon,
    names: Names,
    options: LatentsConfig,
) -> dict[str, Any]:
    """One model's object of latents.json.

    Described are all parents that `names` names, and those of the highest firing rates until there are
    `options.parents`, by number. For a flat model the parents are its latents.
    """
    n_rows, n_children = store.n_rows(split), sae.n_children
    parent_codes, child_codes, _ = row_codes(sae, store, split, np.arange(n_rows))
    used_P = np.bincount(parent_codes.index_Nk[parent_codes.value_Nk > 0], minlength=sae.n_parents)
    chosen_L = _chosen(used_P, sorted(names.parents), options.parents)
    children_LC = chosen_L[:, None] * n_children + np.arange(n_children)
    parent_firings = RowsOf(parent_codes, chosen_L)
    child_firings = RowsOf(child_codes, children_LC.ravel())
    places = Places(store, split, lexicon.text, options)
    parent_words, child_words = _words(sae, chosen_L, lexicon, options.words)

    def described(firings: RowsOf, latent: int, words: dict[str, WordList], contexts: int) -> dict[str, Any]:
        row_n, value_n = firings.of(latent)
        return {
            **words,
            "fires_on": places.fires_on(row_n, value_n),
            "contexts": places.contexts(row_n, value_n, contexts),
        }

    parents = []
    for place, parent in enumerate(chosen_L.tolist()):
        row_n, value_n = parent_firings.of(parent)
        concepts = names.children.get(parent, [None] * n_children)
        children = []
        for j, child in enumerate(children_LC[place].tolist()):
            active = len(child_firings.of(child)[0])
            share = significant(active / len(row_n)) if len(row_n) else None
            what = described(child_firings, child, child_words[place * n_children + j], CHILD_CONTEXTS)
            children.append({"index": j, "concept": concepts[j], "share_of_parent": share, **what})
        parents.append(
            {
                "latent": parent,
                "share": significant(len(row_n) / n_rows),
                "mean_value": significant(float(value_n.mean())) if len(row_n) else None,
                **UNNAMED,
                **names.parents.get(parent, {}),
                **described(parent_firings, parent, parent_words[place], options.contexts),
                "children": children,
            }
        )
    return {
        "architecture": type(sae).__name__,
        "n_parents": sae.n_parents,
        "n_children": n_children,
        "usage": [significant(used / n_rows) for used in used_P.tolist()],
        "parents": parents,
    }


def _chosen(used_P: IntArray, named: Sequence[int], count: int) -> IntArray:
    """The named parents and those of the highest firing rates, `count` in all unless more are named; ascending."""
    order_P = np.lexsort((np.arange(len(used_P)), -used_P))
    others = order_P[(used_P[order_P] > 0) & ~np.isin(order_P, named)]
    kept = others[: max(0, count - len(named))]
    return np.sort(np.concatenate([np.asarray(named, dtype=np.int64), kept]))


@torch.no_grad()
def _words(
    sae: SparseAutoencoder, chosen_L: IntArray, lexicon: Lexicon, n: int
) -> tuple[list[dict[str, WordList]], list[dict[str, WordList]]]:
    """What the chosen parents, and their children one after the other, read and write."""
    index_L = torch.from_numpy(chosen_L).to(sae.D.device)
    tensors = sae.tensors()
    pairs = [(tensors["E"][index_L], sae.write_directions()[index_L])]
    if isinstance(sae, HierarchicalSAE):
        pairs.append((sae.child_readers(index_L).flatten(0, 1), sae.atoms(index_L).flatten(0, 1)))
    found = [
        [
            {"reads": reads, "writes": writes}
            for reads, writes in zip(lexicon.reads(encoder, n), lexicon.writes(decoder, n), strict=True)
        ]
        for encoder, decoder in pairs
    ]
    return found[0], found[1] if len(found) > 1 else []
