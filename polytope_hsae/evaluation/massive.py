"""Rows of massive norm: in many language models a few tokens, mostly a text's first ones and its first
delimiters, have residuals a hundred times longer than all others (massive activations: Sun et al., arXiv 2402.17762).

A handful of them can hold most of the squared deviation from the mean, so that EV speaks of them alone. They are left
out where `data.max_norm_multiple` says so, and described in norms.json in any case.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from polytope_hsae.data.corpus import SPLITS
from polytope_hsae.data.store import ActivationStore

MASSIVE = 10.0  # times the median norm: rows above it are described where none is left out
TOKENS = 8
_BATCH = 8192


def norm_limit(store: ActivationStore, multiple: float) -> float:
    """`multiple` times the median norm of the train rows; infinite where the median row is zero."""
    median = float(store.column("train", "norm").median())
    return multiple * median if median > 0 else float("inf")


def describe_norms(store: ActivationStore, multiple: float | None, text: Callable[[int], str]) -> dict[str, Any]:
    """The object of norms.json: by split how many rows are massive, on which tokens, and what they do to EV.

    store: the whole harvest; multiple: `data.max_norm_multiple`; text: of a token. The squared deviation is that from
    the mean of the other train rows.
    """
    ordinary, massive = store.parted(norm_limit(store, multiple or MASSIVE))
    any_massive = any(massive.n_rows(split) for split in SPLITS)
    mean_d = ordinary.moments("train")[0] if any_massive else torch.zeros(store.width, dtype=torch.float64)
    splits = {}
    for split in SPLITS:
        count_V = np.bincount(massive.column(split, "token").numpy())
        most = [token for token in np.argsort(-count_V, kind="stable")[:TOKENS].tolist() if count_V[token]]
        splits[split] = {
            "rows": store.n_rows(split),
            "massive": massive.n_rows(split),
            "largest_norm": float(store.column(split, "norm").max()),
            "share_of_squared_deviation": _share(ordinary, massive, split, mean_d),
            "tokens": [[text(token), int(count_V[token])] for token in most],
        }
    return {"median_norm": float(store.column("train", "norm").median()), "limit": multiple, "splits": splits}


def _share(ordinary: ActivationStore, massive: ActivationStore, split: str, mean_d: torch.Tensor) -> float:
    """Share of a split's squared deviation from `mean` [d] that its massive rows hold."""
    if not massive.n_rows(split):
        return 0.0
    if not ordinary.n_rows(split):
        return 1.0
    own_mean_d, spread = ordinary.moments(split)
    others = ordinary.n_rows(split) * (spread + float((own_mean_d - mean_d).square().sum()))
    held = sum(float((acts_bd.double() - mean_d).square().sum()) for acts_bd, _ in massive.batches(split, _BATCH))
    return held / (held + others)


def massive_warnings(norms: dict[str, Any]) -> list[str]:
    """A line for every split of norms.json that has massive rows."""
    multiple, fate = norms["limit"] or MASSIVE, "left out of training and of pooled metrics"
    if norms["limit"] is None:
        fate = "not left out (data.max_norm_multiple: null), so EV is mostly theirs"
    return [
        f"{found['massive']:,} of {found['rows']:,} {split} rows have more than {multiple:g} times the median norm of "
        f"{norms['median_norm']:.3g} (at most {found['largest_norm']:.3g}) and hold "
        f"{found['share_of_squared_deviation']:.0%} of the squared deviation; {fate}; tokens: "
        + ", ".join(f"{token!r} ({count})" for token, count in found["tokens"])
        for split, found in norms["splits"].items()
        if found["massive"]
    ]
