"""What an erasure leaves: a public delta for everybody, and private keys for those who may bring concepts back."""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .attention import check_key, one_thread
from .base import bit_sum, check_base, networks_of, weights_of
from .checkpoints import all_or_none, read_tensors, write_tensors
from .checks import check_choice, check_finite, check_number, is_fused, unet_of
from .mechanisms import MECHANISMS, Prompt
from .sampling import sample
from .world import as_world

DELTA = "delta.safetensors"  # the public file
ADAPTER_PREFIX = "adapter:"  # of an adapter's tensors in the public file
LONGEST_NAME = 100  # of a key's file, before its ending
ADAPTERS: dict[str, type] = {}  # kind -> class; methods that train adapters register theirs


@dataclass
class Erasure:
    """One erasure of one base model.

    `delta`: name -> trained tensor of theta', or of a text encoder: "text_encoder.encoder...". `keys`: concept -> learnable
    prompt. `info`: method, config, hash of the base model ("base"), versions, seed and training history. Methods that leave the
    weights alone have `adapters` (of the kind info["adapter"]), or only info["guidance"], a rule for the sampler.
    """

    delta: dict[str, torch.Tensor]
    keys: dict[str, Prompt]
    info: dict
    adapters: dict[str, torch.Tensor] = field(default_factory=dict)

    def apply(self, model) -> "Applied":
        """Turn the base model (a U-Net, a pipeline or a world) into the public model; `.remove()` of the result undoes it.

        Raises ValueError if the model is not the base this erasure was trained on, or has an erasure applied. What a method
        does by guidance acts in `sample` alone: in a pipeline's own call, the U-Net raises RuntimeError.
        """
        unet = unet_of(model)
        parameters = self._weights(model)
        check_finite("this erasure", self.delta | self.adapters)
        misfits = [n for n, t in self.delta.items() if n not in parameters or parameters[n].shape != t.shape]
        if misfits:
            raise ValueError(f"this delta does not fit this model: {len(misfits)} tensors differ, first {misfits[0]}")
        adapter = None
        if self.adapters:
            adapter = self._adapter_class()({n: t.to(unet.device) for n, t in self.adapters.items()})
            adapter.attach(unet)  # raises AttributeError, before anything is changed, for a missing layer
        originals = {name: parameters[name].data for name in self.delta}
        rest = parameters.keys() - self.delta.keys() if self.delta else ()
        others = {name: (p.dtype, p.device, bit_sum(p)) for name, p in parameters.items() if name in rest}
        for name, tensor in self.delta.items():
            # A copy: further training of the public model does not change the delta.
            parameters[name].data = tensor.to(parameters[name], copy=True)
        public = Applied(networks_of(model, self.delta), originals, self.info, adapter, others, self._guard(unet))
        if adapter or public.guard:  # which the weights do not show
            unet.erasekit_public = public
        return public

    def _weights(self, model) -> dict[str, torch.nn.Parameter]:
        """The weights of the networks that the delta changes. Raises ValueError unless they are the base's."""
        check_base(model, self.info, "delta", self.delta)
        return weights_of(networks_of(model, self.delta))

    def _guard(self, unet):
        """The handle of a hook that refuses a pipeline's own calls of the U-Net, which know nothing of `Guidance`."""
        if not self.info.get("guidance"):
            return None
        method = self.info["method"]

        def refuse(module, arguments, keywords):
            # diffusers' pipelines pass the text by its name, `predict_noise` by its place.
            if "encoder_hidden_states" in keywords:
                raise RuntimeError(
                    f"{method!r} erases by guidance, which pipe(...) has not: ek.sample(..., erasure=...) has"
                )

        return unet.register_forward_pre_hook(refuse, with_kwargs=True)

    @contextmanager
    def applied(self, model) -> Iterator["Applied"]:
        """`apply` for the duration of a with block. Raises RuntimeError while another thread uses the U-Net."""
        with one_thread(unet_of(model)):
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
        scale = check_number("scale", scale, -math.inf)
        if not self.delta and not self.adapters:
            raise ValueError(f"{self.info['method']!r} works by guidance alone: there is no step to scale")
        theta = {n: p.detach().to("cpu", torch.float32) for n, p in self._weights(model).items() if n in self.delta}
        delta = {name: theta[name] + scale * (tensor - theta[name]) for name, tensor in self.delta.items()}
        linear = self._adapter_class().linear_in if self.adapters else ()
        adapters = {n: t * scale if n.endswith(linear) else t for n, t in self.adapters.items()}
        return Erasure(delta, dict(self.keys), self.info | {"scale": scale * self.info.get("scale", 1.0)}, adapters)

    def effect(self, model, prompt: str | None = None, seed: int = 0, num_inference_steps: int = 25) -> dict:
        """What this erasure changes on its base, a world or a pipeline.

        "moved": see `moved`. "images" (2, 3, H, W), uint8: of the base and of the public model, for `prompt`, by default the
        first erased concept's. "difference": their mean absolute difference, 0 to 255.
        """
        world = as_world(model)
        if prompt is None:
            prompt = next(map(world.prompt, self.info["concepts"]), "")  # another project's may name none
        how = {"num_inference_steps": num_inference_steps}
        images = torch.cat([sample(world, [prompt], [seed], erasure=erasure, **how) for erasure in (None, self)])
        difference = (images[0].float() - images[1].float()).abs().mean().item()
        return {"moved": self.moved(world), "prompt": prompt, "images": images, "difference": difference}

    def moved(self, model) -> float | None:
        """How far the weights are from the base's, as a share of their norm; an adapter's norm; None for guidance alone."""
        base = self._weights(model)
        linear = self._adapter_class().linear_in if self.adapters else ()
        steps = [tensor.float() - base[n].detach().float().cpu() for n, tensor in self.delta.items()]
        steps += [tensor.float() for n, tensor in self.adapters.items() if n.endswith(linear)]
        if not steps:
            return None
        whole = math.hypot(*(base[n].detach().float().norm().item() for n in self.delta)) if self.delta else 1.0
        return math.hypot(*(step.norm().item() for step in steps)) / whole

    def _adapter_class(self) -> type:
        check_choice("adapter", kind := self.info["adapter"], ADAPTERS)
        return ADAPTERS[kind]

    def digest(self) -> str:
        """Hash of the public model's difference from the base: weights, adapters and guidance."""
        digest = hashlib.sha256(json.dumps(self.info.get("guidance", {}), sort_keys=True).encode())
        for name, tensor in sorted((self.delta | self.adapters).items()):
            digest.update(name.encode() + tensor.detach().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def key(self, concept: str) -> Prompt:
        """The key of a concept. Raises KeyError naming the concepts that have one."""
        if concept not in tuple(self.keys):
            raise KeyError(f"there is no key for {concept!r}: there are keys for {', '.join(self.keys) or 'nothing'}")
        return self.keys[concept]

    def save(self, folder: Path, replace: bool = False) -> None:
        """Write `delta.safetensors` (public) and `keys/<concept>.key.safetensors` (readable by the owner; never publish them).

        All files change together, or none does. Raises ValueError, before anything is written, for tensors that are not finite
        and for a folder with another erasure's delta or key; with `replace`, its delta and keys of the same concepts give way.
        """
        folder, public_digest = Path(folder), self.digest()
        public = self.delta | {ADAPTER_PREFIX + name: tensor for name, tensor in self.adapters.items()}
        check_finite("this erasure", public)
        if self.info.get("moved") == 0:
            warnings.warn("this erasure changes nothing: no weight moved (lr too small?)", stacklevel=2)
        with all_or_none(folder) as together:
            paths = {concept: key_path(folder, concept) for concept in self.keys}
            for path, (prompt, meta) in stored_keys(folder).items():
                own = self.keys.get(meta["concept"])
                same = own is not None and (meta.get("opens"), prompt.digest()) == (public_digest, own.digest())
                if own is None or not (same or replace):
                    raise ValueError(
                        f"{folder} has a key of another erasure, {path.name}: save to another folder, or move that key away"
                    )
                paths[meta["concept"]] = path
            if not replace and (path := folder / DELTA).exists() and self._read(path).digest() != public_digest:
                raise ValueError(f"{path} is of another erasure: save to another folder, or move it away")
            for concept, prompt in self.keys.items():
                about = {"kind": "key", "concept": concept, "opens": public_digest, "layers": prompt.layers}
                about |= {"mechanism": prompt.mechanism, "log_weight": prompt.log_weight}
                tensors = {"p_k": prompt.k, "p_v": prompt.v}
                check_finite(f"the key of {concept!r}", tensors)
                write_tensors(paths[concept], tensors, self.info | about, private=True, together=together)
            write_tensors(folder / DELTA, public, self.info | {"kind": "delta"}, together=together)

    @classmethod
    def load(cls, folder: Path, model=None) -> "Erasure":
        """Read a folder with the keys it holds. Refuses keys of another training and, with `model`, files of another base."""
        erasure = cls._read(path := Path(folder) / DELTA)
        if model is not None:
            check_base(model, erasure.info, f"delta {path}", erasure.delta)
        for key_file, (prompt, meta) in stored_keys(folder, model).items():
            if meta.get("opens", erasure.digest()) != erasure.digest():  # early keys do not name their delta
                raise ValueError(f"{key_file} is the key of another training than {path}: move it away, or erase again")
            erasure.keys[meta["concept"]] = prompt
        return erasure

    @classmethod
    def _read(cls, path: Path) -> "Erasure":
        """A public file, without keys."""
        delta, info = read_tensors(path)
        if info.get("kind") != "delta":
            raise ValueError(f"{path} is not a delta but a {info.get('kind', 'different')} file")
        check_finite(str(path), delta)
        adapters = {n.removeprefix(ADAPTER_PREFIX): delta.pop(n) for n in list(delta) if n.startswith(ADAPTER_PREFIX)}
        return cls(delta, {}, info, adapters)

    def wipe(self, concept: str, folder: Path | None = None) -> None:
        """Forget a concept's key, and delete its file under `folder`; the public model works without it."""
        self.key(concept)
        del self.keys[concept]
        if folder is not None:
            key_path(folder, concept).unlink(missing_ok=True)
            for path in key_files(folder):  # renamed by hand
                with suppress(ValueError):
                    if load_key(path)[1]["concept"] == concept:
                        path.unlink()


@dataclass
class Applied:
    """An erasure in force on `networks_of` a model: the base's tensors, its info, adapter, other weights' state, and a hook."""

    networks: dict[str, torch.nn.Module]
    originals: dict[str, torch.Tensor]
    info: dict
    adapter: object = None
    others: dict[str, tuple] = field(default_factory=dict)
    guard: object = None

    def remove(self) -> None:
        """Restore the base, bit for bit, in the precision and on the device the model has now.

        Raises RuntimeError the second time; and, with the public model left whole, where the base would come back in part.
        """
        if not self.networks:
            raise RuntimeError("this erasure is not applied any more, so there is nothing to remove")
        parameters = weights_of(self.networks)
        if self.originals and (reason := self._obstacle(parameters)):
            raise RuntimeError(f"the base cannot be restored: {reason}, then call remove() of what apply() returned")
        for name, tensor in self.originals.items():
            p = parameters[name]
            p.data = tensor if (tensor.dtype, tensor.device) == (p.dtype, p.device) else tensor.to(p)
        if self.adapter:
            self.adapter.detach()
        if self.guard:
            self.guard.remove()
        vars(self.networks[""]).pop("erasekit_public", None)
        self.networks = {}

    def _obstacle(self, parameters: dict) -> str | None:
        """What happened to the model meanwhile that would leave it half restored, and what to do."""
        if any(getattr(module, "merged", False) for network in self.networks.values() for module in network.modules()):
            return "a LoRA was fused into it meanwhile; call pipe.unfuse_lora()"
        if is_fused(self.networks[""]):
            return "its projections were fused meanwhile; call unfuse_qkv_projections()"
        if lost := [n for n in self.originals if n not in parameters or parameters[n].is_meta]:
            return f"{lost[0]} was renamed or offloaded meanwhile; undo that"
        for name, (dtype, device, bits) in self.others.items():
            p = parameters.get(name)
            if p is not None and (p.dtype, p.device) == (dtype, device) and bit_sum(p) != bits:
                return f"{name} was changed meanwhile, as by a LoRA fused for good; undo that or load the model anew"
        return None


def key_path(folder: Path, concept: str) -> Path:
    """Path of a concept's key; git ignores the ending."""
    name = re.sub(r"[^a-z0-9]+", "-", concept.lower()).strip("-")
    if name.replace("-", " ") != concept or len(name) > LONGEST_NAME:  # other concepts give this name too
        name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(concept.encode()).hexdigest()[:8]}".strip("-")
    return Path(folder) / "keys" / f"{name}.key.safetensors"


