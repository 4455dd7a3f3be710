"""Phase 3, the teacher's models and controls of a config; the same as `hsae phase3`.

python experiments/phase3_teacher_hsae.py --config configs/quickstart.yaml
"""

from polytope_hsae.cli import experiment

if __name__ == "__main__":
    experiment("phase3")
