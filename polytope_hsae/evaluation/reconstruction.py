"""How well an autoencoder rebuilds activations, and what the language model loses by it (docs/method.md §5).

Sums are kept per document and pooled over the whole split; batches never enter a value.

Shapes: N rows, d residual width, B rows (or contexts) of a batch, T positions, V vocabulary, W its ids that have a
name, U documents, G groups of documents.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import log_softmax

from polytope_hsae.data.store import ActivationStore
from polytope_hsae.evaluation.bootstrap import (
    RESAMPLING,
    Evaluation,
    FloatArray,
    Metric,
    Resampling,
    Units,
    bootstrap_sums,
    summarise,
    unavailable,
)
from polytope_hsae.evaluation.firings import GROUPS, Firings, firing_metrics, usage_metrics
from polytope_hsae.lm import NO_HEAD, Edit, LanguageModel
from polytope_hsae.lm.edits import EditedRuns
from polytope_hsae.models.base import SparseAutoencoder

LM_METRICS = (
    "ce_recovered", "delta_ce", "kl", "ev_logit", "ce_clean", "ce_ablated", "ce_spliced",
    "ce_recovered_massive_kept", "delta_ce_massive_kept", "kl_massive_kept",
)  # fmt: skip


@torch.no_grad()
def evaluate_reconstruction(
    sae: SparseAutoencoder,
    store: ActivationStore,
    split: str,
    train_mean_d: Tensor,
    *,
    massive: ActivationStore | None = None,
    sigma_dd: Tensor | None = None,
    batch_size: int = 4096,
    resampling: Resampling = RESAMPLING,
) -> Evaluation:
    """EV in several metrics, L0, and how the latents are used, over one split.

    `ev` = 1 - SSE/SST and `fvu` = SSE/SST with SST centred on the train mean `train_mean_d` [d] (raw units), over the
    rows of `store`. `ev_all_rows` and `fvu_all_rows` are over those and the rows of massive norm, which the store
    `massive` holds; `ev_row_mean` is the mean over all of them of a row's own EV, 1 - |error|^2 / |deviation|^2.
    `ev_causal` is `ev` with errors and deviations e measured by e' sigma e, where `sigma_dd` [d, d] is given; `l0`
    counts parents and children with value > 0, per row. Intervals are over documents. `ev_dimension` is the mean over
    the d coordinates of each one's own EV and `ev_dimension_q05` their 5 % quantile, with intervals over groups of
    documents. `firings.py` has what is said of use. Raises ValueError for an empty split or a model in training mode.
    """
    device = sae.write_directions().device
    docs_U, doc_of_row_N = np.unique(store.column(split, "doc").cpu().numpy(), return_inverse=True)
    if not docs_U.size:
        raise ValueError(f"split: found no rows in {split!r}, allowed: at least one document")
    unit_of_row_N = torch.from_numpy(doc_of_row_N).to(device)
    mean_d = train_mean_d.to(device, torch.float32)
    root_dd = None if sigma_dd is None else _root(sigma_dd).to(device, torch.float32)
    n_groups = min(GROUPS, len(docs_U))
    sums_U8 = torch.zeros(len(docs_U), 8, dtype=torch.float64, device=device)
    of_dimension_2Gd = torch.zeros(2, n_groups, len(mean_d), dtype=torch.float64, device=device)
    firings = Firings(sae.n_parents, sae.n_children, device, n_groups)
    for acts_Bd, start in store.batches(split, batch_size):
        acts_Bd = acts_Bd.to(device)
        codes = sae.encode(acts_Bd)
        errors = acts_Bd - sae.decode(codes), acts_Bd - mean_d
        unit_B = unit_of_row_N[start : start + len(acts_Bd)]
        group_B = unit_B % n_groups
        columns = _row_columns(*errors)
        columns += [codes.l0().to(columns[0]), torch.ones_like(columns[0])]
        if root_dd is not None:
            columns += [(part_Bd @ root_dd).square().sum(-1) for part_Bd in errors]
        sums_U8[:, : len(columns)].index_add_(0, unit_B, torch.stack(columns, dim=1).double())
        member_GB = (group_B == torch.arange(n_groups, device=device).unsqueeze(1)).to(acts_Bd)
        for sums_Gd, part_Bd in zip(of_dimension_2Gd, errors, strict=True):
            sums_Gd += member_GB @ part_Bd.square()
        firings.add(codes, group_B)
    sse_U, sst_U, _, _, l0_U, rows_U, causal_sse_U, causal_sst_U = sums_U8.cpu().numpy().T
    units = {
        "ev": Units.ratio(sst_U - sse_U, sst_U, docs_U),
        "fvu": Units.ratio(sse_U, sst_U, docs_U),
        "l0": Units.ratio(l0_U, rows_U, docs_U),
        **_of_all_rows(sae, massive, split, mean_d, docs_U, sums_U8[:, :4].cpu().numpy(), batch_size),
    }
    if root_dd is not None:
        units["ev_causal"] = Units.ratio(causal_sst_U - causal_sse_U, causal_sst_U, docs_U)
    chance = {"ev": 0.0, "fvu": 1.0, "ev_causal": 0.0, "ev_all_rows": 0.0, "fvu_all_rows": 1.0, "ev_row_mean": 0.0}
    result = summarise(units, chance, *resampling)
    used = usage_metrics(firings, resampling) | firing_metrics(firings, resampling)
    return Evaluation(result.metrics | _of_dimension(of_dimension_2Gd.cpu().numpy(), resampling) | used, units)


def _row_columns(error_Bd: Tensor, deviation_Bd: Tensor) -> list[Tensor]:
    """By row [B]: squared error, squared deviation, their EV, and 1; 0 for the last two where the row is the mean."""
    sse_B, sst_B = error_Bd.square().sum(-1), deviation_Bd.square().sum(-1)
    varies_B = sst_B > 0
    return [sse_B, sst_B, torch.where(varies_B, 1 - sse_B / sst_B, 0), varies_B.to(sse_B)]


def _of_all_rows(
    sae: SparseAutoencoder,
    massive: ActivationStore | None,
    split: str,
    mean_d: Tensor,
    docs_U: NDArray[np.int64],
    sums_U4: FloatArray,
    batch_size: int,
) -> dict[str, Units]:
    """Units of EV over all rows: the sums [U, 4] of `_row_columns` over the other rows, and those of massive norm."""
    doc_N = docs_U[:0] if massive is None else massive.column(split, "doc").cpu().numpy()
    all_docs_U = np.union1d(docs_U, doc_N)
    total_U4 = np.zeros((len(all_docs_U), 4))
    total_U4[np.searchsorted(all_docs_U, docs_U)] = sums_U4
    for acts_Bd, start in massive.batches(split, batch_size) if massive is not None else ():
        acts_Bd = acts_Bd.to(mean_d.device)
        columns = _row_columns(acts_Bd - sae.decode(sae.encode(acts_Bd)), acts_Bd - mean_d)
        unit_B = np.searchsorted(all_docs_U, doc_N[start : start + len(acts_Bd)])
        np.add.at(total_U4, unit_B, torch.stack(columns, dim=1).double().cpu().numpy())
    sse_U, sst_U, row_ev_U, varies_U = total_U4.T
    return {
        "ev_all_rows": Units.ratio(sst_U - sse_U, sst_U, all_docs_U),
        "fvu_all_rows": Units.ratio(sse_U, sst_U, all_docs_U),
        "ev_row_mean": Units.ratio(row_ev_U, varies_U, all_docs_U),
    }


def _root(sigma_dd: Tensor) -> Tensor:
    """R [d, d] with R R' = sigma, for a symmetric sigma without negative eigenvalues."""
    values_d, vectors_dd = torch.linalg.eigh(sigma_dd.double())
    return vectors_dd * values_d.clamp_min(0).sqrt()


