import json

import pytest
import torch
from pretrain_runs import config, write_images

from spd_fast import step_times
from spd_fast.pretrain import pretrain
from spd_fast.step_times import PARTS, StepTimes


def test_parts_of_a_step(monkeypatch):
    clock = iter([10.0, 12.0, 13.0, 13.5, 16.0, 20.0, 21.0])
    monkeypatch.setattr(step_times.time, "perf_counter", lambda: next(clock))
    times = StepTimes(torch.device("cpu"))
    for part in ("data", "forward", "backward", "forward", "backward"):
        times.mark(part)
    first = times.take()
    times.mark("other")  # from the last mark of the step before
    expected = {"data": 2, "forward": 1 + 2.5, "backward": 0.5 + 4, "optimizer": 0, "other": 0}
    assert times.seconds_of(first) == expected
    assert times.seconds_of(times.take()) == dict.fromkeys(PARTS, 0) | {"other": 1}


def test_a_run_tells_them(tmp_path):
    (tmp_path / "data").mkdir()
    data = write_images(tmp_path / "data")
    assert pretrain(config(data, tmp_path / "run", accumulate=2)) == 0
    steps = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert steps
    for step in steps:
        seconds = {part: step[f"{part}_s"] for part in PARTS}
        assert all(took > 0 for took in seconds.values())
        assert sum(seconds.values()) == pytest.approx(
            config(data, "").batch_size / step["images_per_s"]
        )
