"""What an erasure leaves behind: a public delta everybody gets, and private keys for those who may bring concepts back."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.models.attention_processor import FusedAttnProcessor2_0

from .adapters import LAST, Adapter
from .attention import Prompt, check_width
from .checkpoints import read_tensors, write_tensors
from .guidance import FacilitatedTransport, Guidance, NegativePrompt, SafeLatentDiffusion

BESIDE = "adapter:"  # prefix of an adapter's tensors in the public file


def fingerprint(network) -> str:
    """SHA-256 over the names and half-precision values of a network's weights: the same in fp32 and fp16 on any device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if name.split(".")[-2:-1] in (["to_qkv"], ["to_kv"]):
            continue  # copies that fusing leaves behind
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Erasure:
    """One erasure of one base model.

    `delta`: name -> trained tensor of theta'. `keys`: concept -> learnable prompt. `info`: method, config, base-model hash
    ("base"), versions, seed, and how it was made. Methods that leave the weights alone have `adapters` (of the kind
    info["adapter"]), or only info["guidance"], which `guide` follows.
    """

    delta: dict[str, torch.Tensor]
    keys: dict[str, Prompt]
    info: dict
    adapters: dict[str, torch.Tensor] = field(default_factory=dict)
    _originals: dict[str, torch.Tensor] | None = field(default=None, repr=False)
    _adapter: Adapter | None = field(default=None, repr=False)

    def apply(self, unet) -> None:
        """Turn the base model into the public model. Raises ValueError if `unet` is not the base this was trained on."""
        if self._originals is not None:
            raise ValueError("this erasure is already applied: remove it first")
        self._check_base(unet, "delta")
        parameters = dict(unet.named_parameters())
        misfits = [n for n, t in self.delta.items() if n not in parameters or parameters[n].shape != t.shape]
        if misfits:
            raise ValueError(
                f"this delta does not fit this model: {len(misfits)} tensors differ, the first is {misfits[0]}"
            )
        if self.adapters:
            self._adapter = Adapter(self.info["adapter"], {n: t.to(unet.device) for n, t in self.adapters.items()})
            self._adapter.attach(
                unet
            )  # raises AttributeError, before anything is changed, for a layer that is not there
        self._originals = {}
        for name, tensor in self.delta.items():
            self._originals[name] = parameters[name].data
            # A copy: who trains the public model further does not change the delta.
            parameters[name].data = tensor.to(parameters[name], copy=True)

    def remove(self, unet) -> None:
        """Give the base back, bit for bit. Raises RuntimeError if this erasure is not applied."""
        if self._originals is None:
            raise RuntimeError("this erasure is not applied, so there is nothing to remove")
        parameters = dict(unet.named_parameters())
        for name, tensor in self._originals.items():
            parameters[name].data = tensor
        if self._adapter:
            self._adapter.detach()
        self._originals = self._adapter = None

    @contextmanager
    def applied(self, unet) -> Iterator[None]:
        """`apply` for the duration of a with block."""
        self.apply(unet)
        try:
            yield
        finally:
            self.remove(unet)

    def scaled(self, unet, scale: float) -> "Erasure":
        """The same erasure with its step from the base scaled: theta + scale (theta' - theta); adapters add scale times as much.

        0 is the base, 1 is this erasure; keys stay as they are. `unet` is the base. Raises ValueError if it is not, or for a
        method that works by guidance alone.
        """
        if not self.delta and not self.adapters:
            raise ValueError(f"{self.info['method']!r} works by guidance alone: there is no step to scale")
        self._check_base(unet, "delta")
        theta = {name: p.detach().to("cpu", torch.float32) for name, p in unet.named_parameters() if name in self.delta}
        delta = {name: theta[name] + scale * (tensor - theta[name]) for name, tensor in self.delta.items()}
        adapters = {n: t * scale if n.endswith(LAST) else t for n, t in self.adapters.items()}
        return Erasure(delta, dict(self.keys), self.info | {"scale": scale * self.info.get("scale", 1.0)}, adapters)

    def digest(self) -> str:
        """Hash of what its public model is: weights, adapters, and how it is guided."""
        digest = hashlib.sha256(json.dumps(self.info.get("guidance", {}), sort_keys=True).encode())
        for name, tensor in sorted((self.delta | self.adapters).items()):
            digest.update(name.encode() + tensor.detach().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def guide(self, scale: float) -> Guidance:
        """How images of the public model are guided; call it while the erasure is applied.

        Plain guidance, except for the methods that need their own: SLD and the negative prompt, and SPM, whose adapters open
        by prompt.
        """
        rule = dict(self.info.get("guidance", {"kind": "plain"}))
        kind = rule.pop("kind")
        if kind == "facilitated transport":
            return FacilitatedTransport(scale, self._adapter, **rule)
        return {"plain": Guidance, "negative prompt": NegativePrompt, "sld": SafeLatentDiffusion}[kind](scale, **rule)

    def key(self, concept: str) -> Prompt:
        """The key of a concept. Raises KeyError naming the concepts there are keys for."""
        if concept not in self.keys:
            raise KeyError(f"there is no key for {concept!r}: there are keys for {', '.join(self.keys) or 'nothing'}")
        return self.keys[concept]

    def save(self, folder: Path) -> None:
        """Write `delta.safetensors` (public) and `keys/<concept>.key.safetensors` (owner-readable; never publish them).

        The delta comes last: where it lies, all is there. Raises ValueError for a folder with another concept's key.
        """
        folder = Path(folder)
        own, public_digest = {key_path(folder, concept) for concept in self.keys}, self.digest()
        if foreign := sorted(set((folder / "keys").glob("*.key.safetensors")) - own):
            raise ValueError(
                f"{folder} holds a key of another erasure, {foreign[0].name}, which does not open this one: save to another "
                "folder, or move that key away"
            )
        for concept, prompt in self.keys.items():
            meta = self.info | {
                "kind": "key",
                "concept": concept,
                "opens": public_digest,
                "mechanism": prompt.mechanism,
                "log_weight": prompt.log_weight,
            }
            write_tensors(key_path(folder, concept), {"p_k": prompt.k, "p_v": prompt.v}, meta, private=True)
        public = self.delta | {BESIDE + name: tensor for name, tensor in self.adapters.items()}
        write_tensors(folder / "delta.safetensors", public, self.info | {"kind": "delta"})

    @classmethod
    def load(cls, folder: Path, unet=None) -> "Erasure":
        """Read a folder with whatever keys lie in it. Refuses keys of another training and, with `unet`, files made for another
        base model, by name.
        """
        folder = Path(folder)
        delta, info = read_tensors(folder / "delta.safetensors")
        if info.get("kind") != "delta":
            raise ValueError(
                f"{folder / 'delta.safetensors'} is not a delta but a {info.get('kind', 'different')} file"
            )
        adapters = {n.removeprefix(BESIDE): delta.pop(n) for n in list(delta) if n.startswith(BESIDE)}
        erasure = cls(delta, {}, info, adapters)
        if unet is not None:
            erasure._check_base(unet, f"delta {folder / 'delta.safetensors'}")
        for path in sorted((folder / "keys").glob("*.key.safetensors")):
            prompt, meta = load_key(path, unet)
            if meta.get("opens", erasure.digest()) != erasure.digest():  # earlier keys do not say
                raise ValueError(
                    f"{path} is the key of another training than {folder / 'delta.safetensors'}: move it away, or erase again"
                )
            erasure.keys[meta["concept"]] = prompt
        return erasure

    def wipe(self, concept: str, folder: Path | None = None) -> None:
        """Forget a concept's key, and delete its file under `folder`: the public model works on without it."""
        self.key(concept)
        del self.keys[concept]
        if folder is not None:
            key_path(folder, concept).unlink(missing_ok=True)

    def _check_base(self, unet, what: str) -> None:
        check_base(unet, self.info, what)


def key_path(folder: Path, concept: str) -> Path:
    """Where a concept's key lies; git ignores the ending."""
    name = re.sub(r"[^a-z0-9]+", "-", concept.lower()).strip("-")
    if name.replace("-", " ") != concept:  # other concepts give this name too
        name = f"{name}-{hashlib.sha256(concept.encode()).hexdigest()[:8]}".strip("-")
    return Path(folder) / "keys" / f"{name}.key.safetensors"


def load_key(path: Path, unet=None) -> tuple[Prompt, dict]:
    """One key and what its file says of it. With `unet` (the base model, no erasure applied), refuse another model's key."""
    tensors, meta = read_tensors(path)
    if meta.get("kind") != "key":
        raise ValueError(f"{path} is not a key but a {meta.get('kind', 'different')} file")
    # Keys written before there were mechanisms and weights say nothing of them.
    how = meta.get("mechanism", "shared"), meta.get("log_weight", 0.0)
    prompt = Prompt(tensors["p_k"], tensors["p_v"], meta["config"]["place"], *how)
    if unet is not None:
        check_width(unet, prompt)
        check_base(unet, meta, f"key {path}")
    return prompt, meta


def check_plain(unet) -> None:
    """Raise ValueError for a U-Net whose weights are not where its own names say: a change of them would do nothing, or harm."""
    names = [name for name, _ in unet.named_parameters()]
    reasons = {
        "is wrapped by torch.compile: work on its _orig_mod, or compile in place with unet.compile()": hasattr(
            unet, "_orig_mod"
        ),
        "has a LoRA loaded: fuse it for good or unload it first": any(".base_layer." in name for name in names),
        "has fused projections, which keep their own copy of the weights: call unfuse_qkv_projections() first": any(
            isinstance(p, FusedAttnProcessor2_0) for p in unet.attn_processors.values()
        ),
        "is offloaded module by module, so its weights are not here: load the pipeline without sequential CPU offload": any(
            p.is_meta for p in unet.parameters()
        ),
    }
    for reason, true in reasons.items():
        if true:
            raise ValueError(f"this U-Net {reason}")


def check_base(unet, info: dict, what: str) -> None:
    """Raise ValueError unless `unet` is the base model named in `info`, with its weights in place."""
    check_plain(unet)
    found = fingerprint(unet)
    if info["base"] != found:
        raise ValueError(
            f"the {what} was made for the base model {info['base'][:12]} ({info['world']}), but this model is {found[:12]}; "
            "load that base, or remove the erasure that is applied to it"
        )
