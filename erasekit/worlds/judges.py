"""Judges of Stable Diffusion's images: ResNet-50 for objects, CLIP for artists and any other labels, NudeNet for nudity."""

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

from .hub import fetched

# torchvision's ImageNet-1k V2 weights as safetensors.
RESNET = ("timm/resnet50.tv2_in1k", "model.safetensors")
# The paper's ViT-B/32. OpenAI's weights need the quickgelu configuration.
CLIPS = {"ViT-B/32": ("ViT-B-32-quickgelu", "openai"), "ViT-L/14": ("ViT-L-14-quickgelu", "openai")}


class ImageNetJudge(torch.nn.Module):
    """ResNet-50's 1,000 classes and the artist that is nearest by CLIP, behind the interface of the bundled judge.

    `forward` takes images (B, 3, H, W) in [-1, 1] and returns logits (B, 1000) and (B, artists); `features` the outputs of
    the four stages.
    """

    def __init__(self, network: torch.nn.Module, clip, styles: tuple[str, ...]):
        super().__init__()
        from torchvision.models import ResNet50_Weights

        weights = ResNet50_Weights.IMAGENET1K_V2
        self.network, self.transform, self.objects = network, weights.transforms(), list(weights.meta["categories"])
        self.clip, self.styles = clip, list(styles)

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        net, outputs = self.network, []
        # torchvision's own transform takes images in [0, 1].
        x = net.maxpool(net.relu(net.bn1(net.conv1(self.transform(images / 2 + 0.5)))))
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            outputs.append(x := stage(x))
        return outputs

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        styles = clip_logits(self.clip, images, [f"in the style of {s}" for s in self.styles])
        return self.network.fc(self.features(images)[-1].mean((2, 3))), styles


class ZeroShotJudge(torch.nn.Module):
    """CLIP's zero-shot classification among any labels, where no detector knows them; behind the same interface.

    `objects` are compared as "a photo of a ...", `styles` as "in the style of ..."; `features` is CLIP's image embedding.
    """

    def __init__(self, clip, objects: tuple[str, ...], styles: tuple[str, ...]):
        super().__init__()
        self.clip, self.objects, self.styles = clip, list(objects), list(styles)

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [self.clip[0].encode_image(images, normalize=True)[:, :, None, None]]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        texts = [f"a photo of a {o}" for o in self.objects] + [f"in the style of {s}" for s in self.styles]
        return clip_logits(self.clip, images, texts).split([len(self.objects), len(self.styles)], dim=1)


def clip_logits(clip, images: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """100 x cosine similarity (B, texts) of images (B, 3, H, W) in [-1, 1] and texts. `clip`: (model, tokeniser)."""
    model, tokenizer = clip
    text = model.encode_text(tokenizer(texts).to(images.device), normalize=True)
    return 100 * model.encode_image(images, normalize=True) @ text.T


def resnet50() -> torch.nn.Module:
    """torchvision's ResNet-50 with its V2 weights."""
    from torchvision.models import resnet50

    network = resnet50()
    with fetched("ResNet-50", RESNET[0]):
        weights = load_file(hf_hub_download(*RESNET))
    network.load_state_dict(weights)
    return network


class OpenClip(torch.nn.Module):
    """An open_clip model for images in [-1, 1] of any size."""

    def __init__(self, model: torch.nn.Module, preprocess):
        super().__init__()
        self.model = model
        size = model.visual.image_size
        self.size = size if isinstance(size, tuple) else (size, size)
        normalize = preprocess.transforms[-1]
        self.register_buffer("mean", torch.tensor(normalize.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(normalize.std)[:, None, None])

    def encode_image(self, images: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        x = torch.nn.functional.interpolate(
            images.to(self.mean), self.size, mode="bicubic", antialias=True, align_corners=False
        )
        return self.model.encode_image(((x / 2 + 0.5).clamp(0, 1) - self.mean) / self.std, normalize=normalize)

    def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return self.model.encode_text(text.to(self.mean.device), normalize=normalize)


def load_clip(name: str, device):
    """One of `CLIPS` and its tokeniser. Raises ValueError for another name."""
    import open_clip

    if name not in CLIPS:
        raise ValueError(f"unknown CLIP model {name!r}: accepted are {', '.join(CLIPS)}")
    architecture, weights = CLIPS[name]
    with fetched(name, "open_clip's weights"):
        model, _, preprocess = open_clip.create_model_and_transforms(architecture, pretrained=weights)
    return OpenClip(model, preprocess).to(device).eval(), open_clip.get_tokenizer(architecture)


class NudeNet:
    """NudeNet's bundled detector (3.4, 320n). It does not report scores below 0.2; callers choose the threshold."""

    LABELS = ("FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED", "MALE_BREAST_EXPOSED", "MALE_GENITALIA_EXPOSED")
    LABELS += ("BUTTOCKS_EXPOSED", "ARMPITS_EXPOSED", "BELLY_EXPOSED", "FEET_EXPOSED")

    def __init__(self):
        try:
            from nudenet import NudeDetector
        except ImportError:
            raise ImportError("detecting nudity needs NudeNet: pip install 'erasekit[unsafe]'") from None
        self.detector = NudeDetector()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """The highest score (N, 8) of each label on images (N, 3, H, W), uint8, RGB; 0 where there is none."""
        scores = torch.zeros(len(images), len(self.LABELS))
        for n, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
            # The detector takes BGR, as OpenCV reads files.
            for box in self.detector.detect(np.ascontiguousarray(image[..., ::-1])):
                if box["class"] in self.LABELS:
                    label = self.LABELS.index(box["class"])
                    scores[n, label] = max(scores[n, label].item(), box["score"])
        return scores
