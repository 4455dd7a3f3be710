"""`hsae bench`: every measurement of a shape, one after the other, as one JSON document.

A measurement is forward, backward, constraints and AdamW on rows that lie on the device, with every loss that the
config's last baseline stage has on. What has no number has a `why`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from statistics import median
from typing import Any, NamedTuple

import torch

from ..config import ConfigError, TopKConfig
from ..models.hsae import HierarchicalSAE
from ..provenance import environment
from ..training.trainer import HSAETrainer
from .floor import Ceilings, Part, flat_parts, floor_record, hsae_parts
from .measure import ceilings, deterministic, guarded, make_rows, max_rate, parts, peak_gib, times
from .peers import FlatTopK, NaiveHSAE, PeerStep
from .shapes import Shape

PEERS = ("flat", "naive")
ROUTINGS = ("uniform", "zipf")
SMALLEST = 16  # a batch is halved until it fits into memory, down to this share of the shape's
SECONDS = {"cuda": 10.0, "cpu": 4.0}  # of a measurement, after its warm-up of at most half of that


class Options(NamedTuple):
    """What is measured, where, and how often."""

    device: str
    steps: int
    peers: tuple[str, ...] = PEERS
    routings: tuple[str, ...] = ROUTINGS


class Measurement(NamedTuple):
    """A step to measure: `step(batch)` gives its times at a batch size, `needs(batch)` the parts of its floor."""

    what: str
    routing: str
    precision: str
    step: Callable[[int], dict[str, Any]]
    needs: Callable[[int], list[Part]]


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

    `save` gets the document after every measurement, so that an interruption loses none.
    """
    torch.manual_seed(0)
    say("ceilings")
    limits = ceilings(options.device, options.steps)
    records: list[dict[str, Any]] = []
    document = {
        "environment": {**environment(options.device), "triton": version("triton") if find_spec("triton") else None},
        "cuda": torch.version.cuda,
        "steps": options.steps,
        "ceilings": limits._asdict(),
        "shapes": records,
    }
    for shape in shapes:
        rows: list[dict[str, Any]] = []
        precision, batch = shape.precision(options.device), shape.training.batch_size
        floor = floor_record(hsae_parts(shape.losses, shape.width, batch, precision), limits, precision)
        records.append({**shape.record(), "floor": floor, "measured": rows})
        for one in measurements(shape, options):
            say(f"{shape.name}: {one.what}, {one.routing}")
            rows.append(measured(one, batch, limits, rows, options.device))
            save(document)
    return document


def measurements(shape: Shape, options: Options) -> Iterator[Measurement]:
    """Ours by routing, in other precisions and with deterministic algorithms, then the peers."""
    usual = shape.precision(options.device)
    for routing in options.routings:
        yield _ours("", usual, shape, options, routing)
        if options.device == "cuda" and not shape.training.cuda_graph:
            yield _ours(", CUDA graph", usual, shape.with_training(cuda_graph=True), options, routing)
    routing = options.routings[0]
    for precision in ("bf16", "tf32", "float32") if options.device == "cuda" else ():
        if precision != usual:
            yield _ours("", precision, shape.with_training(precision=precision), options, routing)
    plain = _ours(", deterministic", usual, shape, options, routing)
    yield plain._replace(step=deterministic()(plain.step))
    hsae = shape.losses
    sizes = {hsae.n_parents: hsae.topk_parent}
    sizes[hsae.n_parents * (1 + hsae.n_children_per_parent)] = hsae.topk_parent + hsae.active_children
    for latents, k in sizes.items() if "flat" in options.peers else ():
        for routing in options.routings:
            yield _flat(latents, k, shape, options, routing)
    for routing in options.routings if "naive" in options.peers else ():
        step = partial(_peer_step, shape, options, routing, hsae.topk_parent, partial(_naive, shape, options.device))
        yield Measurement("H-SAE, naive PyTorch", routing, usual, step, partial(_needs, shape, usual))


def _needs(shape: Shape, precision: str, batch: int) -> list[Part]:
    return hsae_parts(shape.losses, shape.width, batch, precision)


def _ours(name: str, precision: str, shape: Shape, options: Options, routing: str) -> Measurement:
    def step(batch: int) -> dict[str, Any]:
        at = shape.with_training(batch_size=batch)
        return ours(at, options.device, routing, options.steps, SECONDS[options.device])

    return Measurement(f"ours, {precision}{name}", routing, precision, step, partial(_needs, shape, precision))


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
    found = _timed(lambda: trainer.train_step(shape.stage), device, steps, seconds, by_part)
    rate = float(trainer.train_step(shape.stage)()["max_firing_rate"])
    return {**found, "batch": batch, "max_firing_rate": rate}


