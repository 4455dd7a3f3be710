"""Which words a latent reads and which it writes (docs/method.md §5).

A word is a vocabulary entry with a row in d coordinates, a latent a direction on the other side of the metric: one is a
covector and the other a vector, so they pair. The score is their causal cosine, with one change: the shortest quarter
of the rows counts as long as the quarter's longest. Without the rows' lengths, word fragments with long rows lead every
list; with the plain cosine, tokens that were never trained (control characters) and bare suffixes do, because short
rows point anywhere.

Shapes: W words, L directions, n words kept per direction, d residual width.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from polytope_hsae.data.store import ActivationStore
from polytope_hsae.evaluation.reconstruction import NO_HEAD
from polytope_hsae.geometry.causal import CausalGeometry, Space, row_mean
from polytope_hsae.lm import FINAL_HOOK, LanguageModel

MIN_ROWS = 5  # of a word, for a mean activation
SHORT = 0.25  # share of the words that count as longer than they are
_NORM_ROWS = 16_384  # rows in float64 at a time
_SCORES = 1 << 24  # scores held at a time

WordList = list[list[Any]]  # [[text, score], ...], best first


class TokenTexts:
    """Call it with a token: its text as it stands in a sentence, with the leading space where it has one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._text(token)
        return self._known[token]

    def _text(self, token: int) -> str:
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return f"<{token}>"
        if "\u2581" in piece:  # SentencePiece's space, which decoding takes off the first token
            return str(piece.replace("\u2581", " "))
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))


class Words:
    """Rows of words, ready to be paired with directions.

    Args:
        ids_W: the words' tokens.
        rows_Wd: their rows; `centre_d` is taken off each.
        space: of the rows. Directions belong to the other one.
        geometry: metric of both spaces.
    """

    def __init__(
        self, ids_W: Tensor, rows_Wd: Tensor, centre_d: Tensor, geometry: CausalGeometry, space: Space
    ) -> None:
        self.ids_W, self.rows_Wd, self.space = ids_W, rows_Wd, space
        self.centre_d, self.geometry = centre_d.to(rows_Wd), geometry.to(rows_Wd.device)
        blocks = rows_Wd.split(_NORM_ROWS)
        norms_W = torch.cat([self.geometry.causal_norm(block - self.centre_d, space) for block in blocks])
        self.norms_W = norms_W.clamp_min(float(np.quantile(norms_W.cpu().numpy(), SHORT))).to(rows_Wd)

    def top(self, directions_Ld: Tensor, n: int) -> list[list[tuple[int, float]]]:
        """The n best words of every direction: (token, score), best first, equal scores by token."""
        other = Space.VECTOR if self.space is Space.COVECTOR else Space.COVECTOR
        lengths_L = self.geometry.causal_norm(directions_Ld, other)
        unit_Ld = (directions_Ld.to(lengths_L) / lengths_L.clamp_min(1e-30)[:, None]).to(self.rows_Wd)
        values, tokens = [], []
        size = max(n, _SCORES // max(1, len(unit_Ld)))
        for start in range(0, len(self.rows_Wd), size):
            part = slice(start, start + size)
            score_wL = (self.rows_Wd[part] - self.centre_d) @ unit_Ld.T / self.norms_W[part, None]
            value_nL, place_nL = score_wL.topk(min(n, len(score_wL)), dim=0)
            values.append(value_nL.cpu().numpy())
            tokens.append(self.ids_W[part][place_nL.cpu()].numpy())
        value_ML, token_ML = np.concatenate(values), np.concatenate(tokens)
        order_nL = np.lexsort((token_ML, -value_ML), axis=0)[:n]
        best_Ln, score_Ln = (np.take_along_axis(x_ML, order_nL, axis=0).T.tolist() for x_ML in (token_ML, value_ML))
        return [list(zip(best, scores, strict=True)) for best, scores in zip(best_Ln, score_Ln, strict=True)]


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
        self._written: Words | None = None
        self._read: Words | None = None
        final = hook == FINAL_HOOK
        if not lm.has_head:
            self.how_writes = f"Nothing: {NO_HEAD}."
        elif store.width != lm.width:
            self.how_writes = f"Nothing: rows of {hook} have width {store.width}, the unembedding's {lm.width}."
        else:
            known, rows_Wd = torch.arange(lm.vocab_size)[lm.named], lm.unembedding[lm.named]
            self._written = Words(known, rows_Wd, row_mean(rows_Wd), geometry, Space.COVECTOR)
            self.how_writes = "Causal cosine of the write direction with the word's unembedding row, less the mean row"
            self.how_writes += (
                ": the next-token logits it raises." if final else " (a logit lens: later layers are left out)."
            )
        self._dual = final and self._written is not None
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


def significant(number: float, digits: int = 3) -> float:
    """The number rounded to so many significant digits."""
    return float(f"{number:.{digits}g}")
