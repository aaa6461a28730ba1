"""Triton kernels; installed as ``spd_fast.kernels``. None is shipped yet: see `spd-fast info`."""
