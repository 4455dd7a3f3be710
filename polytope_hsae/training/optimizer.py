"""AdamW whose step is one pass over each tensor: on a GPU our kernel, with the clipping inside, on a CPU PyTorch's."""

from typing import Any

import torch
from torch import Tensor

from .. import ops


class FusedAdamW(torch.optim.AdamW):
    """As torch.optim.AdamW, with the same state; `adam_` is our kernel, None where PyTorch's step is taken.

    With the kernels a step has two halves. `prepare` counts the step and sends what changes with it (rates, bias
    corrections) to the GPU; `step` launches the kernels, which read it there, so that a CUDA graph can replay them.
    `gradient_scale`, one number on the GPU, multiplies every gradient; where it is NaN nothing changes.
    """

    gradient_scale: Tensor

    def __init__(self, params: Any, **options: Any):
        super().__init__(params, **options)
        if all(parameter.device.type == "cpu" for group in self.param_groups for parameter in group["params"]):
            for group in self.param_groups:
                group["fused"] = True
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.adam_ = ops.of(parameters[0]).adam_
        self.hyper = torch.zeros(len(parameters), 4, device=parameters[0].device)

    def prepare(self, frozen: set[int]) -> None:
        """With the kernels: count a step of every parameter whose id is not in `frozen`."""
        rows = []
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state and id(parameter) not in frozen:
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                if id(parameter) not in frozen:
                    state["step"] += 1
                t, rate = state["step"].item() if state else 1.0, float(group["lr"])
                rows.append([rate, 1 - rate * group["weight_decay"], 1 / (1 - b1**t), (1 - b2**t) ** -0.5])
        # Fresh pinned memory every time: the copy runs later, when this function has long returned.
        self.hyper.copy_(torch.tensor(rows).pin_memory(), non_blocking=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if self.adam_ is None:
            return super().step(closure)
        number = 0
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    moments = state["exp_avg"], state["exp_avg_sq"]
                    self.adam_(
                        parameter,
                        parameter.grad,
                        *moments,
                        self.gradient_scale,
                        self.hyper[number],
                        b1,
                        b2,
                        group["eps"],
                    )
                number += 1
        return None
