"""Phase 1, the teacher of a config; the same as `hsae phase1`.

python experiments/phase1_teacher_extraction.py --config configs/quickstart.yaml
"""

from polytope_hsae.cli import experiment

if __name__ == "__main__":
    experiment("phase1")
