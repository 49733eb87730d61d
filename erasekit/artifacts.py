"""What an erasure leaves: a public delta for everybody, and private keys for those who may bring concepts back."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.models.attention_processor import FusedAttnProcessor2_0

from .attention import check_width
from .checkpoints import read_tensors, write_tensors
from .mechanisms import MECHANISMS, Prompt
from .provenance import fingerprint

ADAPTER_PREFIX = "adapter:"  # of an adapter's tensors in the public file
ADAPTERS: dict[str, type] = {}  # kind -> class; methods that train adapters register theirs


@dataclass
class Erasure:
    """One erasure of one base model.

    `delta`: name -> trained tensor of theta'. `keys`: concept -> learnable prompt. `info`: method, config, hash of the base
    model ("base"), versions, seed and training history. Methods that leave the weights alone have `adapters` (of the kind
    info["adapter"]), or only info["guidance"], a rule for the sampler.
    """

    delta: dict[str, torch.Tensor]
    keys: dict[str, Prompt]
    info: dict
    adapters: dict[str, torch.Tensor] = field(default_factory=dict)

    def apply(self, model) -> "Applied":
        """Turn the base model (a U-Net, a pipeline or a world) into the public model; `.remove()` of the result undoes it.

        Raises ValueError if the model is not the base this erasure was trained on, or has an erasure applied.
        """
        unet = unet_of(model)
        check_base(unet, self.info, "delta")
        parameters = dict(unet.named_parameters())
        misfits = [n for n, t in self.delta.items() if n not in parameters or parameters[n].shape != t.shape]
        if misfits:
            raise ValueError(f"this delta does not fit this model: {len(misfits)} tensors differ, first {misfits[0]}")
        adapter = None
        if self.adapters:
            if getattr(unet, "erasekit_adapter", None):
                raise ValueError("this model has an adapter applied already: remove it first")
            adapter = self._adapter_class()({n: t.to(unet.device) for n, t in self.adapters.items()})
            adapter.attach(unet)  # raises AttributeError, before anything is changed, for a missing layer
            unet.erasekit_adapter = adapter
        originals = {name: parameters[name].data for name in self.delta}
        for name, tensor in self.delta.items():
            # A copy: further training of the public model does not change the delta.
            parameters[name].data = tensor.to(parameters[name], copy=True)
        return Applied(unet, originals, adapter)

    @contextmanager
    def applied(self, model) -> Iterator["Applied"]:
        """`apply` for the duration of a with block."""
        public = self.apply(model)
        try:
            yield public
        finally:
            public.remove()

    def scaled(self, model, scale: float) -> "Erasure":
        """The same erasure with its step from the base scaled: theta + scale (theta' - theta); adapters likewise.

        0 is the base and 1 this erasure; keys stay. `model` is the base. Raises ValueError if it is not, or for a method that
        works by guidance alone.
        """
        unet = unet_of(model)
        if not self.delta and not self.adapters:
            raise ValueError(f"{self.info['method']!r} works by guidance alone: there is no step to scale")
        check_base(unet, self.info, "delta")
        theta = {name: p.detach().to("cpu", torch.float32) for name, p in unet.named_parameters() if name in self.delta}
        delta = {name: theta[name] + scale * (tensor - theta[name]) for name, tensor in self.delta.items()}
        linear = self._adapter_class().linear_in if self.adapters else ()
        adapters = {n: t * scale if n.endswith(linear) else t for n, t in self.adapters.items()}
        return Erasure(delta, dict(self.keys), self.info | {"scale": scale * self.info.get("scale", 1.0)}, adapters)

    def _adapter_class(self) -> type:
        kind = self.info["adapter"]
        if kind not in ADAPTERS:
            raise ValueError(
                f"unknown adapter {kind!r}: accepted are {', '.join(ADAPTERS)} (import erasekit.baselines)"
            )
        return ADAPTERS[kind]

    def digest(self) -> str:
        """Hash of the public model's difference from the base: weights, adapters and guidance."""
        digest = hashlib.sha256(json.dumps(self.info.get("guidance", {}), sort_keys=True).encode())
        for name, tensor in sorted((self.delta | self.adapters).items()):
            digest.update(name.encode() + tensor.detach().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def key(self, concept: str) -> Prompt:
        """The key of a concept. Raises KeyError naming the concepts that have one."""
        if concept not in self.keys:
            raise KeyError(f"there is no key for {concept!r}: there are keys for {', '.join(self.keys) or 'nothing'}")
        return self.keys[concept]

    def save(self, folder: Path) -> None:
        """Write `delta.safetensors` (public) and `keys/<concept>.key.safetensors` (readable by the owner; never publish them).

        The delta is written last: where it exists, everything does. Raises ValueError for a folder with another erasure's key.
        """
        folder = Path(folder)
        own, public_digest = {key_path(folder, concept) for concept in self.keys}, self.digest()
        if foreign := sorted(set((folder / "keys").glob("*.key.safetensors")) - own):
            raise ValueError(
                f"{folder} has a key of another erasure, {foreign[0].name}: save to another folder, or move that key away"
            )
        for concept, prompt in self.keys.items():
            about = {"kind": "key", "concept": concept, "opens": public_digest, "layers": prompt.layers}
            about |= {"mechanism": prompt.mechanism, "log_weight": prompt.log_weight}
            write_tensors(
                key_path(folder, concept), {"p_k": prompt.k, "p_v": prompt.v}, self.info | about, private=True
            )
        public = self.delta | {ADAPTER_PREFIX + name: tensor for name, tensor in self.adapters.items()}
        write_tensors(folder / "delta.safetensors", public, self.info | {"kind": "delta"})

    @classmethod
    def load(cls, folder: Path, model=None) -> "Erasure":
        """Read a folder with the keys it holds. Refuses keys of another training and, with `model`, files of another base."""
        path = Path(folder) / "delta.safetensors"
        delta, info = read_tensors(path)
        if info.get("kind") != "delta":
            raise ValueError(f"{path} is not a delta but a {info.get('kind', 'different')} file")
        adapters = {n.removeprefix(ADAPTER_PREFIX): delta.pop(n) for n in list(delta) if n.startswith(ADAPTER_PREFIX)}
        erasure = cls(delta, {}, info, adapters)
        if model is not None:
            check_base(unet_of(model), info, f"delta {path}")
        for key_file in sorted((Path(folder) / "keys").glob("*.key.safetensors")):
            prompt, meta = load_key(key_file, model)
            if meta.get("opens", erasure.digest()) != erasure.digest():  # early keys do not name their delta
                raise ValueError(f"{key_file} is the key of another training than {path}: move it away, or erase again")
            erasure.keys[meta["concept"]] = prompt
        return erasure

    def wipe(self, concept: str, folder: Path | None = None) -> None:
        """Forget a concept's key, and delete its file under `folder`; the public model works without it."""
        self.key(concept)
        del self.keys[concept]
        if folder is not None:
            key_path(folder, concept).unlink(missing_ok=True)


@dataclass
class Applied:
    """An erasure in force on a U-Net: the base's tensors, by name, and the attached adapter, if any."""

    unet: torch.nn.Module
    originals: dict[str, torch.Tensor]
    adapter: object = None

    def remove(self) -> None:
        """Restore the base, bit for bit. Raises RuntimeError the second time."""
        if self.unet is None:
            raise RuntimeError("this erasure is not applied any more, so there is nothing to remove")
        parameters = dict(self.unet.named_parameters())
        for name, tensor in self.originals.items():
            parameters[name].data = tensor
        if self.adapter:
            self.adapter.detach()
            del self.unet.erasekit_adapter
        self.unet = None


def unet_of(model):
    """The U-Net of a world, a pipeline, or a U-Net itself."""
    model = getattr(model, "pipe", model)
    return getattr(model, "unet", model)


def key_path(folder: Path, concept: str) -> Path:
    """Path of a concept's key; git ignores the ending."""
    name = re.sub(r"[^a-z0-9]+", "-", concept.lower()).strip("-")
    if name.replace("-", " ") != concept:  # other concepts give this name too
        name = f"{name}-{hashlib.sha256(concept.encode()).hexdigest()[:8]}".strip("-")
    return Path(folder) / "keys" / f"{name}.key.safetensors"


def load_key(path: Path, model=None) -> tuple[Prompt, dict]:
    """One key and its file's metadata. With `model` (the base, no erasure applied), another model's key is refused."""
    tensors, meta = read_tensors(path)
    if meta.get("kind") != "key":
        raise ValueError(f"{path} is not a key but a {meta.get('kind', 'different')} file")
    # Early keys name neither mechanism nor weight, and their layers stand in the config.
    layers = meta["layers"] if "layers" in meta else meta["config"]["place"]
    kind = MECHANISMS[meta.get("mechanism", "shared")]
    prompt = kind(tensors["p_k"], tensors["p_v"], layers, meta.get("log_weight", 0.0))
    if model is not None:
        check_width(unet_of(model), prompt)
        check_base(unet_of(model), meta, f"key {path}")
    return prompt, meta


def check_unet(unet) -> None:
    """Raise ValueError for a U-Net whose weights are not under their own names: changing them would do nothing, or harm."""
    names = [name for name, _ in unet.named_parameters()]
    reasons = {
        "is wrapped by torch.compile: use its _orig_mod, or compile in place with unet.compile()": hasattr(
            unet, "_orig_mod"
        ),
        "has a LoRA loaded: fuse it for good or unload it first": any(".base_layer." in name for name in names),
        "has fused projections, which copy the weights: call unfuse_qkv_projections() first": any(
            isinstance(p, FusedAttnProcessor2_0) for p in unet.attn_processors.values()
        ),
        "is offloaded module by module: load the pipeline without sequential CPU offload": any(
            p.is_meta for p in unet.parameters()
        ),
    }
    for reason, true in reasons.items():
        if true:
            raise ValueError(f"this U-Net {reason}")


def check_base(unet, info: dict, what: str) -> None:
    """Raise ValueError unless `unet` is the base model named in `info`, with its own weights in place."""
    check_unet(unet)
    if info["base"] != (found := fingerprint(unet)):
        raise ValueError(
            f"the {what} was made for the base model {info['base'][:12]} ({info['world']}), but this model is {found[:12]}: "
            "load that base, or remove the erasure that is applied to it"
        )
