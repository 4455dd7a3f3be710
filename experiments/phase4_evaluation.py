"""Phase 4, evaluation and targets of a config; the same as `hsae phase4`.

python experiments/phase4_evaluation.py --config configs/quickstart.yaml
"""

from polytope_hsae.cli import experiment

if __name__ == "__main__":
    experiment("phase4")
