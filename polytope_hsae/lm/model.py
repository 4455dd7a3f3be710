"""Language models: unembedding, capture at a hook, splice an edit in.

The residual *after the final norm* is read where it is used: at the input of the output embedding module.
Shapes: B sequences, T positions, d residual width (of the hook), V vocabulary.
"""

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from polytope_hsae.fileio import sha256_json
from polytope_hsae.lm.architecture import block_list, hidden_size, logit_scale, max_context, n_blocks, softcap
from polytope_hsae.lm.loading import load_model, quiet_transformers
from polytope_hsae.lm.tokens import document_start, plain_ids, space_before, with_start

FINAL_HOOK = "final_residual_pre_unembed"
NO_HEAD = "the language model has no output head"
CHECK_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}

Edit = Callable[[Tensor], Tensor]
Observer = Callable[[Tensor], Tensor | None]  # sees a hook's activations and may replace them


class Captured(NamedTuple):
    """Activations at a hook, float32. `logits` [B,T,V] and `final` [B,T,d] only when asked for."""

    acts: Tensor
    logits: Tensor | None = None
    final: Tensor | None = None


class _Stop(BaseException):
    """Ends a forward pass from inside a hook. Not an Exception, so that no model's own code catches it."""


class LanguageModel:
    """A causal LM with its unembedding U (and bias, soft-cap) such that logits = softcap(U h + b).

    h is the residual after the final norm. A constant that the model multiplies its logits by is folded into U and b.
    A model without an output head, such as an encoder, has `has_head` False: U is its input embeddings, h its last
    hidden state, and what needs logits raises ValueError. `named` indexes the rows of U whose id the tokenizer names,
    special and added tokens too; the other rows only pad the vocabulary.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        name: str,
        has_head: bool,
        revision: str | None = None,
        tokenizer_sha256: str | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.has_head = has_head
        self._tokenizer_sha256 = tokenizer_sha256
        self._modules = {key: module for key, module in model.named_modules() if key}
        self.softcap: float | None = softcap(model) if has_head else None
        self.max_context: int | None = max_context(model)
        self.head: nn.Module | None = model.get_output_embeddings() if has_head else None
        if self.head is None:
            if has_head:
                raise ValueError(f"model.name: {name} is a causal LM but names no output embedding module")
            classes = ", ".join(model.config.architectures or ["none named"])
            warnings.warn(
                f"{name} has no output head ({classes}): its input embeddings stand in for the unembedding, "
                "and nothing that needs logits is available",
                stacklevel=2,
            )
        self.n_layers: int = n_blocks(model)
        scale = logit_scale(model) if has_head else 1.0
        source: Any = self.head if self.head is not None else model.get_input_embeddings()
        bias = getattr(source, "bias", None)
        self.unembedding: Tensor = _scaled(source.weight, scale)
        self.unembedding_bias: Tensor | None = None if bias is None else _scaled(bias, scale)
        self.vocab_size, self.width = self.unembedding.shape
        self.named = _named(tokenizer, self.vocab_size)

    @classmethod
    def load(
        cls, name: str, *, revision: str | None = None, dtype: str = "float32", device: str = "cpu"
    ) -> "LanguageModel":
        """Load a model and its tokenizer, and check on a few tokens that U h = logits and that it is causal.

        `name`: a hub id, a folder, or the name of a packaged model. `dtype`: float32, bfloat16 or float16.
        Raises ValueError (one line) for what `loading.load_model` refuses, and where a check fails.
        """
        loaded = load_model(name, revision=revision, dtype=dtype, device=device)
        lm = cls(**loaded._asdict())
        if lm.has_head:
            ids_1T = torch.arange(0, lm.vocab_size, max(1, lm.vocab_size // 12))[None]
            lm.check_unembedding(ids_1T)
            lm.check_causal(ids_1T)
        return lm

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return self.unembedding.device

    @property
    def n_named(self) -> int:
        """Rows of U whose id the tokenizer names."""
        return len(torch.arange(self.vocab_size)[self.named])

    @property
    def tokenizer_sha256(self) -> str:
        """SHA-256 of tokenizer.json; of the vocabulary (token, id) for a tokenizer that has no such file."""
        if self._tokenizer_sha256 is None:
            self._tokenizer_sha256 = sha256_json(self.tokenizer.get_vocab())
        return self._tokenizer_sha256

    def token_ids(self, text: str, start: str = "auto") -> Tensor:
        """A text as the model reads a document, int64 [1,T]: its start token once, and nothing after it.

        `start` is `corpus.document_start` (`tokens.document_start`): none for the text alone.
        """
        ids = plain_ids(self.tokenizer, [text])[0]
        return torch.tensor([with_start(ids, document_start(self.tokenizer, start))], dtype=torch.int64)

    def token_id(self, word: str) -> int:
        """The token of a word after a space. Raises ValueError for a word that is not one token."""
        ids = plain_ids(self.tokenizer, [space_before(self.tokenizer) + word])[0]
        if len(ids) != 1:
            raise ValueError(f"word: found {word!r}, {len(ids)} tokens of {self.name}, allowed: a word of one token")
        return ids[0]

    def require_context(self, length: int) -> None:
        """Raise ValueError when the model cannot read that many tokens at once."""
        if self.max_context is not None and length > self.max_context:
            allowed = f"at most {self.max_context}, what {self.name} reads"
            raise ValueError(f"corpus.context_length: found {length}, allowed: {allowed}")

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Within this a model of lower precision computes in float32, from the same weights.

        An activation in bfloat16 moves in steps of 0.4 %, so that a small edit of it cannot be met.
        """
        tensors = [*self.model.parameters(), *self.model.buffers()]
        stored = [(tensor, tensor.data) for tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)]
        for tensor, data in stored:
            tensor.data = data.float()
        try:
            yield
        finally:
            for tensor, data in stored:
                tensor.data = data

    def resolve_hook(self, hook: str) -> str:
        """The module's own name for `layers.N`, the N-th block whatever the model calls it (N < 0 from the end).

        TransformerLens's and SAELens's `blocks.N.hook_resid_post` is `layers.N`, `blocks.N.hook_resid_pre` the block
        before it. Any other hook is returned as it is. Raises ValueError for a block or a module that the model does
        not have, for the output head, and for the final residual of a model without a head whose input embeddings have
        another width.
        """
        hook = self._of_transformer_lens(hook)
        match = re.fullmatch(r"layers\.(-?\d+)", hook)
        if match is None or hook in self._modules:
            self._require_module(hook)
            if self.head is not None and self._modules.get(hook) is self.head:
                found = f"{hook!r}, the output head, whose rows are logits"
                raise ValueError(f"model.hook: found {found}; allowed: {FINAL_HOOK}, which it reads, layers.N, ...")
            hidden = hidden_size(self.model)
            if hook == FINAL_HOOK and self.head is None and hidden not in (None, self.width):
                found = f"{hook!r} of width {hidden}, but {self.name}'s embeddings have {self.width}"
                raise ValueError(f"model.hook: found {found}, allowed: layers.N")
            return hook
        number, blocks = int(match[1]), block_list(self.model)
        if blocks is None:
            raise ValueError(f"model.hook: found {hook!r}, but {self.name} has no single list of blocks; name a module")
        if not -self.n_layers <= number < self.n_layers:
            allowed = f"layers.{-self.n_layers} to layers.{self.n_layers - 1} for {self.name}"
            raise ValueError(f"model.hook: found {hook!r}, allowed: {allowed}")
        return f"{blocks}.{number % self.n_layers}"

    def _of_transformer_lens(self, hook: str) -> str:
        """`layers.N` for TransformerLens's name of a block's residual; a hook of any other form as it is.

        Raises ValueError for TransformerLens's other names, with what to use instead.
        """
        match = re.fullmatch(r"blocks\.(\d+)\.(.*hook_\w+)", hook)
        if hook in self._modules or (match is None and not hook.rpartition(".")[2].startswith("hook_")):
            return hook
        allowed = f"{FINAL_HOOK}, layers.N, or a module's name"
        if match is not None:
            number = int(match[1])
            block = {"hook_resid_post": number, "hook_resid_pre": number - 1}.get(match[2], -1)
            if block >= 0:
                return f"layers.{block}"
            allowed, blocks = f"layers.{number}", block_list(self.model)
            if blocks is not None and number < self.n_layers:
                modules = self.model.get_submodule(f"{blocks}.{number}").named_children()
                allowed += f", or one of its modules: {', '.join(f'{blocks}.{number}.{name}' for name, _ in modules)}"
        raise ValueError(f"model.hook: found {hook!r}, a name of TransformerLens; allowed: {allowed}")

    def logits_from_final(self, acts_d: Tensor) -> Tensor:
        """softcap(U h + b) in float32: [..., d] -> [..., V]."""
        self._require_head("logits")
        logits_V = nn.functional.linear(acts_d.float(), self.unembedding, self.unembedding_bias)
        if self.softcap is not None:
            logits_V = torch.tanh_(logits_V.div_(self.softcap)).mul_(self.softcap)
        return logits_V

    def check_unembedding(self, ids_BT: Tensor) -> float:
        """Largest |U h - logits| relative to the largest |logit|. Raises ValueError beyond the tolerance."""
        captured = self.capture(ids_BT, FINAL_HOOK, logits=True)
        assert captured.logits is not None
        error = (self.logits_from_final(captured.acts) - captured.logits).abs().max() / captured.logits.abs().max()
        tolerance = CHECK_TOLERANCE[next(self.model.parameters()).dtype]
        if not error <= tolerance:
            raise ValueError(
                f"model.name: {self.name}'s logits are not U h of the final residual "
                f"(relative error {float(error):.2g}, allowed {tolerance:g})"
            )
        return float(error)

    def check_causal(self, ids_1T: Tensor) -> None:
        """Raise ValueError when a later token changes what the model has at an earlier one."""
        ids_BT = ids_1T.repeat(2, 1)
        ids_BT[1, -1] = ids_1T[0, 0]
        acts_BTd = self.capture(ids_BT, FINAL_HOOK).acts[:, :-1]
        change = (acts_BTd[1] - acts_BTd[0]).abs().max() / acts_BTd.abs().max()
        if not change <= CHECK_TOLERANCE[next(self.model.parameters()).dtype]:
            raise ValueError(
                f"model.name: {self.name} is loaded as a {type(self.model).__name__} but sees later tokens "
                f"(relative change {float(change):.2g}), allowed: a causal LM, or an encoder without an output head"
            )

    @torch.no_grad()
    def capture(
        self,
        ids_BT: Tensor,
        hook: str,
        *,
        mask: Tensor | None = None,
        logits: bool = False,
        final: bool = False,
    ) -> Captured:
        """Activations at `hook` (float32 [B,T,d]); also logits [B,T,V] and the final residual [B,T,d] if asked.

        `hook` is `FINAL_HOOK`, `layers.N` or a module's name (its output; the first element of a tuple or list).
        `mask` [B,T] is 1 on tokens and 0 on padding, which must be on the right. Raises ValueError for an unknown hook
        (with close matches), a module that does not run exactly once, or logits of a model without a head.
        When the activations of a module are all that is asked for, the pass ends as soon as it has run:
        what comes after costs nothing, and a second run of the module goes unseen.
        """
        if logits:
            self._require_head("logits")
        hook = self.resolve_hook(hook)
        seen: dict[str, Tensor] = {}
        stop = hook != FINAL_HOOK and not (logits or final)

        def keep(acts_BTd: Tensor) -> None:
            seen["acts"] = acts_BTd.float()
            if stop:
                raise _Stop

        def keep_final(acts_BTd: Tensor) -> None:
            seen["final"] = acts_BTd.float()

        hooks: dict[str, Observer] = {FINAL_HOOK: keep_final} if final else {}
        output = self._forward(ids_BT, mask, {**hooks, hook: keep}, None if logits else "one")
        if final and hook == FINAL_HOOK:
            seen["final"] = seen["acts"]
        return Captured(seen["acts"], output.logits.float() if logits else None, seen.get("final"))

    @torch.no_grad()
    def run_with_edit(
        self, ids_BT: Tensor, hook: str, edit: Edit, *, mask: Tensor | None = None, last_only: bool = False
    ) -> Tensor:
        """Logits (float32 [B,T,V]) with the hook's activations replaced by `edit(acts_BTd)`.

        `edit` takes and returns float32 [B,T,d]. `last_only`: logits [B,V] of every row's last token that
        `mask` keeps. Raises ValueError as `capture` does.
        """
        self._require_head("a run with an edit")
        hooks = {self.resolve_hook(hook): edit}
        logits = self._forward(ids_BT, mask, hooks, "last" if last_only else None).logits.float()
        return logits[:, 0] if last_only else logits

    def _forward(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor | None,
        hooks: Mapping[str, Observer],
        positions: str | None,
        **options: Any,
    ) -> Any:
        """One pass; the model's output, or None when an observer raised `_Stop`.

        `positions` says which positions go through the head: None all, "last" the last token of every row, "one" any
        single position, for callers that do not read the logits. `options` go to the model.
        """
        ids_BT = ids_BT.to(self.device, torch.int64)
        mask_BT = _checked_mask(mask_BT, ids_BT)
        fired: Counter[str] = Counter()
        handles = [self._attach(name, observer, fired, ids_BT.shape) for name, observer in hooks.items()]
        if self.head is not None and positions is not None:
            handles.append(self.head.register_forward_pre_hook(_select(positions, mask_BT)))
        try:
            with quiet_transformers():
                output = self.model(input_ids=ids_BT, attention_mask=mask_BT, **{"use_cache": False, **options})
        except _Stop:
            output = None
        finally:
            for handle in handles:
                if handle is not None:
                    handle.remove()
        for name, observer in hooks.items():
            if self.head is None and name == FINAL_HOOK:
                observer(output[0])
                fired[name] += 1
            if fired[name] != 1:
                raise ValueError(f"model.hook: {name!r} ran {fired[name]} times in a pass, allowed: exactly once")
        return output

    def _attach(self, name: str, observer: Observer, fired: Counter[str], shape: torch.Size | None) -> Any:
        """Register `observer` at hook `name`, counting its calls in `fired`. shape: [B, T], None: of any pass."""

        def apply(acts: Any) -> Tensor | None:
            fired[name] += 1
            if not isinstance(acts, Tensor) or acts.ndim != 3 or shape not in (None, acts.shape[:2]):
                found = tuple(acts.shape) if isinstance(acts, Tensor) else type(acts).__name__
                allowed = "[B, T, width]" if shape is None else f"{tuple(shape)} + (width,)"
                raise ValueError(f"model.hook: {name!r} gives {found}, allowed: a tensor {allowed}")
            edited = observer(acts.float())
            assert edited is None or edited.shape == acts.shape
            return None if edited is None else edited.to(acts.dtype)

        def on_output(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, tuple | list):
                return apply(output)
            edited = apply(output[0])
            return None if edited is None else type(output)((edited, *output[1:]))

        def on_input(module: nn.Module, args: Any) -> Any:
            edited = apply(args[0])
            return None if edited is None else (edited, *args[1:])

        if name == FINAL_HOOK:
            return self.head.register_forward_pre_hook(on_input) if self.head is not None else None
        self._require_module(name)
        return self._modules[name].register_forward_hook(on_output)

    def _require_module(self, name: str) -> None:
        known = [FINAL_HOOK, *self._modules]
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or [FINAL_HOOK]
            raise ValueError(f"model.hook: no module {name!r} in {self.name}; close matches: {', '.join(close)}")

    def _require_head(self, what: str) -> None:
        if not self.has_head:
            raise ValueError(f"model.name: {self.name} has no output head, {what}: not available")