def _of_dimension(sums_2Gd: FloatArray, resampling: Resampling) -> dict[str, Metric]:
    """Mean and 5 % quantile of the EV of the coordinates that vary."""
    varies_d = sums_2Gd[1].sum(0) > 0
    columns_GK = np.concatenate(list(sums_2Gd[:, :, varies_d]), axis=1)

    def ev(sums: FloatArray) -> FloatArray:
        sse, sst = np.split(sums, 2, axis=-1)
        return 1 - sse / sst

    if not varies_d.any():
        return dict.fromkeys(("ev_dimension", "ev_dimension_q05"), unavailable("no coordinate varies", 0.0))
    return {
        "ev_dimension": bootstrap_sums(columns_GK, lambda sums: ev(sums).mean(-1), *resampling, 0.0),
        "ev_dimension_q05": bootstrap_sums(
            columns_GK, lambda sums: np.quantile(ev(sums), 0.05, axis=-1), *resampling, 0.0
        ),
    }


class _Clean:
    """The unedited model's predictions on contexts [B, T], which every edited one is compared with."""

    def __init__(self, logits_BTV: Tensor, ids_BT: Tensor, counted_BT: Tensor, named: slice | Tensor) -> None:
        self.ids_BT, self.counted_BT, self.named = ids_BT, counted_BT, named
        self.log_p = [self._log_p(logits_TV, row) for row, logits_TV in enumerate(logits_BTV)]
        self.ce_B = torch.stack([self._ce(log_p_NV, row) for row, log_p_NV in enumerate(self.log_p)])

    def _log_p(self, logits_TV: Tensor, row: int) -> Tensor:
        """log p [N, V] at the counted positions of a context."""
        return log_softmax(logits_TV[:-1][self.counted_BT[row]].float(), -1)

    def _ce(self, log_p_NV: Tensor, row: int) -> Tensor:
        return -log_p_NV.gather(-1, self.ids_BT[row, 1:][self.counted_BT[row], None]).double().sum()

    def compare(self, logits_BTV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per context, float64 [B], summed: next-token cross-entropy, KL(clean || logits), and the squared distance of
        the logits from the clean ones, both centred (a shift of all of them changes nothing). The distance is over the
        logits of ids that have a name, the first two are of the model's own distribution over all.
        """
        ce_B, kl_B, distance_B = [], [], []
        for row, logits_TV in enumerate(logits_BTV):
            log_p_NV = self._log_p(logits_TV, row)
            ce_B.append(self._ce(log_p_NV, row))
            change_NV = self.log_p[row] - log_p_NV
            kl_B.append((self.log_p[row].exp() * change_NV).sum(-1).double().sum())
            change_NW = change_NV[:, self.named]
            shift_N = change_NW.mean(-1).double()
            squared_N = torch.linalg.vector_norm(change_NW, dim=-1).double().square()
            distance_B.append((squared_N - change_NW.shape[-1] * shift_N.square()).sum())
        return torch.stack(ce_B), torch.stack(kl_B), torch.stack(distance_B)


@torch.no_grad()
def _language_model_sums(
    saes: Mapping[str, SparseAutoencoder],
    lm: LanguageModel,
    hook: str,
    ids_BT: Tensor,
    mask_BT: Tensor,
    mean_d: Tensor,
    norm_limit: float | None,
) -> dict[str, FloatArray]:
    """By model, sums per context [B, 14]: tokens, CE clean; of the ablated, then the spliced run CE, KL and squared
    distance of logits; then the same of both with the rows whose norm is above `norm_limit` left as they are.
    """
    limit = float("inf") if norm_limit is None else norm_limit
    massive = False  # whether a row of these contexts is

    def look(acts_BTd: Tensor) -> Tensor:
        nonlocal massive
        massive = bool(((acts_BTd.norm(dim=-1) > limit) & mask_BT.bool())[:, 1:].any())
        return acts_BTd

    def ablate(rows_Nd: Tensor) -> Tensor:
        return mean_d.to(rows_Nd).expand_as(rows_Nd)

    def spliced(sae: SparseAutoencoder) -> Edit:
        device = sae.write_directions().device
        return lambda rows_Nd: sae.decode(sae.encode(rows_Nd.to(device, torch.float32))).to(rows_Nd)

    def replaced(edit: Edit, below: float) -> Edit:
        """Rows [N, d] whose norm is at most `below` are edited, but for those of position 0."""

        def replace(acts_BTd: Tensor) -> Tensor:
            rows_Nd = acts_BTd[:, 1:].reshape(-1, acts_BTd.shape[-1])
            edited_Nd = torch.where(rows_Nd.norm(dim=-1, keepdim=True) <= below, edit(rows_Nd), rows_Nd)
            return torch.cat([acts_BTd[:, :1], edited_Nd.view_as(acts_BTd[:, 1:])], dim=1)

        return replace

    counted_BT = mask_BT[:, 1:].bool() & mask_BT[:, :-1].bool()
    counted_BT[:, 0] = False  # nothing is edited at position 0, so its prediction cannot change
    runs = EditedRuns(lm, ids_BT, hook, mask_BT)
    clean = _Clean(runs.logits(look), ids_BT, counted_BT, lm.named)

    def both(edit: Edit) -> list[tuple[Tensor, Tensor, Tensor]]:
        every = clean.compare(runs.logits(replaced(edit, float("inf"))))
        return [every, clean.compare(runs.logits(replaced(edit, limit))) if massive else every]

    ablated = both(ablate)
    sums = {}
    for name, sae in saes.items():
        columns = [counted_BT.sum(-1).double(), clean.ce_B]
        for pair in zip(ablated, both(spliced(sae)), strict=True):
            columns += [column for compared in pair for column in compared]
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
    norm_limit: float | None = None,
    batch_size: int = 8,
    resampling: Resampling = RESAMPLING,
) -> dict[str, Evaluation]:
    """By model, cross-entropy and KL (nats per token) with its reconstruction spliced in at `hook`, on contexts [N, T].

    `ce_recovered` = (ablated - spliced)/(ablated - clean), where ablated replaces the hook's rows by the train mean;
    `delta_ce` = spliced - clean; `kl` = KL(clean || spliced); `ev_logit` = 1 - D(spliced)/D(ablated) with D the squared
    distance of the tokens' logits from the clean ones, both centred over tokens. Metrics ending in `_massive_kept` are
    the same with rows whose norm is above `norm_limit` (None: no limit) left as they are, in the ablated run too.
    Position 0 is left untouched in all runs, because the store never holds it and no model is trained on it; its
    prediction, which then cannot change, and the last position, which predicts nothing, are not counted. `documents`
    [N] names each context's document (default: each context is one); `mask_NT` is 1 on tokens and 0 on padding at the
    right. Chance of `delta_ce` and `kl` is what mean ablation costs, of the cross-entropies a uniform guess. A language
    model without an output head gives nulls. The clean and the ablated run are shared by all models.
    """
    if not lm.has_head:
        return {name: Evaluation({metric: unavailable(NO_HEAD) for metric in LM_METRICS}) for name in saes}
    if ids_NT.ndim != 2 or ids_NT.shape[0] < 1 or ids_NT.shape[1] < 3:
        raise ValueError(f"contexts: found shape {tuple(ids_NT.shape)}, allowed: [N >= 1, T >= 3]")
    mask_NT = torch.ones_like(ids_NT) if mask_NT is None else mask_NT
    order_N = torch.argsort(mask_NT.sum(1), stable=True)  # contexts of one length share a batch
    sums_N14 = {name: np.zeros((len(ids_NT), 14)) for name in saes}
    for members_B in order_N.split(batch_size):
        longest = int(mask_NT[members_B].sum(1).max())
        ids_BT, mask_BT = (x_NT[members_B, : max(longest, 3)].to(lm.device) for x_NT in (ids_NT, mask_NT))
        of_batch = _language_model_sums(saes, lm, hook, ids_BT, mask_BT, train_mean_d, norm_limit)
        for name, sums_B14 in of_batch.items():
            sums_N14[name][members_B.numpy()] = sums_B14
    keys = np.arange(len(ids_NT)) if documents is None else np.asarray(documents, dtype=np.int64)
    return {name: _language_model_metrics(sums, keys, lm.n_named, resampling) for name, sums in sums_N14.items()}


def _language_model_metrics(
    sums_N14: FloatArray, keys: NDArray[np.int64], n_tokens: int, resampling: Resampling
) -> Evaluation:
    docs_U, doc_of_context_N = np.unique(keys, return_inverse=True)
    sums_U14 = np.zeros((len(docs_U), sums_N14.shape[1]))
    np.add.at(sums_U14, doc_of_context_N, sums_N14)
    tokens_U, clean_U, *compared = sums_U14.T
    tokens = tokens_U.sum()
    if tokens == 0:
        raise ValueError("contexts: found no position to count, allowed: three unmasked tokens in a row")
    units: dict[str, Units] = {}
    chance: dict[str, float] = {}
    for kept, columns in (("", compared[:6]), ("_massive_kept", compared[6:])):
        ablated_U, kl_ablated_U, far_U, spliced_U, kl_spliced_U, near_U = columns
        units |= {
            f"ce_recovered{kept}": Units.ratio(ablated_U - spliced_U, ablated_U - clean_U, docs_U),
            f"delta_ce{kept}": Units.ratio(spliced_U - clean_U, tokens_U, docs_U),
            f"kl{kept}": Units.ratio(kl_spliced_U, tokens_U, docs_U),
        }
        chance |= {
            f"ce_recovered{kept}": 0.0,
            f"delta_ce{kept}": float((ablated_U - clean_U).sum() / tokens),
            f"kl{kept}": float(kl_ablated_U.sum() / tokens),
        }
        if not kept:
            units["ev_logit"], chance["ev_logit"] = Units.ratio(far_U - near_U, far_U, docs_U), 0.0
            for name, ce_U in (("ce_clean", clean_U), ("ce_ablated", ablated_U), ("ce_spliced", spliced_U)):
                units[name], chance[name] = Units.ratio(ce_U, tokens_U, docs_U), float(np.log(n_tokens))
    result = summarise(units, chance, *resampling)
    why = "mean ablation does not raise the cross-entropy, so there is nothing to recover"
    for kept in ("", "_massive_kept"):
        if chance[f"delta_ce{kept}"] <= 0:
            del units[f"ce_recovered{kept}"]
            result.metrics[f"ce_recovered{kept}"] = unavailable(why, 0.0)
    return result
