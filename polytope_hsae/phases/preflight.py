"""Whether a config, a language model and a text go together: one line for what does not, before any work.

Phase 1 calls `check_model` first and `check_text` before the harvest. Phases 2 to 4 repeat the checks that concern
them: `check_arms`, `check_rows`, `check_contexts`, `check_layers`.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..config import ArmConfig, Config, ConfigError, FlatConfig, HSAEConfig
from ..data.checks import count_contexts
from ..data.concepts import Concepts
from ..data.corpus import Documents, contexts
from ..data.harvest import planned_rows
from ..data.prompts import TemplateDocuments
from ..data.store import LABELS
from ..lm import LanguageModel
from ..lm.loading import DTYPES
from ..models.flops import latents_for, parameter_count, training_flops
from ..units import size
from .run import Run

PROBE_TOKENS = 4
SQUARES = 8  # float64 matrices of width x width at once: scatter, covariance, eigenvectors, a metric and its roots
BYTES_PER_WEIGHT = 4 * 4  # float32 of each weight, its gradient and Adam's two moments
LABEL_BYTES = sum(dtype.itemsize for dtype in LABELS.values())
LEAST_TOKENS = 3  # of a context: the start, one that is edited, and one that it predicts


def check_model(run: Run) -> int:
    """The width of the hook's rows, by a pass over a few tokens. Raises ConfigError for contexts that the model cannot
    read, a hook that cannot be used, and arms and steering hooks that do not fit that width.
    """
    config = run.config
    run.lm.require_context(config.corpus.context_length)
    width = hook_width(run.lm, config.model.hook, config.data.dtype)
    check_arms(config, width, memory_of(run.device))
    check_layers(run, width)
    return width


def check_text(
    run: Run, width: int, concepts: Concepts, documents: Documents, members: Mapping[str, Tensor],
    templates: TemplateDocuments | None,
) -> None:  # fmt: skip
    """Raise ConfigError where the text is too short or too long for the config, or has none of the teacher's words."""
    config = run.config
    rows = planned_rows(documents, members, config.corpus.context_length)
    check_rows(config, rows["train"], concepts.n_parents)
    check_contexts(run, config.eval.split)
    require_disk(run.activations, sum(rows.values()), width, config.data.dtype)
    if not run.at_final_residual and templates is None:
        words = count_contexts(concepts, documents, members)["train"]
        if not words.any():
            found = f"no train word of {concepts.n_parents} parents in the train documents"
            raise ConfigError(f"concepts: found {found}, allowed: one, for the teacher at {config.model.hook}")


def check_arms(config: Config, width: int, memory: int) -> None:
    """Raise ConfigError when an arm's model cannot have rows of this width or needs more bytes than `memory`."""
    for arm in config.arms:
        require_trainable(arm, planned(config, arm, width), width, memory)
        if arm.init != "random" and config.arm_teacher(arm).rotate_deg > 0 and width % 2:
            turned = config.arm_teacher(arm).rotate_deg
            raise ConfigError(f"teacher.rotate_deg: found {turned}, allowed: 0 at the odd width {width}, or noise_deg")


def check_rows(config: Config, n_train: int, n_teacher: int) -> None:
    """Raise ConfigError for a batch of more rows than there are, and a model of fewer parents than its teacher."""
    require_batch("training.batch_size", config.training.batch_size, n_train)
    for arm in config.arms:
        n_parents = config.arm_hsae(arm).n_parents
        if arm.init != "random" and n_teacher > n_parents:
            allowed = f"at least the teacher's {n_teacher} parents"
            raise ConfigError(f"hsae.n_parents: found {n_parents}, allowed: {allowed}")


def check_contexts(run: Run, split: str) -> Tensor:
    """The contexts [n, 3] of a split that are long enough to be edited. Raises ConfigError where there is none."""
    documents, members = run.documents
    rows_n3 = contexts(documents, members[split], run.config.corpus.context_length)
    rows_n3 = rows_n3[rows_n3[:, 2] >= LEAST_TOKENS]
    if not len(rows_n3):
        allowed = f"one context of {LEAST_TOKENS} tokens or more"
        raise ConfigError(f"corpus: found none in the {split} documents, allowed: {allowed}")
    return rows_n3