def _scaled(weight: Tensor, scale: float) -> Tensor:
    """A parameter as float32, multiplied by `scale`; shares memory where nothing changes."""
    weight = weight.detach().float()
    return weight if scale == 1.0 else weight * scale


def _named(tokenizer: Any, vocab_size: int) -> slice | Tensor:
    """The ids below `vocab_size` that a tokenizer names: a slice, which copies nothing, where they are the first."""
    ids = sorted({token for token in tokenizer.get_vocab().values() if token < vocab_size})
    return slice(len(ids)) if ids[-1] == len(ids) - 1 else torch.tensor(ids)


def _checked_mask(mask_BT: Tensor | None, ids_BT: Tensor) -> Tensor | None:
    """The attention mask, None when nothing is padded. Raises ValueError unless padding is on the right."""
    if ids_BT.ndim != 2 or 0 in ids_BT.shape:
        raise ValueError(f"ids: found shape {tuple(ids_BT.shape)}, allowed: [sequences, positions], not empty")
    if mask_BT is None:
        return None
    mask_BT = mask_BT.to(ids_BT.device, torch.int64)
    if mask_BT.shape != ids_BT.shape or (mask_BT[:, 1:] > mask_BT[:, :-1]).any() or not mask_BT[:, 0].all():
        raise ValueError("mask: allowed: the shape of ids, 1 on tokens and then 0 on padding (on the right)")
    return None if bool(mask_BT.all()) else mask_BT


def _select(positions: str, mask_BT: Tensor | None) -> Callable[[nn.Module, Any], Any]:
    """A pre-hook of the head that passes one position per row on."""

    def narrow(module: nn.Module, args: Any) -> Any:
        acts_BTd = args[0]
        if positions == "one" or mask_BT is None:
            return (acts_BTd[:, -1:], *args[1:])
        rows = torch.arange(acts_BTd.shape[0], device=acts_BTd.device)
        return (acts_BTd[rows, mask_BT.sum(1) - 1][:, None], *args[1:])

    return narrow
