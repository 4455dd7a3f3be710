"""All four phases of a config; the same as `hsae run`.

python experiments/run_all_phases.py --config configs/quickstart.yaml
"""

from polytope_hsae.cli import experiment

if __name__ == "__main__":
    experiment("run")
