"""What the operating system can do for large tensors on the CPU."""

import torch
from torch import Tensor

from spd_fast.ops.backends import native


def on_huge_pages(fresh: Tensor) -> Tensor:
    """The tensor, whose memory nobody has written yet; if large, on huge pages where there are any.

    The first write to a page enters the kernel, and what is read once through (a factor) or written
    once through (a batch of views) spends as long on finding its small pages as on its contents.
    """
    if fresh.device.type == "cpu" and native is not None:
        native.advise_huge_pages(fresh.view(-1).view(torch.uint8).numpy())  # numpy has no bfloat16
    return fresh


def give_back(owner: Tensor, part: Tensor) -> None:
    """Return the memory of a part of a tensor to the system; its contents are lost.

    Does nothing if the owner is itself a part of another tensor or shared with other processes.
    """
    owned = owner.untyped_storage().nbytes() == owner.nbytes and not owner.is_shared()
    if owned and native is not None and owner.device.type == "cpu":
        native.give_back(part.numpy())
