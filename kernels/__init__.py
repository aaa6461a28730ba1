"""Triton kernels; installed as ``spd_fast.kernels``."""
