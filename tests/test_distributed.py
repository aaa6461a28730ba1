"""Processes of `torchrun` on the CPU: they train what one trains, and survive a killed one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pretrain_runs import config, trace, write_images

from spd_fast.distributed import gather, mean_over_ranks, process_group, world_size
from spd_fast.errors import InputError
from spd_fast.models import read_checkpoint
from spd_fast.pretrain import pretrain
from spd_fast.pretrain_config import part_size, resolved

TESTS = str(Path(__file__).parent)


def torchrun(code: str, ranks: int = 2, *options: str) -> subprocess.CompletedProcess:
    """Run Python code in `ranks` processes."""
    program = f"import sys; sys.path.insert(0, {TESTS!r}); import torch\n"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", *options, "--no-python", sys.executable, "-c"]
    return subprocess.run([*command, program + code], capture_output=True, text=True, timeout=300)


def check(code: str, ranks: int = 2) -> None:
    done = torchrun(code, ranks)
    assert done.returncode == 0, done.stderr[-3000:]


def pretrain_in(ranks: int, data, out, *options: str, **kwargs) -> subprocess.CompletedProcess:
    return torchrun(
        "from pretrain_runs import config\n"
        "from spd_fast.pretrain import pretrain\n"
        f"sys.exit(pretrain(config({str(data)!r}, {str(out)!r}, **{kwargs!r})))",
        ranks,
        *options,
    )


# ---------------------------------------------------------------------------------------- the parts


def test_alone_nothing_happens():
    x = torch.randn(3, 2)
    assert world_size() == 1 and gather(x) is x and mean_over_ranks(x) is x
    with process_group(torch.device("cpu")) as device:
        assert device.type == "cpu" and world_size() == 1


GATHER = """
import torch.distributed as dist
from spd_fast.distributed import *
from spd_fast.losses import nt_xent
with process_group(torch.device("cpu")):
    torch.manual_seed(0)
    z, z_hat = torch.randn(2, 8, 5, dtype=torch.float64)
    own = slice(4 * rank(), 4 * rank() + 4)
    mine, mine_hat = (v[own].clone().requires_grad_() for v in (z, z_hat))
    loss = nt_xent(gather(mine), gather(mine_hat), 0.2)
    loss.backward()
    z.requires_grad_(), z_hat.requires_grad_()
    whole = nt_xent(z, z_hat, 0.2)
    whole.backward()
    assert torch.equal(loss, whole)
    # DistributedDataParallel divides the sum over ranks by their number
    torch.testing.assert_close(mine.grad / 2, z.grad[own])
    torch.testing.assert_close(mine_hat.grad / 2, z_hat.grad[own])
    assert mean_over_ranks(torch.tensor(float(rank()))) == 0.5 and highest(rank()) == 1
"""


def test_gathered_losses_have_the_gradient_of_one_process():
    check(GATHER)


BATCH_NORM = """
import copy
from torch.nn.parallel import DistributedDataParallel
from spd_fast.distributed import *
with process_group(torch.device("cpu")) as device:
    torch.manual_seed(0)
    layers = {(8, 3, 4, 5): nn.BatchNorm2d(3), (8, 6): nn.BatchNorm1d(6, affine=False)}
    for shape, layer in layers.items():
        x = torch.randn(shape, dtype=torch.float64) * 3 + 1
        weight = torch.randn(shape, dtype=torch.float64)
        layer = layer.double()
        ours = sync_batch_norms(copy.deepcopy(layer), device)
        own = slice(4 * rank(), 4 * rank() + 4)
        mine, x = x[own].clone().requires_grad_(), x.requires_grad_()
        y, expected = ours(mine), layer(x)
        (y * weight[own]).sum().backward(), (expected * weight).sum().backward()
        torch.testing.assert_close(y, expected[own])
        torch.testing.assert_close(mine.grad, x.grad[own])
        for name, value in layer.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value)
        torch.testing.assert_close(ours.eval()(mine), layer.eval()(x)[own])
        half, wide = ours.train().float()(x[own].bfloat16()), ours(x[own].float())
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), wide, atol=0.05, rtol=0.05)
"""


def test_synchronised_batch_norm_equals_torchs_on_one_process():
    check(BATCH_NORM)


# ----------------------------------------------------------------------------------------- training

SETTINGS = {
    "simsiam": {},
    # At a size of 32 the last layers normalise 4 numbers, one pixel of each image of a group, and
    # rounding alone may move one of them across zero.
    "moco": {"dim": 16, "queue_size": 16, "bn_group": 4, "size": 64},
    "simclr": {"dim": 16, "warmup_epochs": 0, "lr": 0.05, "accumulate": 2},
}


@pytest.mark.parametrize("recipe", SETTINGS)
def test_two_processes_train_what_one_trains(recipe, data, tmp_path):
    settings = {"recipe": recipe, "epochs": 1, **SETTINGS[recipe]}
    assert pretrain(config(data, tmp_path / "one", **settings)) == 0
    done = pretrain_in(2, data, tmp_path / "two", **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = trace(tmp_path / "one"), trace(tmp_path / "two")
    assert len(one) == len(two) == 3
    # SimSiam's normalised projections of 8 images are sensitive: rounding grows by the step
    for step, (a, b) in enumerate(zip(one, two)):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4 * 10**step, abs=1e-5 * 10**step), (
                name,
                step,
            )
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    load = [read_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two")]
    assert load[0]["loader"] == load[1]["loader"]
    assert load[0]["model"].keys() == load[1]["model"].keys()


KILLED = """
import os, signal
import spd_fast.pretrain as module
from pretrain_runs import config
from spd_fast.distributed import rank
train_step, calls = module.train_step, []
def killed(*args):
    calls.append(1)
    if len(calls) == 5 and rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(*args)
