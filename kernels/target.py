"""What the kernels ask of the GPU that they are launched on."""

import triton


def has_tensor_cores() -> bool:
    """Whether Triton multiplies on tensor cores: not on Turing, where tiles of float16 then need
    far more registers."""
    if triton.knobs.runtime.interpret:
        return True
    return triton.runtime.driver.active.get_current_target().arch >= 80
