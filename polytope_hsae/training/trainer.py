"""The one training loop: phases 2 and 3, hierarchical and flat models (docs/method.md sections 2 and 4)."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import StageConfig, TeacherConfig, TrainingConfig
from ..data.stream import Stream
from ..models.base import SparseAutoencoder, without_sharing
from ..models.codes import ModelOutput, firings
from ..models.losses import WARMED_UP
from ..tracking import Tracker
from .anchor import Anchor
from .checkpoint import (
    check_parts,
    latest_checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from .graph import StepGraph
from .optimizer import FusedAdamW
from .schedule import learning_rate, penalty_warmup, rate_multiplier, stage_at
from .usage import Usage

Evaluate = Callable[[SparseAutoencoder], dict[str, float]]


class Interrupted(InterruptedError):
    """SIGINT or SIGTERM arrived; a checkpoint was written."""


class Diverged(ArithmeticError):
    """The loss is not finite; the last good checkpoint is kept."""


class HSAETrainer:
    """Trains any SparseAutoencoder on a stream of rows through stages.

    Args:
        model: initialised; its device is where training happens.
        stream: yields [batch_size, d] float32 rows and can be resumed.
        stages: what is trained, in order: steps, frozen tensors, loss weights.
        config: batch, learning rate, schedules, logging.
        folder: checkpoints/ lies here; None = no checkpoints.
        evaluate: validation metrics of the model, called every `val_every` steps.
        teacher: how its rows are held (`anchor`).
        n_teacher: number of leading parents that the teacher initialised.
        seed: of the routing noise.
    """

    def __init__(
        self,
        model: SparseAutoencoder,
        stream: Stream,
        stages: list[StageConfig],
        config: TrainingConfig,
        *,
        folder: Path | None = None,
        evaluate: Evaluate | None = None,
        teacher: TeacherConfig | None = None,
        n_teacher: int = 0,
        seed: int = 0,
    ):
        model.warn_unless_normalized()
        self.model, self.stream, self.stages, self.config = model, stream, stages, config
        self.folder, self.evaluate = folder, evaluate
        self.device = model.data_mean.device
        self.total = sum(stage.steps for stage in stages)
        self.step = 0
        names: dict[Tensor, list[str]] = {}
        for name, tensor in model.tensors().items():
            names.setdefault(tensor, []).append(name)
        self.parameters = {of[0]: parameter for parameter, of in names.items()}
        groups: list[dict[str, Any]] = [{"params": [parameter], "names": of} for parameter, of in names.items()]
        for stage, group in product(stages, groups):
            rate_multiplier(group["names"], stage.lr_mult)  # a contradiction shows before the first step
        self.optimizer = FusedAdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
        model.precision = config.precision or ("bf16" if self.device.type == "cuda" else "float32")
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.usage = Usage(model.n_parents, model.n_children, self.device)
        self.anchor = Anchor(model, n_teacher, teacher) if teacher and n_teacher else None
        self.stop_signal: int | None = None
        self.broken = torch.zeros((), device=self.device)  # steps whose gradient norm was not finite
        self.numbers = torch.zeros(2, device=self.device)  # penalty warm-up and temperature, for the graph
        self.stage: StageConfig | None = None
        self.graph: StepGraph | None = None
        if config.cuda_graph and model.graphable and self.optimizer.adam_ is not None and config.accumulate == 1:
            self.graph = StepGraph(self.generator)

    @property
    def rows_per_step(self) -> int:
        """Rows (tokens) of one optimiser step."""
        return self.config.batch_size * self.config.accumulate

    def fit(self, tracker: Tracker, on_step: Callable[[int, int], None] = lambda step, total: None) -> dict[str, float]:
        """Train from the present step to the last; returns the final validation metrics.

        Raises Interrupted after a checkpoint on SIGINT or SIGTERM, Diverged when the loss is not finite.
        """
        values: dict[str, float] = {}
        with self._catch_signals():
            while self.step < self.total:
                stage = stage_at(self.stages, self.step)
                if self.step == stage.start:
                    self.model.freeze(stage.config.freeze)
                log = self.train_step(stage.config)
                last = self.step == self.total
                if last or self.step % self.config.log_every == 0:
                    tracker.log(
                        {name: float(value) for name, value in log().items()}, self.step, self.step * self.rows_per_step
                    )
                if self.evaluate and (last or self.step % self.config.val_every == 0):
                    values = self.evaluate(self.model)
                    tracker.log(values, self.step, self.step * self.rows_per_step)
                on_step(self.step, self.total)
                stop = self.stop_signal  # read once: a signal that arrives later is seen after the next step
                if last or stop or self.step % self.config.checkpoint_every == 0:
                    self.save()
                if stop:
                    name = signal.Signals(stop).name
                    raise Interrupted(f"{name} at step {self.step} of {self.total}; checkpoint written")
        if self.evaluate and not values:  # resumed from the last checkpoint: nothing was left to train
            values = self.evaluate(self.model)
        return values

    def train_step(self, stage: StageConfig) -> Callable[[], dict[str, Any]]:
        """One optimiser step; returns a function that computes its log values."""
        config, model = self.config, self.model
        if stage is not self.stage:
            self._begin(stage)
        model.train()
        model.update_router_temperature(self.step, self.total)
        warmup = penalty_warmup(config, self.step)
        rate = learning_rate(config, self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["multiplier"]
        frozen = {id(parameter) for parameter in self.parameters.values() if not parameter.requires_grad}
        if self.optimizer.adam_ is not None:
            self.optimizer.prepare(frozen)
        if self.graph is None:
            output, terms, loss, grad_norm = self._work(stage, warmup)
        else:
            output, terms, loss, grad_norm = self._replay(stage, warmup, frozen)
        if self.optimizer.adam_ is not None:
            self._look_for_nan(loss, grad_norm, terms)
        self.step += 1
        return lambda: {
            "loss": loss,
            **{name: value.detach() for name, (_, value) in terms.items()},
            "lr": rate,
            "penalty_warmup": warmup,
            "grad_norm": grad_norm,
            **self._usage_log(output),
        }

    def _begin(self, stage: StageConfig) -> None:
        """Set the stage's learning rate multipliers, and the names of tensors that do not learn in it."""
        self.stage, self.held = stage, set(stage.freeze)
        for group in self.optimizer.param_groups:
            group["multiplier"] = rate_multiplier(group["names"], {**self.model.lr_mult, **stage.lr_mult})
            self.held |= set(group["names"]) if group["multiplier"] == 0 else set()

    def _work(
        self, stage: StageConfig, warmup: float | Tensor, rows_Bd: Tensor | None = None
    ) -> tuple[ModelOutput, dict[str, tuple[float, Tensor]], Tensor, Tensor]:
        """Forward, backward and update; the last micro-batch's output and loss terms, the loss, the gradient norm."""
        config, model = self.config, self.model
        for _ in range(config.accumulate):
            batch_Bd = self.stream.next().to(self.device) if rows_Bd is None else rows_Bd
            output = model(batch_Bd, self.generator)
            dead_P = self.usage.dead_parents(config.dead_after) if model.n_children == 0 else None
            terms = model.loss_terms(output, stage.loss, dead_P) | (self.anchor.terms() if self.anchor else {})
            weighted = [w * (warmup if name in WARMED_UP else 1.0) * value for name, (w, value) in terms.items()]
            loss = torch.stack(weighted).sum()
            (loss / config.accumulate).backward()
            fired = firings(output.codes, model.n_parents, model.n_parents * model.n_children)
            self.usage.update(fired)
            model.after_batch(fired)
        if model.config.project_gradient:
            model.project_gradients()
        grad_norm = self._clip(loss, terms)
        if self.anchor:
            self.anchor.before_step()
        model.before_step(self.held)
        self.optimizer.step()
        self.optimizer.zero_grad()
        model.normalize_decoder_weights()
        if self.anchor:
            self.anchor.after_step()
        return output, terms, loss.detach(), grad_norm

    def _replay(self, stage: StageConfig, warmup: float, frozen: set[int]) -> Any:
        """`_work` through the graph: the numbers that change from step to step are sent ahead, as tensors."""
        assert self.graph is not None
        numbers = torch.tensor([warmup, self.model.router_temperature]).pin_memory()
        self.numbers.copy_(numbers, non_blocking=True)
        self.model.router_temperature = self.numbers[1]
        key = (stage.name, tuple(sorted(frozen))) if self.model.graphable else None
        return self.graph(
            key, lambda rows: self._work(stage, self.numbers[0], rows), self.stream.next().to(self.device)
        )

    def _clip(self, loss: Tensor, terms: dict[str, tuple[float, Tensor]]) -> Tensor:
        """Clip the gradients, or with kernels tell the optimiser by how much; returns their norm before."""
        parameters, limit = list(self.parameters.values()), self.config.grad_clip
        if self.optimizer.adam_ is None:
            norm = clip_gradients(parameters, limit)
            self._require_finite(loss, norm, terms)
            return norm
        norm, self.optimizer.gradient_scale = clip_factor(parameters, limit)
        self.broken += torch.where(torch.isfinite(norm), 0, 1)
        return norm

    def _look_for_nan(self, loss: Tensor, grad_norm: Tensor, terms: dict[str, tuple[float, Tensor]]) -> None:
        """On a GPU no step waits for its gradient norm. One that is not finite leaves all parameters as they are, but
        for encoder biases that the balance raises. It is looked for on steps that are logged, validated or saved.
        """
        after, config = self.step + 1, self.config
        waiting = (config.log_every, config.val_every, config.checkpoint_every)
        if after == self.total or any(after % every == 0 for every in waiting):
            self._require_finite(loss, torch.where(self.broken > 0, torch.nan, grad_norm), terms)

    def _require_finite(self, loss: Tensor, grad_norm: Tensor, terms: dict[str, tuple[float, Tensor]]) -> None:
        """Neither a loss nor a gradient that is not finite may reach a parameter or a checkpoint."""
        for what, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not torch.isfinite(value):
                kept = latest_checkpoint(self.folder / "checkpoints") if self.folder else None
                parts = ", ".join(f"{name} {term.item():.4g}" for name, (_, term) in terms.items())
                found = f"the {what} is {value.item()} at step {self.step} ({parts})"
                raise Diverged(f"training: {found}; last good checkpoint: {kept}")

    @torch.no_grad()
    def _usage_log(self, output: ModelOutput) -> dict[str, Any]:
        codes, config = output.codes, self.config
        fired_P = torch.bincount(codes.parent_index[codes.parent_value > 0], minlength=self.model.n_parents).double()
        share_P = fired_P / fired_P.sum().clamp_min(1)
        values: dict[str, Any] = {
            "active_parents_per_sample": (codes.parent_value > 0).sum(1).double().mean(),
            "active_children_per_sample": (codes.child_value > 0).sum(1).double().mean(),
            "router_temperature": self.model.router_temperature,
            "router_entropy": -(share_P * share_P.clamp_min(1e-30).log()).sum(),
            "max_firing_rate": fired_P.max() / len(codes.parent_index),
            "dead_parents": self.usage.dead_parents(config.dead_after).double().mean(),
            "encoder_norm": self.model.tensors()["E"].norm(dim=1).mean(),
        }
        if getattr(self.model.config, "parent_budget", "per_row") != "per_row":
            values["full_rows_parents"] = (codes.parent_value > 0).all(1).double().mean()
        if getattr(self.model.config, "child_budget", None) == "batch":
            values["full_rows_children"] = (codes.child_value > 0).all(1).double().mean()
        if self.model.n_children:
            values["dead_children"] = self.usage.dead_children(config.dead_after_routed).double().mean()
        if "Up" in self.parameters:
            values["projector_norm"] = self.parameters["Up"].norm(dim=-1).mean()
        return values

    # resuming

    def save(self) -> None:
        """Write a checkpoint of everything that resuming needs."""
        if self.folder is None:
            return
        parts: dict[str, dict[str, Tensor]] = {
            "model": without_sharing(self.model.state_dict()),
            "optimizer": optimizer_tensors(self.optimizer, self.parameters),
            "usage": self.usage.state_dict(),
            "noise": {"state": self.generator.get_state()},
        }
        metadata = {"stream": json.dumps(self.stream.state_dict())}
        save_checkpoint(self.folder / "checkpoints", self.step, parts, metadata)

    def resume(self) -> bool:
        """Load the latest checkpoint, if there is one; True if there was.

        Raises ValueError when it is broken or belongs to another model.
        """
        path = latest_checkpoint(self.folder / "checkpoints") if self.folder else None
        if path is None:
            return False
        self.step, parts, metadata = load_checkpoint(path)
        if self.step > self.total:
            raise ValueError(f"{path}: found step {self.step}, allowed: at most {self.total}, the steps of all stages")
        state = parts["model"]
        stage = stage_at(self.stages, self.step) if self.step < self.total else None
        inside = stage is not None and self.step > stage.start
        self.model.freeze(stage.config.freeze if stage is not None and inside else ())
        if not inside:
            state = {name: tensor for name, tensor in state.items() if name not in self.model.transient_names}
        like = {
            "model": self.model.state_dict(),
            "usage": self.usage.state_dict(),
            "noise": {"state": self.generator.get_state()},
        }
        check_parts(path, parts, like, self.parameters)
        try:
            self.model.load_state_dict(state)
            self.generator.set_state(parts["noise"]["state"])
        except RuntimeError as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
        load_optimizer_tensors(self.optimizer, self.parameters, parts["optimizer"])
        self.usage.load_state_dict(parts["usage"])
        self.stream.load_state_dict(json.loads(metadata["stream"]))
        return True

    @contextmanager
    def _catch_signals(self) -> Iterator[None]:
        def note(number: int, frame: object) -> None:
            self.stop_signal = number

        self.stop_signal = None
        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


@torch.no_grad()
def clip_gradients(parameters: Sequence[Tensor], limit: float | None) -> Tensor:
    """Scale all gradients so that their global norm is at most `limit` (None: leave them); returns the norm before.

    Exactly g * limit / |g|, where `torch.nn.utils.clip_grad_norm_` adds 1e-6 to |g|.
    """
    norm, factor = clip_factor(parameters, limit)
    if limit is not None:
        torch._foreach_mul_([parameter.grad for parameter in parameters if parameter.grad is not None], factor)
    return norm


@torch.no_grad()
def clip_factor(parameters: Sequence[Tensor], limit: float | None) -> tuple[Tensor, Tensor]:
    """Global norm of the gradients, and the factor that clips them: NaN if the norm is not finite."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    factor = torch.ones_like(norm) if limit is None else (limit / norm).clamp_max(1.0)
    return norm, torch.where(torch.isfinite(norm), factor, torch.nan)


def discard_checkpoints(folder: Path) -> None:
    """Delete an arm's checkpoints, so that it starts anew."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
