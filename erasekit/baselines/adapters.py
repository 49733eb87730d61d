"""Small trained modules beside the U-Net's layers, for methods that leave its weights alone: SPM, Receler and MACE's LoRA."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..artifacts import ADAPTERS


class Adapter:
    """Trained tensors, `<layer>.<name>`; while attached, `change(layer, inputs, output)` is added to each layer's output."""

    linear_in: ClassVar[tuple[str, ...]]  # endings of the tensors that the output is linear in

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors, self.enabled, self._handles = tensors, True, []

    def attach(self, unet) -> None:
        """Raises AttributeError, before anything is changed, for a layer the U-Net does not have."""
        names = dict.fromkeys(name.rsplit(".", 1)[0] for name in self.tensors)
        for name, layer in [(name, unet.get_submodule(name)) for name in names]:
            self._handles.append(layer.register_forward_hook(partial(self._hook, name)))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, name, module, inputs, output):
        change = self.change(name, inputs[0], output) if self.enabled else None
        return None if change is None else output + change

    @contextmanager
    def attached(self, unet) -> Iterator["Adapter"]:
        """Attached inside the block."""
        self.attach(unet)
        try:
            yield self
        finally:
            self.detach()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The frozen model inside the block, without gradients."""
        self.enabled = False
        try:
            with torch.no_grad():
                yield
        finally:
            self.enabled = True


class LowRank(Adapter):
    """SPM: h <- W h + sum_n m_n up_n (down_n h) on a Linear or a 1 x 1 Conv.

    `down` (concepts, in), `up` (out, concepts), and `multiplier` m (B, concepts); where that is None nothing is added.
    """

    linear_in = (".up",)
    multiplier: Tensor | None = None

    def change(self, layer, inputs, output):
        if self.multiplier is None:
            return None
        h, m = inputs, self.multiplier.to(output)
        down, up = self.tensors[f"{layer}.down"].to(h), self.tensors[f"{layer}.up"].to(h)
        if h.ndim == 4:  # (B, C, h, w), a 1 x 1 convolution
            inner = torch.einsum("bchw,nc->bnhw", h, down) * m[:, :, None, None]
            return torch.einsum("bnhw,on->bohw", inner, up)
        return ((h @ down.T) * m[:, None]) @ up.T


class Eraser(Adapter):
    """Receler: h <- h + U GELU(D h) after an attention layer, `D` (rank, d), `U` (d, rank).

    `outputs`, when a dict, collects what each layer added.
    """

    linear_in = (".U",)
    outputs: dict[str, Tensor] | None = None

    def change(self, layer, inputs, output):
        D, U = self.tensors[f"{layer}.D"].to(output), self.tensors[f"{layer}.U"].to(output)
        change = F.gelu(output @ D.T) @ U.T
        if self.outputs is not None:
            self.outputs[layer] = change
        return change


ADAPTERS |= {"low-rank": LowRank, "eraser": Eraser}


def trainable(tensors: dict[str, Tensor], device) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(tensor.to(device)) for name, tensor in tensors.items()}


def low_rank_layers(unet, pick=lambda name: True) -> dict[str, tuple[int, int]]:
    """Every Linear and 1 x 1 Conv inside the transformer blocks that `pick` accepts: name -> (in, out)."""
    layers = {}
    for name, module in unet.named_modules():
        if ".attentions." not in name or not pick(name):
            continue
        if isinstance(module, torch.nn.Linear):
            layers[name] = (module.in_features, module.out_features)
        elif isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1):
            layers[name] = (module.in_channels, module.out_channels)
    return layers


def new_low_rank(layers: dict[str, tuple[int, int]], concepts: int, generator) -> dict[str, Tensor]:
    """Rank one per concept: down by Kaiming's uniform initialisation, up zero, so that nothing changes at first."""
    tensors = {}
    for name, (width, out) in layers.items():
        bound = (3.0 / width) ** 0.5
        tensors[f"{name}.down"] = bound * (2 * torch.rand(concepts, width, generator=generator) - 1)
        tensors[f"{name}.up"] = torch.zeros(out, concepts)
    return tensors
