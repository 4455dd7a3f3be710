"""How well an autoencoder rebuilds activations, and what the language model loses by it (docs/method.md §5).

Sums are kept per document and pooled over the whole split; batches never enter a value.

Shapes: N rows, d residual width, B contexts of a batch, T positions, V vocabulary, U documents, k active
parents, K active children.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import log_softmax

from polytope_hsae.data.store import ActivationStore
from polytope_hsae.evaluation.bootstrap import (
    Evaluation,
    FloatArray,
    Metric,
    Units,
    bootstrap_fraction,
    summarise,
    unavailable,
)
from polytope_hsae.lm import Edit, LanguageModel
from polytope_hsae.lm_edits import EditedRuns
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.codes import Codes

NO_HEAD = "the language model has no output head"
LM_METRICS = ("ce_recovered", "delta_ce", "kl", "ce_clean", "ce_ablated", "ce_spliced")


def check_eval_mode(sae: SparseAutoencoder) -> None:
    """Routing noise must be off: raise ValueError for a module in training mode."""
    if getattr(sae, "training", False):
        raise ValueError("model: found training mode, allowed: eval mode (call .eval() before evaluation)")


class _Usage:
    """Which parents and children were ever active."""

    def __init__(self, sae: SparseAutoencoder, device: torch.device) -> None:
        self.n_children = sae.n_children
        self.parents_P = torch.zeros(sae.n_parents, dtype=torch.bool, device=device)
        self.children_R = torch.zeros(sae.n_parents * sae.n_children, dtype=torch.bool, device=device)

    def add(self, codes: Codes) -> None:
        self.parents_P[codes.parent_index[codes.parent_value > 0]] = True
        if self.n_children:
            self.children_R[codes.child_index[codes.child_value > 0]] = True

    def metrics(self, n: int, seed: int) -> dict[str, Metric]:
        dead_parents = int((~self.parents_P).sum())
        out = {"dead_parents": bootstrap_fraction(dead_parents, self.parents_P.numel(), n, seed)}
        if not self.n_children:
            return out | {"dead_children": unavailable("a flat model has no children")}
        candidates_R = self.parents_P.repeat_interleave(self.n_children)
        dead_children = int((candidates_R & ~self.children_R).sum())
        return out | {"dead_children": bootstrap_fraction(dead_children, int(candidates_R.sum()), n, seed)}


@torch.no_grad()
def evaluate_reconstruction(
    sae: SparseAutoencoder,
    store: ActivationStore,
    split: str,
    train_mean_d: Tensor,
    *,
    batch_size: int = 4096,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """EV, FVU, L0 and dead counts over one split.

    `ev` = 1 - SSE/SST and `fvu` = SSE/SST with SST centred on the train mean `train_mean_d` [d] (raw units);
    `l0` counts parents and children with value > 0, per row. Intervals are over documents. `dead_parents` is
    the share of parents never active on the split; `dead_children` the share never active among the children
    of parents that were; their intervals are over parents or children. Raises ValueError for an empty split
    or a model in training mode.
    """
    check_eval_mode(sae)
    device = sae.write_directions().device
    docs_U, doc_of_row_N = np.unique(store.column(split, "doc").cpu().numpy(), return_inverse=True)
    if not docs_U.size:
        raise ValueError(f"split: found no rows in {split!r}, allowed: at least one document")
    unit_of_row_N = torch.from_numpy(doc_of_row_N).to(device)
    mean_d = train_mean_d.to(device, torch.float32)
    sums_U4 = torch.zeros(len(docs_U), 4, dtype=torch.float64, device=device)
    usage = _Usage(sae, device)
    for acts_Bd, start in store.batches(split, batch_size):
        acts_Bd = acts_Bd.to(device)
        codes = sae.encode(acts_Bd)
        sse_B = (acts_Bd - sae.decode(codes)).square().sum(-1)
        sst_B = (acts_Bd - mean_d).square().sum(-1)
        row_sums_B4 = torch.stack([sse_B, sst_B, codes.l0().to(sse_B), torch.ones_like(sse_B)], dim=1)
        sums_U4.index_add_(0, unit_of_row_N[start : start + len(acts_Bd)], row_sums_B4.double())
        usage.add(codes)
    sse_U, sst_U, l0_U, rows_U = sums_U4.cpu().numpy().T
    units = {
        "ev": Units.ratio(sst_U - sse_U, sst_U, docs_U),
        "fvu": Units.ratio(sse_U, sst_U, docs_U),
        "l0": Units.ratio(l0_U, rows_U, docs_U),
    }
    result = summarise(units, {"ev": 0.0, "fvu": 1.0}, bootstrap, seed)
    return Evaluation(result.metrics | usage.metrics(bootstrap, seed), units)


class _Clean:
    """The unedited model's predictions on contexts [B, T], which every edited one is compared with."""

    def __init__(self, logits_BTV: Tensor, ids_BT: Tensor, counted_BT: Tensor) -> None:
        self.ids_BT, self.counted_BT = ids_BT, counted_BT
        self.log_p = [self._log_p(logits_TV, row) for row, logits_TV in enumerate(logits_BTV)]
        self.ce_B = torch.stack([self._ce(log_p_NV, row) for row, log_p_NV in enumerate(self.log_p)])

    def _log_p(self, logits_TV: Tensor, row: int) -> Tensor:
        """log p [N, V] at the counted positions of a context."""
        return log_softmax(logits_TV[:-1][self.counted_BT[row]].float(), -1)

    def _ce(self, log_p_NV: Tensor, row: int) -> Tensor:
        return -log_p_NV.gather(-1, self.ids_BT[row, 1:][self.counted_BT[row], None]).double().sum()

    def compare(self, logits_BTV: Tensor) -> tuple[Tensor, Tensor]:
        """Per context: summed next-token cross-entropy and KL(clean || logits), float64 [B]."""
        ce_B, kl_B = [], []
        for row, logits_TV in enumerate(logits_BTV):
            log_p_NV = self._log_p(logits_TV, row)
            ce_B.append(self._ce(log_p_NV, row))
            clean_NV = self.log_p[row]
            kl_B.append((clean_NV.exp() * (clean_NV - log_p_NV)).sum(-1).double().sum())
        return torch.stack(ce_B), torch.stack(kl_B)


