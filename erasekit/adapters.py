"""Small trained parts beside the U-Net's layers, for the two baselines that leave its weights alone: SPM and Receler."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

ADAPTERS = ("low-rank", "eraser")
LAST = (".up", ".U")  # the tensors an adapter's output is linear in


class Adapter:
    """Trained tensors hooked onto a U-Net while `attached`.

    "low-rank" (SPM): h <- W h + sum_n m_n up_n (down_n h) on a Linear or 1 x 1 Conv, with `<layer>.down` (n, in),
    `<layer>.up` (out, n), one row for each concept, and `multiplier` m (B, n); where that is None the layer is untouched.
    "eraser" (Receler): h <- h + U GELU(D h) after an attention layer, with `<layer>.D` (rank, d), `<layer>.U` (d, rank).
    `outputs`, when a dict, collects what each layer added.
    """

    def __init__(self, kind: str, tensors: dict[str, torch.Tensor]):
        if kind not in ADAPTERS:
            raise ValueError(f"unknown adapter {kind!r}: accepted are {', '.join(ADAPTERS)}")
        self.kind, self.tensors = kind, tensors
        self.multiplier: torch.Tensor | None = None
        self.outputs: dict[str, torch.Tensor] | None = None
        self.enabled = True
        self._handles: list = []

    def layers(self) -> list[str]:
        return list(dict.fromkeys(name.rsplit(".", 1)[0] for name in self.tensors))

    def attach(self, unet) -> None:
        for name in self.layers():
            hook = self._low_rank(name) if self.kind == "low-rank" else self._eraser(name)
            self._handles.append(unet.get_submodule(name).register_forward_hook(hook))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def attached(self, unet) -> Iterator["Adapter"]:
        """Hooked on for the duration of a with block."""
        self.attach(unet)
        try:
            yield self
        finally:
            self.detach()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The frozen model, for the duration of a with block, without gradients."""
        self.enabled = False
        try:
            with torch.no_grad():
                yield
        finally:
            self.enabled = True

    def _low_rank(self, name):
        def hook(module, inputs, output):
            if not self.enabled or self.multiplier is None:
                return None
            h, m = inputs[0], self.multiplier.to(output)
            down, up = self.tensors[f"{name}.down"].to(h), self.tensors[f"{name}.up"].to(h)
            if h.ndim == 4:  # (B, C, h, w), a 1 x 1 convolution
                inner = torch.einsum("bchw,nc->bnhw", h, down) * m[:, :, None, None]
                return output + torch.einsum("bnhw,on->bohw", inner, up)
            return output + ((h @ down.T) * m[:, None]) @ up.T

        return hook

    def _eraser(self, name):
        def hook(module, inputs, output):
            if not self.enabled:
                return None
            D, U = self.tensors[f"{name}.D"].to(output), self.tensors[f"{name}.U"].to(output)
            added = F.gelu(output @ D.T) @ U.T
            if self.outputs is not None:
                self.outputs[name] = added
            return output + added

        return hook


def low_rank_layers(unet, pick=lambda name: True) -> dict[str, tuple[int, int]]:
    """Every Linear and 1 x 1 Conv inside the transformer blocks that `pick` takes: name -> (in, out)."""
    layers = {}
    for name, module in unet.named_modules():
        if ".attentions." not in name or not pick(name):
            continue
        if isinstance(module, torch.nn.Linear):
            layers[name] = (module.in_features, module.out_features)
        elif isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1):
            layers[name] = (module.in_channels, module.out_channels)
    return layers


def new_low_rank(layers: dict[str, tuple[int, int]], concepts: int, generator) -> dict[str, torch.Tensor]:
    """Rank one for each concept: down as Kaiming's uniform initialisation has it, up zero, so that nothing changes at first."""
    tensors = {}
    for name, (wide, out) in layers.items():
        bound = (3.0 / wide) ** 0.5
        tensors[f"{name}.down"] = bound * (2 * torch.rand(concepts, wide, generator=generator) - 1)
        tensors[f"{name}.up"] = torch.zeros(out, concepts)
    return tensors
