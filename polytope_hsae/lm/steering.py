"""Steering: a vector added to a hook's activations in every pass of a language model, those of `generate` among them.

Shapes: B sequences, T positions of a pass, S positions seen so far, d width of the hook.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from polytope_hsae.lm.model import FINAL_HOOK, LanguageModel


@contextmanager
def added(lm: LanguageModel, hook: str, vector_d: Tensor) -> Iterator[None]:
    """Within this, every pass of `lm.model` adds a vector [d] to the activations at `hook`.

    Padding on either side (0 in `attention_mask`) and the first token of every sequence stay as they are: no model is
    trained on either. With a cache of keys and values each new token is changed once, in its own pass. At the end of
    the block the model is as it was, also after an error.
    Raises ValueError for an unknown hook, a width that is not the hook's, and a mask that is not [B, S].
    """
    hook = lm.resolve_hook(hook)
    if hook == FINAL_HOOK:
        lm._require_head("steering at the final residual")
    changed: list[Tensor] = []  # mask [B, S] of this pass

    def see(module: nn.Module, args: Any, options: dict[str, Any]) -> None:
        changed[:] = [_changed(args, options)]

    def add(acts_BTd: Tensor) -> Tensor:
        if acts_BTd.shape[2] != len(vector_d):
            raise ValueError(f"steer: found a vector of width {len(vector_d)}, allowed: {acts_BTd.shape[2]} at {hook}")
        # A head may be given the last positions only.
        mask_BT1 = changed[0][:, -acts_BTd.shape[1] :, None].to(acts_BTd.device)
        return torch.where(mask_BT1, acts_BTd + vector_d.to(acts_BTd), acts_BTd)

    handles = [lm.model.register_forward_pre_hook(see, with_kwargs=True), lm._attach(hook, add, Counter(), None)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _changed(args: Any, options: dict[str, Any]) -> Tensor:
    """Which of the positions seen so far are tokens after the first one of their sequence: mask [B, S]."""
    read = next(x for x in (*args[:1], options.get("input_ids"), options.get("inputs_embeds")) if x is not None)
    mask_BS = options.get("attention_mask")
    if mask_BS is None:
        cache = options.get("past_key_values")
        seen = 0 if cache is None else cache.get_seq_length()
        mask_BS = torch.ones(len(read), seen + read.shape[1], dtype=torch.bool)
    if not isinstance(mask_BS, Tensor) or mask_BS.ndim != 2:
        found = tuple(mask_BS.shape) if isinstance(mask_BS, Tensor) else type(mask_BS).__name__
        raise ValueError(f"steer: found an attention_mask of {found}, allowed: [sequences, positions]")
    return mask_BS.bool() & (mask_BS.bool().cumsum(1) > 1)
