"""How the options of the config `factored` were chosen: variants of it, compared on validation documents and words.

    python experiments/choose_quickstart.py --out runs/choose [--part model] [--part hook] [--seeds 0,1,2] [--set ...]

Part `model` varies gate, child input and child budget (and shows the published form and flat TopK beside them), part
`hook` varies the hook, the label and the anchor. It prints one Markdown table per part; every row comes from a run
folder's phase4/results.json and ablations.json, so an interrupted study goes on where it stopped.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from polytope_hsae.config import load_config
from polytope_hsae.fileio import read_json
from polytope_hsae.phases.run import Run
from polytope_hsae.phases.run_all import run_all

PUBLISHED = {"gate": "straight_through", "child_input": "input", "child_budget": "per_parent", "topk_child_total": None}
STRUCTURE: dict[str, dict[str, Any]] = {
    "published": PUBLISHED,
    "hard": {**PUBLISHED, "gate": "hard"},
    "straight_through, absolute noise": {**PUBLISHED, "router_noise": "absolute"},
    "hard, residual": {**PUBLISHED, "gate": "hard", "child_input": "residual"},
    "hard, shared": {"gate": "hard", "child_input": "input", "child_budget": "shared"},
    "hard, residual, shared": {"gate": "hard", "child_input": "residual", "child_budget": "shared"},
    "straight_through, residual, shared": {
        "gate": "straight_through",
        "child_input": "residual",
        "child_budget": "shared",
    },
}
HOOKS = [(f"model.layers.{layer}", "current_token") for layer in range(6)]
HOOKS += [("final_residual_pre_unembed", "belief"), ("final_residual_pre_unembed", "next_token")]
ANCHORS = ("none", "frozen", "pull", "slow")
COLUMNS = ("ev", "ce_recovered", "l0", "purity", "leakage", "recall", "steering_leakage", "steering_unreached")


def structure_arms() -> list[dict[str, Any]]:
    """One arm per form of the model, all random at the start, and flat TopK at the chosen form's L0."""
    arms: list[dict[str, Any]] = [{"name": _slug(name), "hsae": fields} for name, fields in STRUCTURE.items()]
    arms.append({"name": "flat_topk", "kind": "topk", "match": {"l0": _slug("hard, residual, shared")}})
    return [{"name": "baseline"}, *arms]


def hook_arms() -> list[dict[str, Any]]:
    """Baseline, flat TopK, the teacher under each anchor, permuted teachers, and both without the freeze stage."""
    arms: list[dict[str, Any]] = [
        {"name": "baseline"},
        {"name": "flat_topk", "kind": "topk", "match": {"l0": "baseline"}},
    ]
    for anchor in ANCHORS:
        arms.append({"name": f"teacher-{anchor}", "init": "teacher", "teacher": {"anchor": anchor}})
    for anchor in ("none", "frozen", "pull"):
        arms.append({"name": f"permuted-{anchor}", "init": "permuted_teacher", "teacher": {"anchor": anchor}})
    for init in ("teacher", "permuted_teacher"):
        name = f"{init.removesuffix('_teacher')}-frozen-one_stage"
        arms.append({"name": name, "init": init, "stages": "baseline", "teacher": {"anchor": "frozen"}})
    return arms


def run_variant(out: Path, arms: list[dict[str, Any]], overrides: list[str]) -> Path:
    """Run all phases of `factored` with these arms on validation data; returns the run folder."""
    settings = ["eval.split=val", f"arms={json.dumps(arms)}", *overrides]
    run_all(Run(load_config("factored", settings), out))
    return out


def rows(folder: Path, label: str) -> list[str]:
    """Markdown rows of one run folder, an arm each."""
    results = read_json(folder / "phase4" / "results.json")
    paired = read_json(folder / "phase4" / "ablations.json")["differences"]
    lines = []
    for arm, metrics in results["arms"].items():
        cells = ["-" if metrics[key]["value"] is None else f"{metrics[key]['value']:.3f}" for key in COLUMNS]
        gain = paired.get(arm, {}).get("purity")
        shown = (
            "-"
            if gain is None or gain["value"] is None or gain["ci95"] is None
            else (f"{100 * gain['value']:+.1f} [{100 * gain['ci95'][0]:+.1f}, {100 * gain['ci95'][1]:+.1f}]")
        )
        lines.append(f"| {label} | {arm} | " + " | ".join(cells) + f" | {shown} | {metrics['purity']['n']} |")
    return lines


def table(lines: list[str]) -> str:
    """A Markdown table of all rows."""
    head = ["run", "arm", *COLUMNS, "purity against baseline, points", "Q"]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/choose"))
    parser.add_argument("--part", action="append", choices=["model", "hook"])
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--hooks", default="", help="only these hooks, separated by commas")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for part in args.part or ["model", "hook"]:
        lines: list[str] = []
        for seed in seeds:
            options = [f"run.seed={seed}", *args.overrides]
            if part == "model":
                lines += rows(run_variant(args.out / f"model-s{seed}", structure_arms(), options), f"seed {seed}")
                continue
            for hook, label in HOOKS:
                if args.hooks and hook not in args.hooks.split(","):
                    continue
                here = [f"model.hook={hook}", f"concepts.label={label}", *options]
                folder = run_variant(args.out / f"{hook}-{label}-s{seed}", hook_arms(), here)
                lines += rows(folder, f"{hook}, {label}, seed {seed}")
        (args.out / f"{part}.md").write_text(table(lines) + "\n", encoding="utf-8")
        print(f"\n{part}\n\n{table(lines)}")


def _slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "_")


if __name__ == "__main__":
    main()
