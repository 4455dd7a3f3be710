"""How long does the evidence take? 1,000 permutations over 100 parents at d = 2,048 and V = 50,000, part by part.

    python benchmarks/permutations.py --out FOLDER [--width 2048] [--vocab 50000] [--parents 100]

Random rows; every parent has 6 children of 8 words of one to three tokens, and the pool has 12,000 words. Writes
permutations.json and permutations.md: by the clock, and CPU time of the one thread it uses, which is what an idle core
takes however busy the machine is now. Exit code 1 if that is more than LIMIT seconds for all parts together.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polytope_hsae.fileio import write_json, write_text
from polytope_hsae.geometry.causal import CausalGeometry
from polytope_hsae.geometry.difference import nontrivial_difference
from polytope_hsae.geometry.estimators import ConceptEstimator
from polytope_hsae.geometry.orthogonality import omega, orthogonality_ratio
from polytope_hsae.geometry.polytopes import polytopes
from polytope_hsae.geometry.signal import concept_signal, frequency_order
from polytope_hsae.geometry.statistics import concept_words, dealt_siblings, shared_parent, word_sums
from polytope_hsae.provenance import environment

LIMIT = 180.0
CHILDREN, WORDS, POOL = 6, 8, 12_000


def measure(width: int, vocab: int, parents: int, permutations: int) -> dict[str, dict[str, float]]:
    """Seconds of every part, in order, by the clock and of CPU time."""
    seconds: dict[str, dict[str, float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        clock, cpu = time.perf_counter(), time.process_time()
        result = call()
        seconds[name] = {"clock": time.perf_counter() - clock, "cpu": time.process_time() - cpu}
        return result

    generator = np.random.default_rng(0)
    rows_Vd = torch.randn(vocab, width, generator=torch.Generator().manual_seed(0))
    n_words = min(POOL, vocab // 3)
    tokens = iter(generator.permutation(vocab).tolist())
    pool = [[next(tokens) for _ in range(size)] for size in generator.integers(1, 4, n_words)]
    listed = iter(pool)
    child_words = [[next(listed) for _ in range(WORDS)] for _ in range(parents * CHILDREN)]
    child_parent = [parent for parent in range(parents) for _ in range(CHILDREN)]

    geometry = timed("covariance and its roots", lambda: CausalGeometry(rows_Vd))
    estimate = timed("mean row", lambda: ConceptEstimator(rows_Vd, geometry))
    words = timed("rows of the concepts", lambda: concept_words(child_words, child_parent, estimate.rows))
    sums = timed("rows of the pool", lambda: word_sums(pool, estimate.rows))
    shared = timed("shared parent", lambda: shared_parent(words, *sums, permutations=permutations))
    timed("dealt siblings", lambda: dealt_siblings(words, permutations=permutations))
    timed("non-trivial difference", lambda: nontrivial_difference(words, permutations=permutations))
    strong = np.full(parents, 4.0)  # random rows have no parent with z > 3, so beta and omega would cost nothing
    timed("beta", lambda: orthogonality_ratio(words, strong))
    timed("omega and kappa", lambda: omega(words, strong, shared.s_p))
    timed("signal", lambda: concept_signal(estimate, words, child_words, frequency_order(vocab, None)))
    flat = [token for of_child in child_words for word in of_child for token in word]
    timed("polytopes", lambda: polytopes(words, child_words, estimate.rows(flat)))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=50_000)
    parser.add_argument("--parents", type=int, default=100)
    parser.add_argument("--permutations", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = [os.getloadavg()[0]]
    seconds = measure(options.width, options.vocab, options.parents, options.permutations)
    load.append(os.getloadavg()[0])
    total = {kind: sum(part[kind] for part in seconds.values()) for kind in ("clock", "cpu")}
    within = total["cpu"] <= LIMIT
    sizes = {name: getattr(options, name) for name in ("width", "vocab", "parents", "permutations")}
    document = {
        "environment": environment("cpu"), **sizes, "children": CHILDREN, "words": WORDS, "pool": POOL,
        "seconds": seconds, "total": total, "limit": LIMIT, "load_before_and_after": load,
    }  # fmt: skip
    write_json(options.out / "permutations.json", document)
    lines = [", ".join(f"{name} {value:,}" for name, value in sizes.items()) + "; one thread.", ""]
    lines += ["| part | CPU s | s by the clock |", "| --- | --- | --- |"]
    for name, part in (seconds | {"together": total}).items():
        lines.append(f"| {name} | {part['cpu']:.1f} | {part['clock']:.1f} |")
    stated = f"Stated: under {LIMIT:.0f} s of CPU time. {'They are.' if within else 'They are not.'}"
    lines += ["", f"Load of the machine: {load[0]:.1f} before, {load[1]:.1f} after. {stated}"]
    write_text(options.out / "permutations.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
