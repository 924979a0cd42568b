"""What the head multiplies with: products in float32 or of bfloat16 factors, and the memory that its steps reuse."""

import math
from functools import cache

import torch


class Products:
    """The three matrix products, with factors in the dtype of the centers."""

    def factor(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` as a factor of a product."""
        return tensor

    def bytes_per_logit(self, centers: torch.Tensor, fused: bool) -> int:
        """What one entry of the workspace takes, with the copy of it that the products need where that is made whole."""
        return centers.element_size()

    def put(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        """out = a @ b, of factors."""
        torch.mm(a, b, out=out)

    def add(self, a: torch.Tensor, b: torch.Tensor, into: torch.Tensor) -> None:
        """into += a @ b, of factors."""
        into.addmm_(a, b)


class BFloat16Products(Products):
    """Factors rounded to bfloat16, products accumulated and returned in float32.

    On a CPU the rounded factors are multiplied in float32: the same numbers, and faster than its bfloat16 products.
    """

    BLOCK = 1 << 24
    """Elements of a sum that are made at a time."""

    def factor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.bfloat16()

    def bytes_per_logit(self, centers: torch.Tensor, fused: bool) -> int:
        return 2 if fused else centers.element_size() + 2

    def put(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        if out.is_cuda:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)

    def add(self, a: torch.Tensor, b: torch.Tensor, into: torch.Tensor) -> None:
        if into.is_cuda and _accumulates_in_place(into.device):
            torch.addmm(into, a, b, out_dtype=into.dtype, out=into)
            return
        rows = max(1, self.BLOCK // into.shape[1])
        product = into.new_empty(min(rows, len(into)), into.shape[1])
        for first in range(0, len(into), rows):
            block = into[first : first + rows]
            self.put(a[first : first + rows], b, product[: len(block)])
            block += product[: len(block)]


@cache
def _accumulates_in_place(device: torch.device) -> bool:
    """Whether this torch adds a product of bfloat16 factors to a float32 sum; it learned to after `mm` with out_dtype."""
    into, factor = torch.ones(16, 16, device=device), torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    try:
        torch.addmm(into, factor, factor, out_dtype=into.dtype, out=into)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # the dtypes do not fit, says an older torch
        return False
    return True


class Buffers:
    """Memory that every step needs.

    Kept on a CPU, where the system clears each page of a large array anew: three of these took a quarter of a small step.
    On a GPU torch's own cache does that, and lets the encoder have the memory in between.
    """

    def __init__(self, device: torch.device):
        self._kept: dict[str, torch.Tensor] | None = {} if device.type == "cpu" else None

    def take(self, name: str, shape: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor of that shape, for this step alone: the next call with this name may return it again."""
        tensor = self.hand_out(name, shape, like)
        self.give(name, tensor)
        return tensor

    def hand_out(self, name: str, shape: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor of that shape, which is the caller's until it `give`s it back."""
        if self._kept is None:
            return like.new_empty(shape)
        elements = math.prod(shape)
        flat = self._kept.pop(name, None)
        # Memory of inference mode may not be written outside of it, nor that of another dtype be taken for this one.
        fits = (
            flat is not None and flat.dtype == like.dtype and flat.is_inference() == torch.is_inference_mode_enabled()
        )
        if not fits or flat.numel() < elements:
            del flat  # the old one goes before the new one comes
            # A little more: the number of rows differs from step to step.
            flat = like.new_empty(elements + elements // 16)
        return flat[:elements].view(shape)

    def give(self, name: str, tensor: torch.Tensor) -> None:
        """Keeps the memory of `tensor`, all of what it is a view of, for the next call with this name."""
        if self._kept is not None:
            whole = tensor if tensor._base is None else tensor._base
            self._kept[name] = whole.view(-1)
