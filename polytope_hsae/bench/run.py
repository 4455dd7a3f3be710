"""`hsae bench`: every measurement of a shape, one after the other, as one JSON document.

A measurement is forward, backward, constraints and AdamW on rows that lie on the device, with every loss that the
config's last baseline stage has on. What has no number has a `why`.
"""

from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any, NamedTuple

import torch

from ..config import ConfigError, TopKConfig
from ..models.hsae import HierarchicalSAE
from ..provenance import environment
from ..training.trainer import HSAETrainer
from . import jax_peer
from .floor import Ceilings, flat_parts, floor_record, hsae_parts
from .measure import (
    Rows,
    ceilings,
    deterministic,
    free_memory,
    guarded,
    make_rows,
    max_rate,
    parts,
    peak_gib,
    times,
)
from .peers import FlatTopK, LoopHSAE, PeerStep
from .shapes import Shape

PEERS = ("flat", "loop", "jax")
ROUTINGS = ("uniform", "zipf")
SMALLEST = 16  # a peer's batch is halved until it fits, down to this share of the shape's
LOOP_SECONDS, LOOP_PARENTS = 60, (64, 256)  # a loop that takes longer is not measured; the sizes that say how long
LOOP, SLOW_MS = "H-SAE, loop over parents", 5_000
JAX_SECONDS = 200
SECONDS = {"cuda": 10.0, "cpu": 4.0}  # of a measurement, after its warm-up of at most half of that


class Options(NamedTuple):
    """What is measured, where, and how often."""

    device: str
    steps: int
    peers: tuple[str, ...] = PEERS
    routings: tuple[str, ...] = ROUTINGS


