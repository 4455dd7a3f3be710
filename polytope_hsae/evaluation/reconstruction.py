"""How well an autoencoder rebuilds activations, and what the language model loses by it (docs/method.md §5).

Sums are kept per document and pooled over the whole split; batches never enter a value.

Shapes: N rows, d residual width, B rows (or contexts) of a batch, T positions, V vocabulary, U documents, G groups of
documents.
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
    bootstrap_sums,
    summarise,
    unavailable,
)
from polytope_hsae.evaluation.firings import GROUPS, Firings, check_eval_mode, firing_metrics, usage_metrics
from polytope_hsae.lm import Edit, LanguageModel
from polytope_hsae.lm_edits import EditedRuns
from polytope_hsae.models.base import SparseAutoencoder

NO_HEAD = "the language model has no output head"
LM_METRICS = ("ce_recovered", "delta_ce", "kl", "ev_logit", "ce_clean", "ce_ablated", "ce_spliced")


@torch.no_grad()
def evaluate_reconstruction(
    sae: SparseAutoencoder,
    store: ActivationStore,
    split: str,
    train_mean_d: Tensor,
    *,
    sigma_dd: Tensor | None = None,
    batch_size: int = 4096,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """EV in several metrics, L0, and how the latents are used, over one split.

    `ev` = 1 - SSE/SST and `fvu` = SSE/SST with SST centred on the train mean `train_mean_d` [d] (raw units);
    `ev_causal` the same with errors and deviations e measured by e' sigma e, where `sigma_dd` [d, d] is given;
    `l0` counts parents and children with value > 0, per row. Intervals are over documents. `ev_dimension` is the mean
    over the d coordinates of each one's own EV and `ev_dimension_q05` their 5 % quantile, with intervals over groups of
    documents. `firings.py` has what is said of use. Raises ValueError for an empty split or a model in training mode.
    """
    check_eval_mode(sae)
    device = sae.write_directions().device
    docs_U, doc_of_row_N = np.unique(store.column(split, "doc").cpu().numpy(), return_inverse=True)
    if not docs_U.size:
        raise ValueError(f"split: found no rows in {split!r}, allowed: at least one document")
    unit_of_row_N = torch.from_numpy(doc_of_row_N).to(device)
    mean_d = train_mean_d.to(device, torch.float32)
    root_dd = None if sigma_dd is None else _root(sigma_dd).to(device, torch.float32)
    n_groups = min(GROUPS, len(docs_U))
    sums_U6 = torch.zeros(len(docs_U), 6, dtype=torch.float64, device=device)
    of_dimension_2Gd = torch.zeros(2, n_groups, len(mean_d), dtype=torch.float64, device=device)
    firings = Firings(sae.n_parents, sae.n_children, device, n_groups)
    for acts_Bd, start in store.batches(split, batch_size):
        acts_Bd = acts_Bd.to(device)
        codes = sae.encode(acts_Bd)
        errors = acts_Bd - sae.decode(codes), acts_Bd - mean_d
        unit_B = unit_of_row_N[start : start + len(acts_Bd)]
        group_B = unit_B % n_groups
        columns = [part_Bd.square().sum(-1) for part_Bd in errors]
        columns += [codes.l0().to(columns[0]), torch.ones_like(columns[0])]
        if root_dd is not None:
            columns += [(part_Bd @ root_dd).square().sum(-1) for part_Bd in errors]
        sums_U6[:, : len(columns)].index_add_(0, unit_B, torch.stack(columns, dim=1).double())
        member_GB = (group_B == torch.arange(n_groups, device=device).unsqueeze(1)).to(acts_Bd)
        for sums_Gd, part_Bd in zip(of_dimension_2Gd, errors, strict=True):
            sums_Gd += member_GB @ part_Bd.square()
        firings.add(codes, group_B)
    sse_U, sst_U, l0_U, rows_U, causal_sse_U, causal_sst_U = sums_U6.cpu().numpy().T
    units = {
        "ev": Units.ratio(sst_U - sse_U, sst_U, docs_U),
        "fvu": Units.ratio(sse_U, sst_U, docs_U),
        "l0": Units.ratio(l0_U, rows_U, docs_U),
    }
    if root_dd is not None:
        units["ev_causal"] = Units.ratio(causal_sst_U - causal_sse_U, causal_sst_U, docs_U)
    result = summarise(units, {"ev": 0.0, "fvu": 1.0, "ev_causal": 0.0}, bootstrap, seed)
    used = usage_metrics(firings, bootstrap, seed) | firing_metrics(firings, bootstrap, seed)
    return Evaluation(result.metrics | _of_dimension(of_dimension_2Gd.cpu().numpy(), bootstrap, seed) | used, units)


def _root(sigma_dd: Tensor) -> Tensor:
    """R [d, d] with R R' = sigma, for a symmetric sigma without negative eigenvalues."""
    values_d, vectors_dd = torch.linalg.eigh(sigma_dd.double())
    return vectors_dd * values_d.clamp_min(0).sqrt()