module.train_step = killed
sys.exit(module.pretrain(config({data!r}, {out!r}, resume="auto")))
"""


def test_the_job_comes_back_after_a_killed_process(data, tmp_path):
    """Killed in step 5 of 9; the checkpoint is of step 3."""
    out = tmp_path / "run"
    done = torchrun(KILLED.format(data=str(data), out=str(out)), 2, "--max-restarts=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Signal 9" in done.stderr or "exitcode: -9" in done.stderr, done.stderr[-3000:]
    assert [line["step"] for line in trace(out)] == list(range(1, 10))
    assert read_checkpoint(out / "last.pt")["step"] == 9


STOPPED = """
import os, signal, time
import spd_fast.pretrain as module
from pretrain_runs import config
from spd_fast.distributed import rank
from spd_fast import checkpoints
train_step, save_state, calls = module.train_step, checkpoints.save_state, []
def signalled(*args):
    calls.append(1)
    if len(calls) == 2 and rank() in {ranks}:
        os.kill(os.getpid(), signal.SIGUSR1)
    return train_step(*args)
def slow(*args):
    time.sleep(3)
    if rank() in {ranks}:
        os.kill(os.getpid(), signal.SIGUSR1)  # again
    save_state(*args)
module.train_step, checkpoints.save_state = signalled, slow
assert module.pretrain(config({data!r}, {out!r})) == module.SAVED
"""


@pytest.mark.parametrize("ranks", [(1,), (0, 1)])
def test_a_signal_stops_all_processes(ranks, data, tmp_path):
    """To one or to all; none ends before the checkpoint is written."""
    out = tmp_path / "run"
    check(STOPPED.format(data=str(data), out=str(out), ranks=ranks))
    assert read_checkpoint(out / "last.pt")["step"] == 2
    # one process goes on where two have stopped
    assert pretrain(config(data, out, resume="auto", max_steps=None)) == 0
    assert len(trace(out)) == 9


def test_unreadable_images_of_all_processes_are_listed(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_images(data)
    bad = [data / f"{i:02d}.jpg" for i in range(0, 24, 4)]
    for path in bad:
        path.write_bytes(b"no image")
    done = pretrain_in(2, data, tmp_path / "run", epochs=1, skip_bad_images=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{len(bad)} unreadable images were replaced by others" in done.stdout
    assert all(str(path) in done.stdout for path in bad)


def test_batches_that_cannot_be_shared_are_refused(data, tmp_path):
    for settings, ranks, message in (
        ({"batch_size": 8}, 3, "batch_size 8 cannot be shared among 3 processes"),
        ({"batch_size": 8, "accumulate": 3}, 1, "batch_size 8 cannot be shared among 3 parts"),
        ({"batch_size": 8, "accumulate": 3}, 2, "shared among 3 parts of 2 processes"),
        ({"batch_size": 1}, 1, "batch_size must be at least 2 for batch norm, got 1"),
        ({"batch_size": 8, "accumulate": 8}, 1, "must be at least 16 for batch norm among 8 parts"),
        ({"recipe": "moco", "batch_size": 3, "queue_size": 8, "bn_group": 2}, 1, "at least 4"),
        (
            {"recipe": "moco", "batch_size": 14, "queue_size": 16, "bn_group": 4},
            2,
            "a multiple of 4, as many as MoCo's groups, got 14",
        ),
    ):
        with pytest.raises(InputError, match=message):
            part_size(resolved(config(data, tmp_path, **settings)), ranks)
    assert part_size(resolved(config(data, tmp_path, batch_size=24, accumulate=3)), 2) == 4
