"""Which words a latent reads and which it writes (docs/method.md §5); how they are paired: data/vocabulary.py.

Shapes: L directions, n words kept per direction, d residual width.
"""

from typing import Any

import torch
from torch import Tensor

from polytope_hsae.data.store import ActivationStore
from polytope_hsae.data.vocabulary import TokenTexts, Words, significant, written_words
from polytope_hsae.geometry.causal import CausalGeometry, Space
from polytope_hsae.lm import FINAL_HOOK, LanguageModel

MIN_ROWS = 5  # of a word, for a mean activation

WordList = list[list[Any]]  # [[text, score], ...], best first


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
                f"(words with at least {MIN_ROWS} rows of the {split} split)."
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
    ids_W = (counts_V >= MIN_ROWS).nonzero().squeeze(1)
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