def _of_dimension(sums_2Gd: FloatArray, n: int, seed: int) -> dict[str, Metric]:
    """Mean and 5 % quantile of the EV of the coordinates that vary."""
    varies_d = sums_2Gd[1].sum(0) > 0
    columns_GK = np.concatenate(list(sums_2Gd[:, :, varies_d]), axis=1)

    def ev(sums: FloatArray) -> FloatArray:
        sse, sst = np.split(sums, 2, axis=-1)
        return 1 - sse / sst

    if not varies_d.any():
        return dict.fromkeys(("ev_dimension", "ev_dimension_q05"), unavailable("no coordinate varies", 0.0))
    return {
        "ev_dimension": bootstrap_sums(columns_GK, lambda sums: ev(sums).mean(-1), n, seed, 0.0),
        "ev_dimension_q05": bootstrap_sums(columns_GK, lambda sums: np.quantile(ev(sums), 0.05, axis=-1), n, seed, 0.0),
    }


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

    def compare(self, logits_BTV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per context, float64 [B], summed: next-token cross-entropy, KL(clean || logits), and the squared distance of
        the logits from the clean ones, both centred over the vocabulary (a shift of all of them changes nothing).
        """
        ce_B, kl_B, distance_B = [], [], []
        for row, logits_TV in enumerate(logits_BTV):
            log_p_NV = self._log_p(logits_TV, row)
            ce_B.append(self._ce(log_p_NV, row))
            change_NV = self.log_p[row] - log_p_NV
            kl_B.append((self.log_p[row].exp() * change_NV).sum(-1).double().sum())
            shift_N = change_NV.mean(-1).double()
            squared_N = torch.linalg.vector_norm(change_NV, dim=-1).double().square()
            distance_B.append((squared_N - change_NV.shape[-1] * shift_N.square()).sum())
        return torch.stack(ce_B), torch.stack(kl_B), torch.stack(distance_B)


@torch.no_grad()
def _language_model_sums(
    saes: Mapping[str, SparseAutoencoder],
    lm: LanguageModel,
    hook: str,
    ids_BT: Tensor,
    mask_BT: Tensor,
    mean_d: Tensor,
) -> dict[str, FloatArray]:
    """By model, sums per context [B, 8]: tokens, CE clean; of the ablated, then the spliced run CE, KL and squared
    distance of logits.
    """

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
    ablated = clean.compare(runs.logits(ablate))
    sums = {}
    for name, sae in saes.items():
        columns = [counted_BT.sum(-1).double(), clean.ce_B, *ablated, *clean.compare(runs.logits(spliced(sae)))]
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
    `delta_ce` = spliced - clean; `kl` = KL(clean || spliced); `ev_logit` = 1 - D(spliced)/D(ablated) with D the squared
    distance of the logits from the clean ones, both centred over the vocabulary. Position 0 is left untouched in all
    runs, because the store never holds it and no model is trained on it; its prediction, which then cannot change, and
    the last position, which predicts nothing, are not counted. `documents` [N] names each context's document (default:
    each context is one); `mask_NT` is 1 on tokens and 0 on padding at the right. Chance of `delta_ce` and `kl` is what
    mean ablation costs, of the cross-entropies a uniform guess. A language model without an output head gives nulls.
    The clean and the ablated run are shared by all models.
    """
    if not lm.has_head:
        return {name: Evaluation({metric: unavailable(NO_HEAD) for metric in LM_METRICS}) for name in saes}
    for sae in saes.values():
        check_eval_mode(sae)
    if ids_NT.ndim != 2 or ids_NT.shape[0] < 1 or ids_NT.shape[1] < 3:
        raise ValueError(f"contexts: found shape {tuple(ids_NT.shape)}, allowed: [N >= 1, T >= 3]")
    mask_NT = torch.ones_like(ids_NT) if mask_NT is None else mask_NT
    order_N = torch.argsort(mask_NT.sum(1), stable=True)  # contexts of one length share a batch
    sums_N8 = {name: np.zeros((len(ids_NT), 8)) for name in saes}
    for members_B in order_N.split(batch_size):
        longest = int(mask_NT[members_B].sum(1).max())
        ids_BT, mask_BT = (x_NT[members_B, : max(longest, 3)].to(lm.device) for x_NT in (ids_NT, mask_NT))
        for name, sums_B8 in _language_model_sums(saes, lm, hook, ids_BT, mask_BT, train_mean_d).items():
            sums_N8[name][members_B.numpy()] = sums_B8
    keys = np.arange(len(ids_NT)) if documents is None else np.asarray(documents, dtype=np.int64)
    return {name: _language_model_metrics(sums, keys, lm.vocab_size, bootstrap, seed) for name, sums in sums_N8.items()}


def _language_model_metrics(
    sums_N8: FloatArray, keys: NDArray[np.int64], vocab_size: int, n: int, seed: int
) -> Evaluation:
    docs_U, doc_of_context_N = np.unique(keys, return_inverse=True)
    sums_U8 = np.zeros((len(docs_U), sums_N8.shape[1]))
    np.add.at(sums_U8, doc_of_context_N, sums_N8)
    tokens_U, clean_U, ablated_U, kl_ablated_U, far_U, spliced_U, kl_spliced_U, near_U = sums_U8.T
    units = {
        "ce_recovered": Units.ratio(ablated_U - spliced_U, ablated_U - clean_U, docs_U),
        "delta_ce": Units.ratio(spliced_U - clean_U, tokens_U, docs_U),
        "kl": Units.ratio(kl_spliced_U, tokens_U, docs_U),
        "ev_logit": Units.ratio(far_U - near_U, far_U, docs_U),
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
        "ev_logit": 0.0,
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