def key_files(folder: Path) -> list[Path]:
    """All keys in an erasure's folder, whatever they are named."""
    return sorted((Path(folder) / "keys").glob("*.safetensors"))


def stored_keys(folder: Path, model=None) -> dict[Path, tuple[Prompt, dict]]:
    """File -> what `load_key` reads from it."""
    return {path: load_key(path, model) for path in key_files(folder)}


def load_key(path: Path, model=None) -> tuple[Prompt, dict]:
    """One key and its file's metadata. With `model` (the base, no erasure applied), another model's key is refused."""
    tensors, meta = read_tensors(path)
    if meta.get("kind") != "key":
        raise ValueError(f"{path} is not a key but a {meta.get('kind', 'different')} file")
    # Early keys name neither mechanism nor weight, and their layers stand in the config.
    layers = meta["layers"] if "layers" in meta else meta["config"]["place"]
    check_finite(str(path), tensors)
    check_choice("mechanism", mechanism := meta.get("mechanism", "shared"), MECHANISMS)
    prompt = MECHANISMS[mechanism](tensors["p_k"], tensors["p_v"], layers, meta.get("log_weight", 0.0))
    if model is not None:
        check_key(unet_of(model), prompt)
        check_base(model, meta, f"key {path}")
    return prompt, meta
