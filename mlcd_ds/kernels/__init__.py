"""Fused kernels (Triton) behind the same functions; used only where --head_kernels triton asks for them."""

import torch

from mlcd_ds.errors import ConfigError


def check_available(device: torch.device) -> None:
    """Raises ConfigError where the kernels cannot run: without triton, or on a CPU outside Triton's interpreter."""
    try:
        from triton.runtime.interpreter import InterpretedFunction

        from mlcd_ds.kernels.epilogue import _exponentials
    except ImportError as error:
        raise ConfigError(
            f"--head_kernels triton: {error}. CUDA builds of torch bring triton along, elsewhere `pip install triton`; or "
            "leave the flag out."
        ) from None
    if device.type != "cuda" and not isinstance(_exponentials, InterpretedFunction):
        raise ConfigError(
            f"--head_kernels triton needs a GPU, this rank runs on {device.type!r}: leave the flag out. (TRITON_INTERPRET=1 "
            "runs the kernels on a CPU, slowly, for tests.)"
        )