@torch.no_grad()
def _language_model_sums(
    saes: Mapping[str, SparseAutoencoder],
    lm: LanguageModel,
    hook: str,
    ids_BT: Tensor,
    mask_BT: Tensor,
    mean_d: Tensor,
) -> dict[str, FloatArray]:
    """By model, sums per context [B, 6]: tokens, CE clean, CE ablated, CE spliced, KL ablated, KL spliced."""

    def ablate(acts_BTd: Tensor) -> Tensor:
        return torch.cat([acts_BTd[:, :1], mean_d.to(acts_BTd).expand_as(acts_BTd[:, 1:])], dim=1)

    def spliced(sae: SparseAutoencoder) -> Edit:
        device = sae.write_directions().device

        def splice(acts_BTd: Tensor) -> Tensor:
            rows_Nd = acts_BTd[:, 1:].reshape(-1, acts_BTd.shape[-1]).to(device, torch.float32)
            rebuilt_Nd = sae.decode(sae.encode(rows_Nd)).to(acts_BTd)
            return torch.cat([acts_BTd[:, :1], rebuilt_Nd.view_as(acts_BTd[:, 1:])], dim=1)

        return splice

    counted_BT = mask_BT[:, 1:].bool() & mask_BT[:, :-1].bool()
    counted_BT[:, 0] = False  # nothing is edited at position 0, so its prediction cannot change
    runs = EditedRuns(lm, ids_BT, hook, mask_BT)
    clean = _Clean(runs.logits(lambda acts_BTd: acts_BTd), ids_BT, counted_BT)
    ce_ablated_B, kl_ablated_B = clean.compare(runs.logits(ablate))
    sums = {}
    for name, sae in saes.items():
        ce_spliced_B, kl_spliced_B = clean.compare(runs.logits(spliced(sae)))
        tokens_B = counted_BT.sum(-1).double()
        columns = [tokens_B, clean.ce_B, ce_ablated_B, ce_spliced_B, kl_ablated_B, kl_spliced_B]
        sums[name] = torch.stack(columns, dim=1).cpu().numpy()
    return sums


