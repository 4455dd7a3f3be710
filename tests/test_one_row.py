"""How far one has to read to follow a row through the default model, and what the package no longer asks for."""

import re
import sys
from itertools import pairwise
from pathlib import Path

import torch

import polytope_hsae
from polytope_hsae.config import HSAEConfig, StageConfig, TrainingConfig
from polytope_hsae.models.hsae import HierarchicalSAE
from polytope_hsae.training.trainer import HSAETrainer

PACKAGE = Path(polytope_hsae.__file__).parent
COMPREHENSIONS = {"<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>"}  # frames of their own before Python 3.12
ROWS = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))


def model():
    return HierarchicalSAE(HSAEConfig(n_parents=64, topk_parent=8, topk_child_total=4), 32).train()


def traced(work):
    """(the functions of the package that are called, in order; the files that one is in, by every call and return)."""
    calls, stack, places = [], [], []

    def profile(frame, event, argument):
        code = frame.f_code
        if not code.co_filename.startswith(str(PACKAGE)) or code.co_name in COMPREHENSIONS:
            return
        if event == "call":
            calls.append((code.co_filename, code.co_name))
            stack.append(code.co_filename)
        elif event == "return" and stack:
            stack.pop()
        places.extend(stack[-1:])

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls, places


def test_a_row_goes_through_few_functions_and_files():
    made = model()
    calls, places = traced(lambda: made(ROWS))
    assert len(calls) <= 25, calls
    assert len({file for file, _ in calls}) <= 6, calls
    assert sum(a != b for a, b in pairwise(places)) <= 20, calls


class Same:
    """A stream of one batch, again and again."""

    def next(self):
        return ROWS


def test_a_training_step_is_few_calls():
    stage = StageConfig(name="train", steps=10)
    trainer = HSAETrainer(model(), Same(), [stage], TrainingConfig(batch_size=256))
    trainer.train_step(stage)
    calls, _ = traced(lambda: trainer.train_step(stage))
    assert len(calls) <= 70, calls


def test_only_the_operations_ask_for_a_device():
    names = re.compile(r"\b(uses_kernels|is_cuda|HAS_TRITON)\b")
    asking = [path for path in PACKAGE.rglob("*.py") if names.search(path.read_text(encoding="utf-8"))]
    assert {path.relative_to(PACKAGE).parts[0] for path in asking} <= {"ops"}