def check_layers(run: Run, width: int) -> None:
    """Raise ConfigError for a steering hook that the model lacks or whose rows have another width than the hook's."""
    for layer in run.config.eval.steering.layers:
        found = hook_width(run.lm, layer, "float32", "eval.steering.layers")
        if found != width:
            allowed = f"width {width}, that of {run.config.model.hook}"
            raise ConfigError(f"eval.steering.layers: found {layer} of width {found}, allowed: {allowed}")


@torch.no_grad()
def hook_width(lm: LanguageModel, hook: str, dtype: str, field: str = "model.hook") -> int:
    """Width of the rows at a hook, by a pass over a few tokens. Raises ConfigError, naming `field`, for a hook that
    does not run once with rows of one width, or so wide that their statistics do not fit into memory; and for a stored
    `dtype` that cannot hold them.
    """
    ids_N = torch.arange(lm.vocab_size)[lm.named]
    ids_1T = ids_N[:: max(1, len(ids_N) // PROBE_TOKENS)][None, :PROBE_TOKENS]
    try:
        acts_Td = lm.capture(ids_1T, lm.resolve_hook(hook), final=True).acts[0]  # the whole pass, or reruns go unseen
    except ValueError as error:
        raise ConfigError(str(error).replace("model.hook", field, 1)) from error
    width, memory = acts_Td.shape[1], memory_of("cpu")
    needed = 8 * SQUARES * width**2
    if needed > memory:
        found = f"{hook!r} of width {width:,}, {size(needed)} of statistics"
        raise ConfigError(f"{field}: found {found}, allowed: what fits into {size(memory)}")
    if not torch.isfinite(acts_Td[1:].to(DTYPES[dtype])).all():
        raise ConfigError(f"data.dtype: found {dtype}, which cannot hold the rows at {hook}, allowed: a wider one")
    return width


def planned(config: Config, arm: ArmConfig, width: int) -> HSAEConfig | FlatConfig:
    """An arm's model, as far as it is known before training: of a matched arm's L0 only what was asked for is."""
    if arm.kind == "hsae":
        return config.arm_hsae(arm)
    flat = config.arm_flat(arm)
    for quantity, measure in (("params", parameter_count), ("flops", training_flops)):
        if quantity in arm.match:
            other = planned(config, config.arm(arm.match[quantity]), width)
            return config.arm_flat(arm, n_latents=latents_for(measure, flat, width, measure(other, width)))
    return flat


def require_trainable(arm: ArmConfig, made: HSAEConfig | FlatConfig, width: int, memory: int) -> None:
    """Raise ConfigError when a model has wider subspaces than the rows, or needs more bytes than `memory`."""
    if isinstance(made, HSAEConfig):
        s, taught = made.subspace_dim, arm.init != "random"  # a teacher's subspaces are orthogonal to their parent
        if (made.children == "factored" and s > width) or (taught and s > width - 1):
            allowed = f"at most {width - 1}, the width less 1" if taught else f"at most the width {width}"
            raise ConfigError(f"hsae.subspace_dim: found {s}, allowed: {allowed}")
    weights = parameter_count(made, width)
    if weights * BYTES_PER_WEIGHT > memory:
        found = f"{arm.name} with {weights:,} weights, {weights * BYTES_PER_WEIGHT / 1e9:,.0f} GB in training"
        parents = made.n_parents if isinstance(made, HSAEConfig) else made.n_latents
        allowed = f"what fits into {memory / 1e9:,.0f} GB"
        raise ConfigError(f"hsae.n_parents: found {parents} ({found}), allowed: {allowed}")


def require_batch(field: str, batch_size: int, n_train: int) -> None:
    """Raise ConfigError for a batch of more rows than train has."""
    if batch_size > n_train:
        raise ConfigError(f"{field}: found {batch_size}, allowed: 1 to {n_train} (the rows of train)")


def require_disk(folder: Path, n_rows: int, width: int, dtype: str) -> None:
    """Raise ConfigError unless what is missing of a store in `folder` fits on its disk."""
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    needed = n_rows * (width * DTYPES[dtype].itemsize + LABEL_BYTES) - there
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        found = f"{n_rows:,} rows of width {width}, {size(needed)} of {dtype} to be written"
        raise ConfigError(f"corpus.max_tokens: found {found}, allowed: the {size(free)} free on the disk of {folder}")


def memory_of(device: str) -> int:
    """Bytes of memory that a device has."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