def chosen(asked: str, allowed: tuple[str, ...], option: str, words: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The names of a comma-separated list, or those that a word such as `all` stands for. Raises ConfigError."""
    if asked in words:
        return words[asked]
    names = tuple(asked.split(","))
    if unknown := [name for name in names if name not in allowed]:
        raise ConfigError(f"{option}: found {unknown[0]!r}, allowed: {', '.join([*words, *allowed])}")
    return names


def device_of(name: str) -> str:
    """cpu or cuda. Raises ConfigError for anything else, or where there is no GPU."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"--device: found {name!r}, allowed: auto, cpu, or cuda where there is a GPU")
    return name


def bench(
    shapes: list[Shape],
    options: Options,
    say: Callable[[str], None] = lambda line: None,
    save: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """All measurements of all shapes, with ceilings, environment and configuration.

    `save` gets the document after every measurement, so that what was measured outlives an interruption.
    """
    device = options.device
    torch.manual_seed(0)
    say("ceilings")
    limits = ceilings(device, options.steps)
    packages = {name: _version(name) for name in ("triton", "jax")}
    document: dict[str, Any] = {
        "environment": {**environment(device), **packages},
        "cuda": torch.version.cuda,
        "steps": options.steps,
        "ceilings": limits._asdict(),
        "shapes": [],
    }
    for shape in shapes:
        measuring = ShapeBench(shape, options, limits, say, lambda: save(document))
        document["shapes"].append(measuring.record)
        measuring.measure()
    return document


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@torch.no_grad()
def start(shape: Shape, device: str) -> HierarchicalSAE:
    """A random model of the shape, drawn on the device: a CPU takes a minute to draw the largest ones.

    Every tensor has the spread that it has in a real start, which a model of k parents shows.
    """
    config, width, normalize = shape.hsae, shape.width, shape.normalize
    small = HierarchicalSAE(config.model_copy(update={"n_parents": config.topk_parent}), width, normalize)
    spread = {name: float(tensor.std(correction=0)) for name, tensor in small.named_parameters()}
    with torch.device("meta"):
        model = HierarchicalSAE(config, width, normalize)
    model.to_empty(device=device)
    for part, read, write in ((model.router, "E", "D"), (model.child, "F", "G"), (model.child, "Down", "Up")):
        if getattr(small, read) is getattr(small, write):  # what is tied comes apart on the way
            setattr(part, read, getattr(part, write))
    for name, parameter in model.named_parameters():
        parameter.normal_(std=spread[name])
    for name, buffer in small.named_buffers():  # none depends on the number of parents
        model.get_buffer(name).copy_(buffer)
    model.set_normalization(torch.zeros(width, device=device), 1.0)  # the rows are as they should be
    return model


def ours(
    shape: Shape, device: str, routing: str, steps: int, seconds: float, *, by_part: bool = True
) -> dict[str, Any]:
    """Our step on a shape: ms, peak, max firing rate, and ms by part. Raises torch.OutOfMemoryError."""
    model = start(shape, device)
    model.normalize_decoder_weights()
    batch = shape.training.batch_size
    rows = make_rows(routing, batch, model.E.detach(), shape.hsae.topk_parent)
    trainer = HSAETrainer(model, rows, [shape.stage], shape.training)  # type: ignore[arg-type]
    trainer.step = 2 * max(1, shape.training.penalty_warmup_steps)
    found = _record(lambda: trainer.train_step(shape.stage), device, steps, seconds, by_part)
    load = float(trainer.train_step(shape.stage)()["max_firing_rate"])
    return {**found, "batch": batch, "max_firing_rate": load}


def _record(work: Callable[[], object], device: str, steps: int, seconds: float, by_part: bool) -> dict[str, Any]:
    found = times(work, device, steps, seconds=seconds)
    took, peak = median(found), peak_gib(device)  # before the profiler, which has memory of its own
    split = parts(work, device) if by_part and took < 1e3 else {}
    return {"ms": took, "steps": len(found), "peak_gib": peak, "parts": split}


class ShapeBench:
    """The measurements of one shape; `record` grows with each."""

    def __init__(
        self,
        shape: Shape,
        options: Options,
        limits: Ceilings,
        say: Callable[[str], None],
        save: Callable[[], None] = lambda: None,
    ):
        self.shape, self.options, self.limits, self.say, self.save = shape, options, limits, say, save
        self.device = options.device
        self.precision = shape.training.precision or "bf16" if self.device == "cuda" else "float32"
        self.rows: list[dict[str, Any]] = []
        self.record = {
            "name": shape.name,
            "width": shape.width,
            "normalize": shape.normalize,
            "hsae": shape.losses.model_dump(mode="json"),
            "training": shape.training.model_dump(mode="json", exclude={"baseline", "teacher"}),
            "floor": self._floor(self.precision, shape.training.batch_size),
            "measured": self.rows,
        }

    def measure(self) -> None:
        """Ours, then each peer."""
        for routing in self.options.routings:
            self._ours(routing)
        self._modes(self.options.routings[0])
        for peer in self.options.peers:
            {"flat": self._flat, "loop": self._loop, "jax": self._jax}[peer]()

    def _floor(self, precision: str, batch: int) -> dict[str, Any]:
        return floor_record(hsae_parts(self.shape.losses, self.shape.width, batch, precision), self.limits, precision)

    # ours

    def _ours(self, routing: str) -> None:
        self._add(f"ours, {self.precision}", routing, self.precision, lambda: self._our_step(self.shape, routing))
        if self.device == "cuda" and not self.shape.training.cuda_graph:
            graph = self.shape.with_training(cuda_graph=True)
            self._add(
                f"ours, {self.precision}, CUDA graph", routing, self.precision, lambda: self._our_step(graph, routing)
            )

    def _modes(self, routing: str) -> None:
        """Other precisions, and what `run.deterministic` asks PyTorch for."""
        if self.device == "cuda":
            for precision in ("bf16", "tf32", "float32"):
                if precision != self.precision:
                    shape = self.shape.with_training(precision=precision)
                    self._add(f"ours, {precision}", routing, precision, partial(self._our_step, shape, routing))
        name = f"ours, {self.precision}, deterministic"
        with deterministic():
            self._add(name, routing, self.precision, lambda: self._our_step(self.shape, routing))

    def _our_step(self, shape: Shape, routing: str) -> dict[str, Any]:
        return ours(shape, self.device, routing, self.options.steps, SECONDS[self.device])

    # peers

    def _flat(self) -> None:
        hsae = self.shape.losses
        k, P = hsae.topk_parent, hsae.n_parents
        sizes = ((P, k), (P * (1 + hsae.n_children_per_parent), k + hsae.active_children))
        for n_latents, active in sizes:
            config = TopKConfig(
                n_latents=n_latents, k=active, recon_reduction=hsae.recon_reduction,
                project_gradient=hsae.project_gradient,
            )  # fmt: skip
            for routing in self.options.routings:

                def step(batch: int, config: TopKConfig = config, routing: str = routing) -> dict[str, Any]:
                    with torch.device(self.device):
                        model = FlatTopK(config, self.shape.width, self.shape.normalize)
                    return self._peer_step(model, batch, routing, config.k)

                def floor(batch: int, config: TopKConfig = config) -> dict[str, Any]:
                    needed = flat_parts(config, self.shape.width, batch, self.precision)
                    return floor_record(needed, self.limits, self.precision)

                name = f"flat TopK, {n_latents:,} latents, k {active}"
                self._add(name, routing, self.precision, partial(self._halving, step), floor)

    def _loop(self) -> None:
        for routing in self.options.routings:
            self._add(LOOP, routing, self.precision, partial(self._looped, routing))

    def _looped(self, routing: str) -> dict[str, Any]:
        """The loop, unless two smaller ones say on a straight line that a step would take too long."""
        hsae = self.shape.hsae
        slow = next((one for one in self.rows if one["what"] == LOOP and one.get("ms", 0) > SLOW_MS), None)
        if slow is not None:
            return {"why": f"a step took {slow['ms'] / 1e3:.0f} s with {slow['routing']} routing, which was enough"}
        small = [P for P in LOOP_PARENTS if hsae.topk_parent <= P < hsae.n_parents]
        if len(small) == 2 and hsae.n_parents > 4 * small[1]:
            took = [self._halving(partial(self._loop_step, routing, P, 2)) for P in small]
            if any("why" in one for one in took):
                return next(one for one in took if "why" in one)
            per_parent = max(0.0, (took[1]["ms"] - took[0]["ms"]) / (small[1] - small[0]))
            expected = (took[1]["ms"] + per_parent * (hsae.n_parents - small[1])) / 1e3
            if expected > LOOP_SECONDS:
                return {
                    "why": f"a step would take about {expected:.0f} s, by those of {small[0]} and {small[1]} parents "
                    f"({took[0]['ms']:.0f} and {took[1]['ms']:.0f} ms)"
                }
        return self._halving(partial(self._loop_step, routing, hsae.n_parents, self.options.steps))

    def _loop_step(self, routing: str, n_parents: int, steps: int, batch: int) -> dict[str, Any]:
        shape = self.shape
        smaller = shape._replace(hsae=shape.hsae.model_copy(update={"n_parents": n_parents}))
        model = LoopHSAE(start(smaller, self.device), smaller.losses)
        return self._peer_step(model, batch, routing, shape.hsae.topk_parent, steps)

    def _peer_step(
        self, model: FlatTopK | LoopHSAE, batch: int, routing: str, k: int, steps: int | None = None
    ) -> dict[str, Any]:
        model.normalize_decoder_weights()
        rows: Rows = make_rows(routing, batch, model.E.detach(), k)
        step = PeerStep(model, self.shape.training, self.precision)
        many = isinstance(model, LoopHSAE) and len(model.E) > max(LOOP_PARENTS)
        found = _record(
            lambda: step(rows.next()), self.device, steps or self.options.steps, SECONDS[self.device], not many
        )
        return {**found, "batch": batch, "max_firing_rate": max_rate(model.chosen_Bk, len(model.E))}

    def _halving(self, step: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
        """The step at the shape's batch or, where that does not fit into memory, at a half of it, a quarter, ..."""
        batch = whole = self.shape.training.batch_size
        while True:
            found = guarded(partial(step, batch), self.device)
            if "why" not in found or batch // 2 < whole / SMALLEST:
                return found
            batch //= 2

    def _jax(self) -> None:
        free_memory(self.device)
        self.say(f"{self.shape.name}: JAX")
        found = jax_peer.measure(
            self.shape, list(self.options.routings), self.device, min(10, self.options.steps), JAX_SECONDS
        )
        for routing, record in found.items():
            self._add("H-SAE in JAX", routing, "float32", partial(dict, record))

    # the record of one measurement

    def _add(
        self,
        what: str,
        routing: str,
        precision: str,
        work: Callable[[], dict[str, Any]],
        floor: Callable[[int], dict[str, Any]] | None = None,
    ) -> None:
        self.say(f"{self.shape.name}: {what}, {routing}")
        found = guarded(work, self.device)
        record: dict[str, Any] = {"what": what, "routing": routing, "precision": precision, **found}
        if "why" not in found:
            batch, ms = found["batch"], found["ms"]
            least = floor(batch) if floor is not None else self._floor(precision, batch)
            ours_ran = (one for one in self.rows if one["routing"] == routing and one["what"].startswith("ours"))
            first = next((one["rows_per_s"] for one in ours_ran if "rows_per_s" in one), None)
            rate = batch / ms * 1e3
            record |= {
                "rows_per_s": rate,
                "tb_per_s": least["bytes"] / ms / 1e9,
                "tflop_per_s": least["flops"] / ms / 1e9,
                "floor_ms": least["ms"],
                "times_floor": ms / least["ms"],
                "of_ours": rate / first if first is not None else 1.0 if what.startswith("ours") else None,
            }
        self.rows.append(record)
        self.save()
