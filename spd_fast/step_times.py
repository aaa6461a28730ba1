"""Which part of a training step takes how long."""

import time

import torch

PARTS = ("data", "forward", "backward", "optimizer", "other")


class StepTimes:
    """Seconds of the parts of a step. A part is what has passed since the mark before.

    On a GPU the marks are events in its stream: a part is what the GPU spent on it, or waited in
    it, and nothing waits for an event before `seconds_of`.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.start = self._now()
        self.marks: list[tuple[str, object]] = []

    def mark(self, part: str) -> None:
        """One of PARTS ends here; a step may have several pieces of one."""
        self.marks.append((part, self._now()))

    def take(self) -> list[tuple[str, object]]:
        """The marks of a step that ends here, for `seconds_of`."""
        marks = [("", self.start), *self.marks]
        self.start, self.marks = marks[-1][1], []
        return marks

    def seconds_of(self, marks: list[tuple[str, object]]) -> dict[str, float]:
        """The seconds of each part."""
        seconds = dict.fromkeys(PARTS, 0.0)
        if self.on_gpu:
            marks[-1][1].synchronize()
        for (_, start), (part, end) in zip(marks, marks[1:]):
            seconds[part] += start.elapsed_time(end) / 1000 if self.on_gpu else end - start
        return seconds

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
