"""What we made in the formats of others: a saved PaDiM as one program of plain torch operators, the
backbone of a checkpoint as torchvision's state dict.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spd_fast.errors import InputError
from spd_fast.files import save_state, torch_path
from spd_fast.models import new_backbone, read_checkpoint
from spd_fast.padim import PaDiM
from spd_fast.reference import smooth_upsample_matrix


def export_padim(model_path: str | Path, out: str | Path, batch: int | None = None) -> str:
    """Write a saved PaDiM as a program of torch.export.

    `torch.export.load(out).module()(images)` gives the maps (B, H, W) and scores (B,) of
    `PaDiM.score` for (B, 3, H, W) float32 images, on the CPU. It neither imports spd-fast nor
    looks for features that are not finite: there, maps and scores are NaN or infinite too.

    Args:
        model_path: a file that `PaDiM.save` wrote.
        out: the file to write, *.pt2. About as large as the model's: the factor stays packed, in
            its dtype, and may have more than 2 GiB.
        batch: the only B that the program takes; None: any. 1 is written as another product of
            matrices and is faster than one image in a program that takes any B.

    Returns:
        What the program takes, for people.

    Raises:
        InputError: not a saved PaDiM, a name that does not end in .pt2, `batch` below 1, or `out`
            cannot be written.
    """
    if Path(out).suffix != ".pt2":  # torch.export complains of any other
        raise InputError(f"the name of an exported program ends in .pt2, got {out}")
    if batch is not None and batch < 1:
        raise InputError(f"batch must be at least 1, got {batch}")
    model = PaDiM.load(model_path)
    program = _Program(model, single=batch == 1).eval().requires_grad_(False)
    images = torch.zeros(batch or 2, 3, *model.image_size)
    shapes = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    exported = torch.export.export(program, (images,), dynamic_shapes=shapes)
    with torch_path(out) as temporary:
        torch.export.save(exported, temporary)
    height, width = model.image_size
    return f"({batch or 'B'}, 3, {height}, {width}) images prepared as by preset {model.preset!r}"


def export_backbone(checkpoint: str | Path, out: str | Path) -> str:
    """Write the backbone of a checkpoint of pre-training as a state dict of torchvision.

    It has all that `torchvision.models.resnet50().load_state_dict(torch.load(out))` asks for, and
    what timm's ResNets of the same name do: `timm.create_model("resnet50", checkpoint_path=out)`.
    anomalib takes the torchvision network as a backbone. The classifier fc, of 1000 classes, is all
    zeros: the features are what was learnt.

    Returns:
        The backbone's name.

    Raises:
        InputError: no checkpoint of ours, or `out` cannot be written.
    """
    state = read_checkpoint(checkpoint)
    name = state["config"]["backbone"]
    width = new_backbone(name).fc.in_features
    fc = {"fc.weight": torch.zeros(1000, width), "fc.bias": torch.zeros(1000)}
    save_state(out, {k: v.contiguous() for k, v in state["backbone"].items()} | fc)
    return name


class _Program(nn.Module):
    def __init__(self, model: PaDiM, single: bool):
        super().__init__()
        self.single = single
        # Contiguous, because torch.export.save warns of every tensor that is not.
        self.network = model.network.to(memory_format=torch.contiguous_format)
        self.mean = nn.Buffer(model.mean)
        self.factor = nn.Buffer(model.factor)
        with torch.no_grad():
            layers = self.network(torch.zeros(1, 3, *model.image_size))
        self.grid = tuple(layers[0].shape[2:])
        for axis, n_in, n_out in zip("yx", self.grid, model.image_size):
            matrix = smooth_upsample_matrix(n_in, n_out, border=model.settings.border)
            self.register_buffer(f"smooth_{axis}", matrix.float())
        first = 0
        for number, layer in enumerate(layers):  # model.channels is sorted
            own = model.channels - first
            own = own[(own >= 0) & (own < layer.shape[1])]
            self.register_buffer(f"channels_{number}", own)
            first += layer.shape[1]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        layers = self.network(images.contiguous(memory_format=torch.channels_last))
        distances = self.distances(self.embed(layers) - self.mean[:, None])
        maps = self.smooth_y @ distances.T.unflatten(1, self.grid) @ self.smooth_x.mT
        return maps, maps.amax((1, 2))

    def embed(self, layers: list[Tensor]) -> Tensor:
        """(P, B, d), as `reference.embed`; of each layer only the kept channels are enlarged."""
        kept = []
        for number, layer in enumerate(layers):
            layer = layer.index_select(1, self.get_buffer(f"channels_{number}"))
            for axis, n in zip((2, 3), self.grid):
                places = torch.arange(n) * layer.shape[axis] // n
                layer = layer.index_select(axis, places)
            kept.append(layer)
        return torch.cat(kept, 1).flatten(2).permute(2, 0, 1)

    def distances(self, delta: Tensor) -> Tensor:
        """||W delta|| (P, B) of delta (P, B, d). Panel r of W is a view (P, 8 (r + 1), 8) of the
        packed factor (see `reference.packed_index`), so W is never unpacked."""
        d = delta.shape[2]
        delta = F.pad(delta, (0, -d % 8))
        by_image = delta.contiguous() if self.single else delta.mT.contiguous()
        squares = 0
        for r in range(-(-d // 8)):
            columns = 8 * (r + 1)
            start, end = 4 * r * columns, 4 * (r + 2) * columns
            if self.factor.dtype == torch.int8:  # see `reference.quantize`
                start, end = start + 64 * (r + 1), end + 64 * (r + 1)
            panel = self.factor[:, start:end].unflatten(1, (columns, 8)).float()
            # Both are the same product; which one MKL does thrice as fast depends on B.
            if self.single:
                product = by_image[:, :, :columns] @ panel
            else:
                product = (panel.mT @ by_image[:, :columns]).mT
            if self.factor.dtype == torch.int8:
                rows = self.factor[:, start - 64 : start].contiguous().view(torch.float32)
                scale, diagonal = rows[:, None].split(8, 2)
                product = product * scale + delta[:, :, columns - 8 : columns] * diagonal
            squares = squares + product.square().sum(2)
        return squares.sqrt()
