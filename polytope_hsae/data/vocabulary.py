"""The words of a vocabulary, paired with directions (docs/method.md §5).

A word is a vocabulary entry with a row in d coordinates, and a latent is a direction on the other side of the metric:
one is a covector, the other a vector. The score of a pair is their causal cosine, with one change: the shortest quarter
of the rows counts as long as the quarter's longest. Without the rows' lengths, word fragments with long rows lead every
list. With the plain cosine, untrained tokens (control characters) and bare suffixes lead it: their short rows point
anywhere.

Shapes: W words, L directions, n words kept per direction, d residual width.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from polytope_hsae.geometry.causal import CausalGeometry, Space, row_mean
from polytope_hsae.lm import FINAL_HOOK, NO_HEAD, LanguageModel

SHORT = 0.25  # share of the words that count as longer than they are
_NORM_ROWS = 16_384  # rows in float64 at a time
_SCORES = 1 << 24  # scores held at a time


class TokenTexts:
    """Call it with a token: its text as it stands in a sentence, with the leading space where it has one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self._known:
            piece = self.tokenizer.convert_ids_to_tokens(token)
            if piece is None:
                text = f"<{token}>"
            elif "\u2581" in piece:  # SentencePiece's space, which decoding takes off the first token
                text = piece.replace("\u2581", " ")
            else:
                text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
            self._known[token] = text
        return self._known[token]


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


def written_words(lm: LanguageModel, hook: str, width: int, geometry: CausalGeometry) -> tuple[Words | None, str]:
    """The words that a write direction of this width at a hook can raise, and a sentence on how; None and why not.

    geometry: of the unembedding's rows. At the final residual what is raised are the next-token logits, before any
    soft-cap; at an inner hook it is a logit lens.
    """
    if not lm.has_head:
        return None, f"Nothing: {NO_HEAD}."
    if width != lm.width:
        return None, f"Nothing: rows of {hook} have width {width}, the unembedding's {lm.width}."
    known, rows_Wd = torch.arange(lm.vocab_size)[lm.named], lm.unembedding[lm.named]
    words = Words(known, rows_Wd, row_mean(rows_Wd), geometry, Space.COVECTOR)
    lens = ": the next-token logits it raises." if hook == FINAL_HOOK else " (a logit lens: later layers are left out)."
    return words, f"Causal cosine of the write direction with the word's unembedding row, less the mean row{lens}"


def significant(number: float, digits: int = 3) -> float:
    """The number rounded to so many significant digits."""
    return float(f"{number:.{digits}g}")
