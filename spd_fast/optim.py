"""What the recipes of pre-training optimise with: LARS, groups of parameters, schedules."""

import math

import torch
from torch import Tensor

from spd_fast.methods import Method


class LARS(torch.optim.Optimizer):
    """SGD with momentum and a rate per tensor, as SimCLR's own code has it (You et al. 2017).

    With g the gradient and weight decay, v = momentum * v + lr * trust * |w| / |g| * g, w -= v. The
    rate stands inside the momentum. Vectors, that is biases and batch norms, are neither decayed
    nor scaled.

    Args:
        params: as for any optimizer.
        lr: rate.
        momentum: of v.
        weight_decay: added to the gradient, times w.
        trust: eta of the paper.
    """

    def __init__(
        self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0, trust: float = 1e-3
    ):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            vectors = [p for p in learning if p.ndim <= 1]
            self._move(vectors, [p.grad for p in vectors], group)
            others = [p for p in learning if p.ndim > 1]
            self._move(others, self._scaled(others, group), group)

    # All tensors at once: on a GPU fewer and larger kernels. A CPU, whose caches hold one tensor
    # rather than all, would be faster one by one, but there it hardly matters.

    def _scaled(self, params: list[Tensor], group: dict) -> list[Tensor]:
        if not params:
            return []
        updates = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
        sizes, lengths = (torch.stack(torch._foreach_norm(x)) for x in (params, updates))
        ratios = group["trust"] * sizes / lengths
        ratios = torch.where((sizes > 0) & (lengths > 0), ratios, 1.0)
        return torch._foreach_mul(updates, ratios.unbind())

    def _move(self, params: list[Tensor], updates: list[Tensor], group: dict) -> None:
        if not params:
            return
        for p in params:
            if "v" not in self.state[p]:
                self.state[p]["v"] = torch.zeros_like(p)
        v = [self.state[p]["v"] for p in params]
        torch._foreach_mul_(v, group["momentum"])
        torch._foreach_add_(v, updates, alpha=group["lr"])
        torch._foreach_sub_(params, v)


def new_optimizer(
    name: str,
    method: Method,
    lr: float,
    momentum: float,
    weight_decay: float,
    scaled: bool = False,
) -> torch.optim.Optimizer:
    """Over all parameters that learn; the schedule leaves groups with "fixed_lr" alone.

    `scaled`: a GradScaler stands before it, which leaves out steps. If the first one is left out,
    torch's fused SGD goes on from a momentum that was never initialised.
    """
    fixed = method.fixed_rate_parameters()
    apart = {id(p) for p in fixed}
    learning = [p for p in method.parameters() if p.requires_grad and id(p) not in apart]
    groups = [{"params": learning, "fixed_lr": False}]
    if fixed:
        groups.append({"params": fixed, "fixed_lr": True})
    return optimizer_of(name, groups, lr, momentum, weight_decay, fused=not scaled)


def optimizer_of(
    name: str, params, lr: float, momentum: float, weight_decay: float, fused: bool = True
) -> torch.optim.Optimizer:
    """ "lars" or "sgd", over parameters or groups of them."""
    rates = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    if name == "lars":
        return LARS(params, **rates)
    return torch.optim.SGD(params, **rates, fused=fused)


def scheduled_lr(schedule: str, initial: float, step: int, steps: int, warmup: int = 0) -> float:
    """The rate of step 0 .. steps - 1.

    Over the first `warmup` steps it rises linearly from 0. "cosine" then falls to 0 along half a
    cosine; "steps" is a tenth after each third of all steps.
    """
    if step < warmup:
        return initial * step / warmup
    if schedule == "steps":
        return initial * 0.1 ** (3 * step // steps)
    return initial * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