def evaluate_language_model(
    saes: Mapping[str, SparseAutoencoder],
    lm: LanguageModel,
    hook: str,
    ids_NT: Tensor,
    train_mean_d: Tensor,
    *,
    documents: ArrayLike | None = None,
    mask_NT: Tensor | None = None,
    batch_size: int = 8,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Evaluation]:
    """By model, cross-entropy and KL (nats per token) with its reconstruction spliced in at `hook`, on contexts [N, T].

    `ce_recovered` = (ablated - spliced)/(ablated - clean), where ablated replaces the hook's rows by the train mean;
    `delta_ce` = spliced - clean; `kl` = KL(clean || spliced). Position 0 is left untouched in all runs, because the
    store never holds it and no model is trained on it; its prediction, which then cannot change, and the last
    position, which predicts nothing, are not counted. `documents` [N] names each context's document (default: each
    context is one); `mask_NT` is 1 on tokens and 0 on padding at the right. Chance of `delta_ce` and `kl` is what mean
    ablation costs, of the cross-entropies a uniform guess. A language model without an output head gives nulls. The
    clean and the ablated run are shared by all models.
    """
    if not lm.has_head:
        return {name: Evaluation({metric: unavailable(NO_HEAD) for metric in LM_METRICS}) for name in saes}
    for sae in saes.values():
        check_eval_mode(sae)
    if ids_NT.ndim != 2 or ids_NT.shape[0] < 1 or ids_NT.shape[1] < 3:
        raise ValueError(f"contexts: found shape {tuple(ids_NT.shape)}, allowed: [N >= 1, T >= 3]")
    mask_NT = torch.ones_like(ids_NT) if mask_NT is None else mask_NT
    order_N = torch.argsort(mask_NT.sum(1), stable=True)  # contexts of one length share a batch
    sums_N6 = {name: np.zeros((len(ids_NT), 6)) for name in saes}
    for members_B in order_N.split(batch_size):
        longest = int(mask_NT[members_B].sum(1).max())
        ids_BT, mask_BT = (x_NT[members_B, : max(longest, 3)].to(lm.device) for x_NT in (ids_NT, mask_NT))
        for name, sums_B6 in _language_model_sums(saes, lm, hook, ids_BT, mask_BT, train_mean_d).items():
            sums_N6[name][members_B.numpy()] = sums_B6
    keys = np.arange(len(ids_NT)) if documents is None else np.asarray(documents, dtype=np.int64)
    return {name: _language_model_metrics(sums, keys, lm.vocab_size, bootstrap, seed) for name, sums in sums_N6.items()}


def _language_model_metrics(
    sums_N6: FloatArray, keys: NDArray[np.int64], vocab_size: int, n: int, seed: int
) -> Evaluation:
    docs_U, doc_of_context_N = np.unique(keys, return_inverse=True)
    sums_U6 = np.zeros((len(docs_U), sums_N6.shape[1]))
    np.add.at(sums_U6, doc_of_context_N, sums_N6)
    tokens_U, clean_U, ablated_U, spliced_U, kl_ablated_U, kl_spliced_U = sums_U6.T
    units = {
        "ce_recovered": Units.ratio(ablated_U - spliced_U, ablated_U - clean_U, docs_U),
        "delta_ce": Units.ratio(spliced_U - clean_U, tokens_U, docs_U),
        "kl": Units.ratio(kl_spliced_U, tokens_U, docs_U),
        "ce_clean": Units.ratio(clean_U, tokens_U, docs_U),
        "ce_ablated": Units.ratio(ablated_U, tokens_U, docs_U),
        "ce_spliced": Units.ratio(spliced_U, tokens_U, docs_U),
    }
    tokens = tokens_U.sum()
    if tokens == 0:
        raise ValueError("contexts: found no position to count, allowed: three unmasked tokens in a row")
    chance = {
        "ce_recovered": 0.0,
        "delta_ce": float((ablated_U - clean_U).sum() / tokens),
        "kl": float(kl_ablated_U.sum() / tokens),
        "ce_clean": float(np.log(vocab_size)),
        "ce_ablated": float(np.log(vocab_size)),
        "ce_spliced": float(np.log(vocab_size)),
    }
    result = summarise(units, chance, n, seed)
    if chance["delta_ce"] <= 0:
        why = "mean ablation does not raise the cross-entropy, so there is nothing to recover"
        del units["ce_recovered"]
        return Evaluation(result.metrics | {"ce_recovered": unavailable(why, 0.0)}, units)
    return result
