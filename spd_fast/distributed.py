"""Several processes that train one model: `torchrun` starts them, torch.distributed joins them.

Everything here also works in a process of its own, where it does nothing.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from spd_fast.errors import InputError


@contextmanager
def process_group(
    device: torch.device, patience: timedelta | None = None
) -> Iterator[torch.device]:
    """Join the processes of `torchrun`, if it started this one; the device of this process.

    On GPUs each process takes the one of its local rank and NCCL moves tensors; gloo moves what is
    on the CPU. `patience`: how long processes wait for each other; None: torch's half an hour.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if dist.is_initialized():  # whoever joined them leaves them
        yield device
        return
    store, number, count = next(dist.rendezvous("env://"))
    if os.environ["GROUP_WORLD_SIZE"] == "1":
        # After a restart torchrun's store still holds the addresses of the processes before.
        store = dist.PrefixStore(f"start_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=patience)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def highest(number: int) -> int:
    """The highest of all ranks' numbers."""
    if world_size() == 1:
        return number
    found = torch.tensor(number)  # on the CPU: a GPU is not waited for
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of all ranks' tensors of one shape; no gradient flows."""
    if world_size() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values / world_size()


def agreed(function: Callable, *arguments):
    """What the function returns on this rank. All ranks wait for each other.

    Raises:
        InputError: on every rank, if it was raised on one.
    """
    result, reasons = None, {}
    try:
        result = function(*arguments)
    except InputError as error:
        if world_size() == 1:
            raise
        reasons = {rank(): str(error)}
    reasons = of_all_ranks(reasons)
    if reasons:
        raise InputError(reasons[min(reasons)])
    return result


def of_all_ranks(own: dict) -> dict:
    """The entries of all ranks' dictionaries."""
    if world_size() == 1:
        return own
    found = [None] * world_size()
    dist.all_gather_object(found, own)
    return {key: value for entries in found for key, value in entries.items()}


class _Gather(torch.autograd.Function):
    """See `gather`. Every rank computes the same loss of what is gathered, so its gradient reaches
    a rank's own part once from each: no communication is needed to add them up."""

    @staticmethod
    def forward(ctx, own: Tensor) -> Tensor:
        ctx.rows = len(own)
        parts = [
            torch.empty_like(own, memory_format=torch.contiguous_format)
            for _ in range(world_size())
        ]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient[rank() * ctx.rows :][: ctx.rows] * world_size()


def gather(own: Tensor) -> Tensor:
    """(N, ...) of each rank -> (ranks * N, ...), the same on all, in the order of the ranks.

    For losses over all ranks that every rank computes in full: DistributedDataParallel, which takes
    the mean of the ranks' gradients, then has the gradient of that loss.
    """
    return _Gather.apply(own) if world_size() > 1 else own


class _Sum(torch.autograd.Function):
    """The sum over ranks, of a value and of its gradient."""

    @staticmethod
    def forward(ctx, own: Tensor) -> Tensor:
        own = own.clone()
        dist.all_reduce(own)
        return own

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


class CpuSyncBatchNorm(_BatchNorm):
    """Batch norm over the batches of all ranks, which must be of one size. torch's own
    SyncBatchNorm is for GPUs only."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dtype = x.dtype
        x = x.to(self.running_mean.dtype)  # statistics of halves are taken in float32
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        mean = _Sum.apply(x.mean(axes)) / world_size()
        centred = x - mean.view(shape)
        variance = _Sum.apply(centred.square().mean(axes)) / world_size()
        count = x.numel() // x.shape[1] * world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked.add_(1)
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(dtype)


def averaged(model: nn.Module) -> nn.Module:
    """The model, with gradients that are the mean over all ranks'. Every rank moves buffers alike,
    or keeps its own."""
    accepted = inspect.signature(DistributedDataParallel).parameters
    newer = "forward_sync_buffers" in accepted  # in torch's later versions
    name = "forward_sync_buffers" if newer else "broadcast_buffers"
    return DistributedDataParallel(model, **{name: False}) if world_size() > 1 else model


def sync_batch_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch norms over all ranks; its state dict stays the same."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = CpuSyncBatchNorm
    return model
