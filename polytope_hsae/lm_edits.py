"""Many edits of one hook on the same contexts: the blocks before the hook run once.

Shapes: B sequences, T positions, d width of the hook, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from polytope_hsae.lm import FINAL_HOOK, Edit, LanguageModel
from polytope_hsae.lm_config import block_list


class EditedRuns:
    """Logits of the contexts `ids` [B,T] under any number of edits at `hook`; numbers are those of `run_with_edit`.

    The first run keeps what the last block up to the hook gave; later runs hand that on instead of running the blocks.
    An edit must not change the activations that it gets in place.
    """

    def __init__(self, lm: LanguageModel, ids_BT: Tensor, hook: str, mask_BT: Tensor | None = None) -> None:
        self.lm, self.ids_BT, self.hook, self.mask_BT = lm, ids_BT, hook, mask_BT
        self.blocks = blocks_up_to(lm, hook)
        self._output: Any = None

    def logits(self, edit: Edit) -> Tensor:
        """Logits float32 [B,T,V] with the hook's activations replaced by `edit(acts_BTd)`; raises as `capture` does."""
        with self._kept_output():
            return self.lm.run_with_edit(self.ids_BT, self.hook, edit, mask=self.mask_BT)

    @contextmanager
    def _kept_output(self) -> Iterator[None]:
        if not self.blocks:
            yield
            return
        run_last = self.blocks[-1].forward

        def keep(*args: Any, **options: Any) -> Any:
            self._output = run_last(*args, **options)
            return self._output

        def hand_on(*args: Any, **options: Any) -> Any:
            return self._output

        replaced = self.blocks[-1:] if self._output is None else self.blocks
        function = keep if self._output is None else hand_on
        for block in replaced:
            block.forward = function
        try:
            yield
        finally:
            for block in replaced:
                del block.forward  # the class's own is there again


def blocks_up_to(lm: LanguageModel, hook: str) -> list[nn.Module]:
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
    foreign = any("forward" in vars(block) for block in blocks)  # somebody else has replaced it already
    return [] if foreign else blocks[:done]