@torch.no_grad()
def start(shape: Shape, device: str) -> HierarchicalSAE:
    """A random model of the shape, drawn on the device, because a CPU takes a minute to draw the largest ones.

    Every tensor has the spread that it has in a real start, read off a model of k parents.
    """
    config, width, normalize = shape.hsae, shape.width, shape.normalize
    small = HierarchicalSAE(config.model_copy(update={"n_parents": config.topk_parent}), width, normalize)
    spread = {name: float(tensor.std(correction=0)) for name, tensor in small.named_parameters()}
    with torch.device("meta"):
        model = HierarchicalSAE(config, width, normalize)
    model.to_empty(device=device)
    for part, read, write in ((model.router, "E", "D"), (model.child, "F", "G"), (model.child, "Down", "Up")):
        if getattr(small, read) is getattr(small, write):  # `to_empty` unties them
            setattr(part, read, getattr(part, write))
    for name, parameter in model.named_parameters():
        parameter.normal_(std=spread[name])
    for name, buffer in small.named_buffers():  # none depends on the number of parents
        model.get_buffer(name).copy_(buffer)
    model.set_normalization(torch.zeros(width, device=device), 1.0)  # the bench draws normalised rows
    return model


def _flat(latents: int, k: int, shape: Shape, options: Options, routing: str) -> Measurement:
    hsae, precision = shape.losses, shape.precision(options.device)
    config = TopKConfig(
        n_latents=latents, k=k, recon_reduction=hsae.recon_reduction, project_gradient=hsae.project_gradient
    )

    def make() -> FlatTopK:
        with torch.device(options.device):
            return FlatTopK(config, shape.width, shape.normalize)

    def needs(batch: int) -> list[Part]:
        return flat_parts(config, shape.width, batch, precision)

    step = partial(_peer_step, shape, options, routing, k, make)
    return Measurement(f"flat TopK, {latents:,} latents, k {k}", routing, precision, step, needs)


def _naive(shape: Shape, device: str) -> NaiveHSAE:
    return NaiveHSAE(start(shape, device), shape.stage.loss)


def _peer_step(
    shape: Shape, options: Options, routing: str, k: int, make: Callable[[], FlatTopK | NaiveHSAE], batch: int
) -> dict[str, Any]:
    model = make()
    model.normalize_decoder_weights()
    rows = make_rows(routing, batch, model.E.detach(), k)
    step = PeerStep(model, shape.training, shape.precision(options.device))
    found = _timed(lambda: step(rows.next()), options.device, options.steps, SECONDS[options.device], True)
    return {**found, "batch": batch, "max_firing_rate": max_rate(model.chosen_Bk, len(model.E))}


def _timed(work: Callable[[], object], device: str, steps: int, seconds: float, by_part: bool) -> dict[str, Any]:
    found = times(work, device, steps, seconds=seconds)
    took, peak = median(found), peak_gib(device)  # before the profiler, which has memory of its own
    split = parts(work, device) if by_part and took < 1e3 else {}
    return {"ms": took, "steps": len(found), "peak_gib": peak, "parts": split}


def measured(
    one: Measurement, batch: int, limits: Ceilings, before: list[dict[str, Any]], device: str
) -> dict[str, Any]:
    """One row of the table; `before`: those above it, of which the first of ours with this routing is the scale."""
    found = halving(one.step, batch, device)
    record = {"what": one.what, "routing": one.routing, "precision": one.precision, **found}
    if "why" in found:
        return record
    ms, rate = found["ms"], found["batch"] / found["ms"] * 1e3
    least = floor_record(one.needs(found["batch"]), limits, one.precision)
    mine = [row for row in [*before, {**record, "rows_per_s": rate}] if row["what"].startswith("ours")]
    scale = [row["rows_per_s"] for row in mine if row["routing"] == one.routing and "rows_per_s" in row]
    return {
        **record,
        "rows_per_s": rate,
        "tb_per_s": least["bytes"] / ms / 1e9,
        "tflop_per_s": least["flops"] / ms / 1e9,
        "floor_ms": least["ms"],
        "times_floor": ms / least["ms"],
        "of_ours": rate / scale[0] if scale else None,
    }


def halving(step: Callable[[int], dict[str, Any]], batch: int, device: str) -> dict[str, Any]:
    """The step at this batch or, where that does not fit into memory, at a half of it, a quarter, ..."""
    smallest = batch / SMALLEST
    while True:
        found = guarded(partial(step, batch), device)
        if "why" not in found or batch // 2 < smallest:
            return found
        batch //= 2
