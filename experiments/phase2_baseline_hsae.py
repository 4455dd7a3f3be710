"""Phase 2, the baseline and the flat models of a config; the same as `hsae phase2`.

python experiments/phase2_baseline_hsae.py --config configs/quickstart.yaml
"""

from polytope_hsae.cli import experiment

if __name__ == "__main__":
    experiment("phase2")
