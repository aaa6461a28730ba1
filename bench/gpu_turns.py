"""How often loops of the GPU kernels turn, and in which share of the cases a branch is taken.

By the line of their source, on average over the jobs of a launch; for gpu_roofline.py. A loop that
is missing here is an error there; a branch that is missing counts as taken, and its other side too.
"""

from itertools import permutations

import numpy as np

from spd_fast.views import COLUMN

WARPS = 8  # of a block of the CUDA kernels for views
Turns = dict[str, float | np.ndarray]


class Views:
    """The rows of the parameter table of one round, (jobs, 27), and what follows from them."""

    def __init__(self, params: np.ndarray, size: tuple[int, int], tile: tuple[int, int]):
        self.params, (self.height, self.width), self.tile = params, size, tile
        self.tiles = -(-self.height // tile[0]) * -(-self.width // tile[1])
        self.inside = self.height * self.width / (self.tiles * tile[0] * tile[1])
        self.taps_y, self.taps_x = (
            np.where(crop == out, 1, np.ceil(2 * np.maximum(crop / out, 1)))
            for crop, out in ((self["crop_height"], self.height), (self["crop_width"], self.width))
        )
        self.radius = self._blur_radius()
        self.patches = self["patch_kind"] != 0

    def __getitem__(self, column: str) -> np.ndarray:
        return self.params[:, COLUMN[column]]

    def _blur_radius(self) -> np.ndarray:
        """Of the taps that are not left out."""
        k = np.arange(self.height // 20 + 1)
        sigma = np.maximum(self["blur_sigma"], 1e-6)[:, None]
        taps = np.exp(-0.5 * (k / sigma) ** 2)
        taps /= 2 * taps.sum(1, keepdims=True) - 1
        return (taps >= 1e-6).sum(1) - 1

    def steps(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Of the jitter: adjustments that change something before contrast and from it on, and
        which of them turn the hue or change the saturation; all steps before contrast."""
        order = np.array(list(permutations(range(4))))[self[prefix + "jitter_order"].astype(int)]
        names = ("brightness", "contrast", "saturation", "hue")
        amounts = np.stack([self[prefix + name] for name in names], 1)
        changes = np.take_along_axis(amounts != (1, 1, 1, 0), order, 1)
        contrast = np.argmax(order == 1, 1)
        early = np.arange(4) < contrast[:, None]
        found = {"contrast": contrast}
        for part, its in (("before", early), ("after", ~early)):
            found[part] = (its & changes).sum(1)
            for name, op in (("saturation", 2), ("hue", 3)):
                found[f"{name} {part}"] = (its & changes & (order == op)).sum(1)
        return found

    def touched(self) -> np.ndarray:
        """Share of the tiles that a patch, grown by the blur of its edge, reaches."""
        share = 1.0
        for side, n, tile in (("y", self.height, self.tile[0]), ("x", self.width, self.tile[1])):
            start = self["target_top" if side == "y" else "target_left"]
            length = self["patch_height" if side == "y" else "patch_width"]
            reach = np.where(self["patch_kind"] == 1, np.ceil(4 * self[f"alpha_sigma_{side}"]), 0)
            first = np.maximum(start - reach, 0) // tile
            last = np.minimum(start + length + reach - 1, n - 1) // tile
            share = share * (last - first + 1) / -(-n // tile)
        return share * self.patches

    def blur_memory(self) -> int:
        """Bytes that a launch of finish asks for: BlurMemory in csrc/views_gpu_blur.h, at the
        largest radius."""
        rows, columns = _held(self.height // 20, self.tile)
        return (3 * rows + self.tile[0]) * columns * 2

    # ------------------------------------------------------------------------------------- CUDA

    def in_cuda(self, kernel: str) -> Turns:
        paste = kernel.startswith("paste")
        steps = self.steps("patch_" if paste else "")
        parts = {"res": ("before",), "fin": ("after",)}.get(kernel[:3], ("before", "after"))
        total = sum(steps[part] for part in parts)
        hue, saturation = (
            sum(steps[f"{name} {part}"] for part in parts) for name in ("hue", "saturation")
        )
        return {
            "if (threadIdx.x == 0) set_jitter_of_view(colors, p);": 1 / WARPS,
            "if (threadIdx.x == 0) set_jitter_of_patch(colors, p);": 1 / WARPS,
            "for (int step = 0; step < 4; ++step) {": 4,
            "for (int s = 0; s <= step; ++s) {": 2.5,
            "for (op = 0; used >> op & 1 || skip-- > 0;) ++op;": 1.5,
            "for (int step = first; step < last; ++step) {": total,
            "if (op == 3) {": _share(hue, total),
            "} else if (op == 2) {": _share(saturation, total - hue),
            "if (y < args.height && x < args.width) f(i, y, x);": self.inside,
            "if (place < 0 || place >= n) place = reflect(i, n);": 0,
            **(self._resize() | self._finish() | self._paste()),
        }

    def _resize(self) -> Turns:
        rows = (self.tile[0] - 1) * self["crop_height"] / self.height + self.taps_y
        chunks = np.ceil(np.minimum(rows, self["crop_height"]) / 32)
        moved = np.minimum(self["crop_height"] / self.height, 1)  # source rows to the next output
        return {
            "if (threadIdx.x < 2)": 1 / WARPS,
            "if (i < its_rows)": np.minimum(rows, self["crop_height"]) / (32 * chunks),
            "for (int k = 0; k < across.taps; ++k)": self.taps_x,
            "for (int k = 0; k < across.taps; ++k) {": self.taps_x,
            "for (int start = begin; start < end; start += chunk) {": chunks,
            "for (int y = max2(top, start); y < stop; ++y) {": self.taps_y / chunks,
            # The first of the 4 rows of a thread reads two.
            "while (held <= top) {": (2 + 3 * moved) / 4,
        }

    def _finish(self) -> Turns:
        down = (16 + 2 * self.radius + 15) // 16
        across = (8 + 2 * self.radius + 15) // 16
        rows, columns = _held(self.radius, self.tile)
        return {
            "for (int i = lane; i < args.tiles; i += warp_size) mean += sums[i];": (
                np.ceil(self.tiles / 32)
            ),
            "if (of_view.radius > 0) {": self.radius > 0,
            "if (sigma <= 0) return;": self["blur_sigma"] == 0,
            "if (radius == 0) return;": _share(
                (self.radius == 0) & (self["blur_sigma"] > 0), self["blur_sigma"] > 0
            ),
            "for (int y = warp; y < memory.rows; y += warps) {": rows / WARPS,
            "if (y < tile_y + 2 * blur.radius) {": (self.tile[0] + 2 * self.radius) / rows,
            "for (int x = lane; x < memory.width; x += together * warp_size) {": np.ceil(
                columns / 96
            ),
            "for (int channel = 0; channel < 3; ++channel) blur_channel(memory, blur, channel);": 3,
            "for (int column = first; column < width; column += step) {": (
                columns / 8 * self.tile[0] / 16 / WARPS
            ),
            "if (s < blur.steps_down) {": down / 3,
            "if (s < blur.steps_across) {": across / 3,
            "if (grayscale)": self["grayscale"],
            "if (job.view < args.fine.count) {": 0,
            "if (int(p.patch_kind) == no_patch) return;": ~self.patches,
        }

    def _paste(self) -> Turns:
        area = self["patch_height"] * self["patch_width"]
        sigma = (self["alpha_sigma_y"] + self["alpha_sigma_x"]) / 2
        return {
            "if (kind == no_patch || job.view >= views.count || job.top >= top + height + reach_y ||": (  # noqa: E501
                1 - self.touched()
            ),
            "if (threadIdx.x < tile_y)": self.tile[0] / 32 / WARPS,
            "if (threadIdx.x < tile_x)": self.tile[1] / 32 / WARPS,
            "for (int k = -radius; k <= radius; ++k) {": 8 * sigma + 1,
            "for (int i = threadIdx.x; i < area; i += threads) {": np.ceil(area / 32 / WARPS),
        }

    # ----------------------------------------------------------------------------------- Triton

    def in_triton(self, kernel: str) -> Turns:
        steps = self.steps("patch_" if kernel == "paste" else "")
        parts = {"res": ("before",), "fin": ("after",)}.get(kernel[:3], ("before", "after"))
        # It also goes through the steps that change nothing.
        turns = {"before": steps["contrast"], "after": 4 - steps["contrast"]}
        total = sum(turns[part] for part in parts)
        changing = sum(steps[part] for part in parts)
        hue, saturation = (
            sum(steps[f"{name} {part}"] for part in parts) for name in ("hue", "saturation")
        )
        area = self["patch_height"] * self["patch_width"]
        return {
            "for step in range(first, last):": total,
            "if op == 3:": _share(hue, total),
            "if factor != 1:": _share(changing - hue, total - hue),
            "if op == 2:": _share(saturation, changing - hue),
            "for j in range(taps_x):": self.taps_x,
            "for i in range(taps_y):": self.taps_y,
            "if radius > 0:": self.radius > 0,
            "for x_start in range(left - radius, right, BLUR_X):": np.ceil(
                (self.tile[1] + 2 * self.radius) / 32
            ),
            "for y_start in range(top - radius, bottom, BLUR_Y):": np.ceil(
                (self.tile[0] + 2 * self.radius) / 16
            ),
            "if tl.load(row + GRAYSCALE) != 0:": self["grayscale"],
            "if tl.load(row + PATCH_KIND) != 0:": self.patches,
            "if met & (kind != 0) & (view < n_written):": self.touched(),
            "for start in range(0, area, BLOCK):  # every program again: a patch is small": np.ceil(
                area / 512
            ),
            "for first in range(-radius, radius + 1, TAPS):": 2,
        }


def _held(radius, tile: tuple[int, int]) -> tuple:
    """Rows and columns of pixels that the blur of a tile keeps."""
    down, across = (16 + 2 * radius + 15) // 16, (8 + 2 * radius + 15) // 16
    return tile[0] - 16 + 16 * down, tile[1] - 8 + 16 * across


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.maximum(whole, 1)


def distances_in_cuda(d: int, images: int, rows_at_once: int) -> Turns:
    """rows_at_once: of a 16-byte load."""
    panels = -(-d // 8)
    together = 4 // images  # panels of a group
    lengths = 8 * np.minimum(np.arange(together, panels + together, together), panels)
    columns = 32 * rows_at_once // 8  # that a warp loads at once
    return {
        "for (int k = threadIdx.x; k < 8 * n_panels; k += threads) {": panels * 8 / 128,
        "for (int l = 0; l < args.layers && c >= 0; ++l) {": 2,
        "for (int q = 0; q * warps < groups; ++q) {": len(lengths) / 4,
        # Unrolled: two of them in each turn.
        "for (int k = lane / lanes_per_column; k < 8 * (last + 1); k += columns) {": (
            lengths.mean() / columns / 2
        ),
    }


def distances_in_triton(d: int, rows_tile: int, columns_tile: int) -> Turns:
    last = np.arange(rows_tile, 8 * -(-d // 8) + rows_tile, rows_tile)
    return {
        "for first_row in range(0, 8 * panels, rows_tile):": len(last),
        "for first_column in range(0, first_row + rows_tile, columns_tile):": (
            np.ceil(last / columns_tile).mean()
        ),
    }


def center_in_triton(d: int, layers: int, channels_tile: int) -> Turns:
    """Sorted channels: a tile has those of one layer, or of two where layers meet."""
    tiles = -(-d // channels_tile)
    own = "if tl.max(own.to(tl.int32), 0) > 0:"
    return {own: (tiles + layers - 1) / tiles / layers}
