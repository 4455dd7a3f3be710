"""Many edits of one hook on the same contexts: the blocks before the hook run once.

Shapes: B sequences, T positions, d width of the hook, V vocabulary; M fixed contexts and G edits of each.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from polytope_hsae.lm.architecture import block_list
from polytope_hsae.lm.model import FINAL_HOOK, Edit, LanguageModel


class EditedRuns:
    """Logits of the contexts `ids` [B,T] under any number of edits at `hook`; numbers are those of `run_with_edit`.

    The first run keeps what the last block up to the hook gave; later runs hand that on instead of running the blocks.
    An edit must not change the activations that it gets in place.
    """

    def __init__(self, lm: LanguageModel, ids_BT: Tensor, hook: str, mask_BT: Tensor | None = None) -> None:
        self.lm, self.ids_BT, self.hook, self.mask_BT = lm, ids_BT, lm.resolve_hook(hook), mask_BT
        self._blocks = _FirstBlocks(lm, self.hook)

    def logits(self, edit: Edit) -> Tensor:
        """Logits float32 [B,T,V] with the hook's activations replaced by `edit(acts_BTd)`; raises as `capture` does."""
        with self._blocks.run_once():
            return self.lm.run_with_edit(self.ids_BT, self.hook, edit, mask=self.mask_BT)


class LastPosition:
    """Next-token logits of fixed contexts [M,T] under edits of a hook's activations at the last position.

    Such an edit leaves everything before it as it was: the prefix runs once, and an edit costs a pass of the last token
    through the blocks after the hook, with the prefix's keys and values. `cached` says whether that is done. It needs
    a cache of nothing but a key and a value per position. Any other model (sliding windows as in Gemma-2, recurrent
    states, keys shared between layers) runs all positions, with the same results; so do contexts of a single token.
    """

    @torch.no_grad()
    def __init__(self, lm: LanguageModel, ids_MT: Tensor, hook: str) -> None:
        lm._require_head("a run with an edit")
        self.lm, self.ids_MT, self.hook = lm, ids_MT, lm.resolve_hook(hook)
        self._blocks = _FirstBlocks(lm, self.hook)
        self._cache: DynamicCache | None = None
        if ids_MT.shape[-1] > 1:
            output = lm._forward(ids_MT[:, :-1], None, {}, "one", use_cache=True)
            found = getattr(output, "past_key_values", None)
            self._cache = found if _is_plain(found, ids_MT.shape[1] - 1) else None
        self.cached = self._cache is not None

    @torch.no_grad()
    def logits(self, added_GMd: Tensor) -> Tensor:
        """Logits (float32 [G,M,V]) after the last position, with each of `added` [G,M,d] added there.

        Equal to `run_with_edit(..., last_only=True)` up to rounding. Raises ValueError as that does.
        """
        n_edits, n_contexts, width = added_GMd.shape
        # Rows are context by context, as `batch_repeat_interleave` lays the cache out.
        ids_BT = self.ids_MT.repeat_interleave(n_edits, dim=0)
        added_Bd = added_GMd.transpose(0, 1).reshape(-1, width)

        def edit(acts_BTd: Tensor) -> Tensor:
            edited_BTd = acts_BTd.clone()
            edited_BTd[:, -1] += added_Bd.to(acts_BTd)
            return edited_BTd

        with self._blocks.run_once(n_edits):
            if self._cache is None:
                logits_BV = self.lm.run_with_edit(ids_BT, self.hook, edit, last_only=True)
            else:
                cache = copy.deepcopy(self._cache)  # a pass appends to its cache
                cache.batch_repeat_interleave(n_edits)
                hooks = {self.hook: edit}
                output = self.lm._forward(ids_BT[:, -1:], None, hooks, None, past_key_values=cache, use_cache=True)
                logits_BV = output.logits[:, 0].float()
        return logits_BV.view(n_contexts, n_edits, -1).transpose(0, 1)


def _is_plain(cache: Any, length: int) -> bool:
    """Whether a cache is nothing but the keys and values of `length` positions in every layer."""
    return (
        type(cache) is DynamicCache
        and len(cache.layers) > 0
        and all(type(layer) is DynamicLayer and layer.get_seq_length() == length for layer in cache.layers)
    )


class _FirstBlocks:
    """The blocks that have run, whole, when a hook sees its activations: the output of the last one is kept."""

    def __init__(self, lm: LanguageModel, hook: str) -> None:
        self.blocks = _blocks_up_to(lm, hook)
        self._output: Any = None

    @contextmanager
    def run_once(self, copies: int = 1) -> Iterator[None]:
        """Within this, a pass over `copies` adjacent copies of every context runs the blocks only the first time."""
        if not self.blocks:
            yield
            return
        run_last = self.blocks[-1].forward

        def keep(*args: Any, **options: Any) -> Any:
            output = run_last(*args, **options)
            self._output = _of_tensors(output, lambda rows: rows[::copies])
            return output

        def hand_on(*args: Any, **options: Any) -> Any:
            return _of_tensors(self._output, lambda rows: rows.repeat_interleave(copies, dim=0))

        first = self._output is None
        replaced = self.blocks[-1:] if first else self.blocks
        for block in replaced:
            block.forward = keep if first else hand_on
        try:
            yield
        finally:
            for block in replaced:
                del block.forward  # the class's own is there again


def _of_tensors(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A block's output with `change` applied to its tensors, which are all batch first."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple | list):
        return type(output)(_of_tensors(part, change) for part in output)
    return output


def _blocks_up_to(lm: LanguageModel, hook: str) -> list[nn.Module]:
    """The model's blocks that have run, whole, when `hook` sees its activations; none where that cannot be told."""
    name = block_list(lm.model)
    if name is None:
        return []
    blocks = list(lm.model.get_submodule(name).children())
    first, _, rest = hook.removeprefix(f"{name}.").partition(".")
    if hook == FINAL_HOOK:
        done = len(blocks)
    elif hook.startswith(f"{name}.") and first.isdigit():
        done = int(first) + (not rest)
    else:
        done = 0
    foreign = any("forward" in vars(block) for block in blocks)  # other code has replaced it already
    return [] if foreign else blocks[:done]
