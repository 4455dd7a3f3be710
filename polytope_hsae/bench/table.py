"""Results as files: a JSON document and its Markdown tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..fileio import write_json, write_text

HEAD = ("what", "routing", "ms", "rows/s", "peak GiB", "TB/s", "TFLOP/s", "x floor", "of ours", "max firing rate")


def write(folder: Path, name: str, document: dict[str, Any], text: str) -> None:
    """NAME.json and NAME.md in a folder."""
    write_json(folder / f"{name}.json", document)
    write_text(folder / f"{name}.md", text)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table as lines, an empty one last."""
    return [f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *rows)] + [""]


def machine(environment: dict[str, Any]) -> str:
    """Device, platform, threads and versions in one line."""
    extra = {name: environment[name] for name in ("cuda", "triton", "jax") if name in environment}
    versions = {"python": environment["python"], **environment["packages"], **extra}
    shown = ", ".join(f"{name} {found}" for name, found in versions.items() if found is not None)
    return f"{environment['device']}, {environment['platform']}, {environment['threads']} threads; {shown}."


def markdown(document: dict[str, Any]) -> str:
    """Tables of every shape, then ceilings and environment."""
    lines: list[str] = []
    for shape in document["shapes"]:
        lines += [f"## {shape['name']}", "", _sizes(shape), ""]
        lines += table(HEAD, [_cells(one, shape["training"]["batch_size"]) for one in shape["measured"]])
        lines += [
            f"- {one['what']}, {one['routing']}: no numbers: {one['why']}." for one in shape["measured"] if "why" in one
        ]
        lines += ["", *_by_part(shape), *_floor(shape)]
    limits = document["ceilings"]
    products = ", ".join(f"{name} {value:.3g} TFLOP/s" for name, value in limits["tflop_per_s"].items())
    lines += [
        "## Measured in the same run",
        "",
        f"Ceilings: copy {limits['copy_tb_per_s']:.3g} TB/s; products: {products}.",
    ]
    lines += ["", machine({**document["environment"], "cuda": document["cuda"]})]
    return "\n".join([*lines, "", *NOTES, ""])


NOTES = (
    "Rows per second count forward, backward, constraints and Adam, median of the steps. TB/s and TFLOP/s are what the",
    "shape needs (`floor` in the JSON), per second. Peaks include three batches of rows. What needs more memory than",
    "the GPU has is measured at the largest half, quarter, ... of the batch that fits, which its name then says.",
)


def _sizes(shape: dict[str, Any]) -> str:
    hsae, training = shape["hsae"], shape["training"]
    return (
        f"P {hsae['n_parents']:,}, C {hsae['n_children_per_parent']}, s {hsae['subspace_dim']}, "
        f"k {hsae['topk_parent']}, d {shape['width']:,}, B {training['batch_size']:,}."
    )


def _cells(one: dict[str, Any], batch: int) -> list[str]:
    if "why" in one:
        return [one["what"], one["routing"], *["-"] * (len(HEAD) - 2)]
    name = one["what"] if one["batch"] == batch else f"{one['what']}, B {one['batch']:,}"
    forms = {
        "ms": ".2f", "rows_per_s": ",.0f", "peak_gib": ".1f", "tb_per_s": ".3g", "tflop_per_s": ".3g",
        "times_floor": ".2f", "of_ours": ".3f", "max_firing_rate": ".3f",
    }  # fmt: skip
    return [name, one["routing"], *("-" if one[key] is None else f"{one[key]:{form}}" for key, form in forms.items())]


def _by_part(shape: dict[str, Any]) -> list[str]:
    """Parts down, measurements across; what was not taken apart is left out."""
    taken = [one for one in shape["measured"] if one.get("parts")]
    if not taken:
        return []
    names = list(dict.fromkeys(name for one in taken for name in one["parts"]))
    rows = [[name, *(f"{one['parts'].get(name, 0):.2f}" for one in taken)] for name in names]
    return table(["ms by part", *(f"{one['what']}, {one['routing']}" for one in taken)], rows)


def _floor(shape: dict[str, Any]) -> list[str]:
    floor = shape["floor"]
    rows = [
        [part["name"], f"{part['ms']:.3g}", f"{part['bytes'] / 1e9:.3g}", f"{part['flops'] / 1e12:.3g}"]
        for part in floor["parts"]
    ]
    rows.append(["together", f"{floor['ms']:.3g}", f"{floor['bytes'] / 1e9:.3g}", f"{floor['flops'] / 1e12:.3g}"])
    return table(["floor", "ms", "GB", "TFLOP"], rows)
