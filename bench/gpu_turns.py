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
        self.params, (self.height, self.width) = params, size
        self.tile = tile = tile[0], min(tile[1], -(-self.width // 32) * 32)
        self.tiles = -(-self.height // tile[0]) * -(-self.width // tile[1])
        blocks = -(-self.height // 16) * -(-self.width // 16)  # each made by a warp
        self.across = -(-self.width // 32)  # tiles that a block of CUDA makes
        self.inside = 256 * blocks / (self.tiles * tile[0] * tile[1])
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

    def touched(self, tile: tuple[int, int], box: str = "target") -> np.ndarray:
        """Share of the tiles that a patch reaches: its source, or its target with blurred edges."""
        tiles = -(-self.height // tile[0]) * -(-self.width // tile[1])
        reached = self._reached("y", tile[0], box) * self._reached("x", tile[1], box)
        return reached / tiles * self.patches

    def _reached(self, side: str, tile: int, box: str = "target") -> np.ndarray:
        """Tiles along one axis."""
        n = self.height if side == "y" else self.width
        start = self[f"{box}_{'top' if side == 'y' else 'left'}"]
        length = self["patch_height" if side == "y" else "patch_width"]
        blurred = (self["patch_kind"] == 1) & (box == "target")
        reach = np.where(blurred, np.ceil(4 * self[f"alpha_sigma_{side}"]), 0)
        last = np.minimum(start + length + reach - 1, n - 1) // tile
        return last - np.maximum(start - reach, 0) // tile + 1

    # ------------------------------------------------------------------------------------- CUDA

    def in_cuda(self, kernel: str) -> Turns:
        paste = kernel.startswith("paste")
        steps = self.steps("patch_" if paste else "")
        parts = {"res": ("before",), "fin": ("after",)}.get(kernel[:3], ("before", "after"))
        total = sum(steps[part] for part in parts)
        hue, saturation = (
            sum(steps[f"{name} {part}"] for part in parts) for name in ("hue", "saturation")
        )
        gray = self["grayscale"] if kernel.startswith("finish") else 0
        total = total + gray
        return {
            "if (threadIdx.x == 0) {": 1 / WARPS,
            "if (threadIdx.x == 0) set_mean(colors, mean);": 1 / WARPS,
            "if (threadIdx.x == 0) set_jitter_of_view(colors, p);": 1 / WARPS,
            "if (threadIdx.x == 0) set_jitter_of_patch(colors, p);": 1 / WARPS,
            "for (int step = 0; step < 4; ++step) {": 4,
            "for (int s = 0; s <= step; ++s) {": 2.5,
            "for (op = 0; used >> op & 1 || skip-- > 0;) ++op;": 1.5,
            "for (int step = first; step < last; ++step) {": total,
            "if (op == 3) {": _share(hue, total),
            "} else if (op == 2) {": _share(saturation, total - hue),
            "} else if (op == 4) {": _share(gray, total - hue - saturation),
            "for (int left = 0; left < args.width; left += tile_x) {": self.across,
            "if (job.room >= side) {": 1,
            "} else if (job.inside()) {": self.inside,
            "if (job.inside()) {": self.inside if kernel.startswith("finish") else 1,
            "if (place < 0) place = reflect(i, n);": 0,
            **(self._resize() | self._finish() | self._paste()),
        }

    def _steps(self, side: str) -> np.ndarray:
        """Of 16 source pixels that 16 outputs read, on average over the view. Of views they are
        read from a multiple of 4 columns on."""
        out = self.height if side == "height" else self.width
        crop = self[f"crop_{side}"][:, None]
        scale, start = crop / out, np.arange(0, out, 16)
        support = np.maximum(scale, 1)
        first = np.floor((start + 0.5) * scale - support + 0.5).clip(0)
        last = (np.minimum(start + 15, out - 1) + 0.5) * scale
        last = np.minimum(np.floor(last + support + 0.5), crop)
        if side == "width" and self["source"][0] >= 0:
            first -= (self["crop_left"][:, None] + first) % 4
        return np.ceil((last - first) / 16).mean(1)

    def _resize(self) -> Turns:
        down, across = self._steps("height"), self._steps("width")
        return {
            # With photographs of this size always.
            "if (max2(steps_across, steps_down) <= held && 16 * steps_across <= row_length) {": 1,
            "for (int step = first; step < min2(down.steps, Source::most_steps); step += sharing)": (  # noqa: E501
                down * self.inside / 2
            ),
            "for (int block = first; block * side < args.width; block += sharing) {": (
                self.across * self.inside
            ),
            "if (block >= warp_size && block % warp_size < sharing) columns.set(args, p, block - first);": (  # noqa: E501
                0
            ),
            "for (int step = 0; step < min2(across.steps, memory.across_held); ++step)": across,
            "if (!all && step >= count) return axis.taps_of_columns<parts>(step);": 0,
            "for (int k = 0; k < steps_across; ++k) taps_across<Source>(across, held_across, k).add_to(gain);": (  # noqa: E501
                across
            ),
            "for (int step = 0; step < down.steps; ++step)": down,
            "for (int step = 0; step < steps_down; ++step) {": down,
            "for (int k = 1; k < steps_across; ++k) add_columns(k);": across - 1,
        }

    def _finish(self) -> Turns:
        steps_across = (8 + 2 * self.radius + 15) // 16
        columns = 24 + 16 * steps_across
        tops = np.arange(0, self.height, self.tile[0])
        rows = np.minimum(self.tile[0], self.height - tops) + 2 * self.radius[:, None]
        pairs = (rows[..., None] + 1) // 2
        return {
            "for (int i = 0; i < args.tiles; ++i) sum += args.sums[int64_t(job.index) * args.tiles + i];": (  # noqa: E501
                self.tiles
            ),
            "if (job.left == 0) {": 1 / self.across,
            "for (int i = rows * BlurMemory::columns + threadIdx.x; i < BlurMemory::plane; i += threads)": (  # noqa: E501
                (48 - pairs.mean((1, 2))) * 72 / 256
            ),
            "for (int column = (job.left ? end - tile_x : 0) + lane; column < end; column += warp_size) {": (  # noqa: E501
                (np.ceil(columns / 32) + self.across - 1) / self.across
            ),
            "for (int row = job.warp; row < rows; row += at_once * warps) {": (
                np.ceil((pairs - np.arange(WARPS)) / 16).mean((1, 2))
            ),
            "if (blur.radius > 0) {": self.radius > 0,
            "if (sigma <= 0) return;": self["blur_sigma"] == 0,
            "if (radius == 0) return;": _share(
                (self.radius == 0) & (self["blur_sigma"] > 0), self["blur_sigma"] > 0
            ),
            "if (s < steps_across) {": steps_across / 3,
            "if (views.together > 1) {": 1,
            "if (job.view < args.fine.count) fine = planes_of<Half>(args.fine, job.view, job.image);": (  # noqa: E501
                0
            ),
            "if (in_patch) keep_patch(args, job, box, channel, pixels);": (
                self.touched((16, 16), "patch")
            ),
        }

    def _paste(self) -> Turns:
        area = self["patch_height"] * self["patch_width"]
        sigma = (self["alpha_sigma_y"] + self["alpha_sigma_x"]) / 2
        rows, columns = self._reached("y", 1), self._reached("x", 1)
        return {
            "if (kind == no_patch) return;": ~self.patches,
            "for (int y0 = first_y; y0 < end_y; y0 += most) {": 1,
            "for (int x0 = first_x; x0 < end_x; x0 += most) {": 1,
            "if (place < rows)": np.ceil(rows / 32) / WARPS,
            "} else if (place < columns) {": np.ceil(columns / 32) / WARPS,
            "for (int k = -radius; k <= radius; ++k) {": 8 * sigma + 1,
            "for (int first = threadIdx.x; first < rows * columns; first += patch_pixels * threads) {": (  # noqa: E501
                np.ceil(rows * columns / 32 / WARPS / 4)
            ),
            "if (i >= rows * columns) continue;": _left_out(rows * columns),
            "if (k >= patch.count) continue;": _left_out(rows * columns),
            # Share of warps; their 32 pixels may lie in two rows.
            "if (inside[k])": (
                np.minimum((self["patch_height"] + 1) / np.maximum(rows, 1), 1)
                * np.minimum((self["patch_width"] + 31) / np.maximum(columns, 1), 1)
            ),
            "if (in_fine) blend(args.fine, fine, patch);": 0,
            "for (int first = threadIdx.x; first < area; first += patch_pixels * threads) {": (
                np.ceil(area / 32 / WARPS / 4)
            ),
            "if (i >= area) continue;": _left_out(area),
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
            "if met & (kind != 0) & (view < n_written):": self.touched(self.tile),
            "for start in range(0, area, BLOCK):  # every program again: a patch is small": np.ceil(
                area / 512
            ),
            "for first in range(-radius, radius + 1, TAPS):": 2,
        }


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.maximum(whole, 1)


def _left_out(pixels: np.ndarray) -> np.ndarray:
    """Share of turns of four at once in which a block of threads is past the last pixel."""
    used = np.ceil(pixels / 32 / WARPS)
    return 1 - _share(used, 4 * np.ceil(used / 4))


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
