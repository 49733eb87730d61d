"""The judges of Stable Diffusion's images agree with the libraries' own preprocessing."""

import pytest
import torch

from erasekit.worlds import judges


def test_the_safetensors_of_resnet_have_torchvisions_names():
    """timm publishes torchvision's V2 weights under its own model's names."""
    import timm
    from torchvision.models import resnet50

    ours, theirs = resnet50().state_dict(), timm.create_model("resnet50").state_dict()
    assert {n: t.shape for n, t in ours.items() if "num_batches" not in n}.items() <= {
        n: t.shape for n, t in theirs.items()
    }.items()


class ClipStub:
    """Two numbers for an image, two for a text: the judge only multiplies them."""

    def encode_image(self, images, normalize):
        return images.mean((2, 3))[:, :2]

    def encode_text(self, text, normalize):
        return torch.eye(2)[text]


def test_the_imagenet_judge_agrees_with_torchvisions_own_path():
    from torchvision.models import ResNet50_Weights, resnet50

    torch.manual_seed(0)
    network, clip = resnet50().eval(), (ClipStub(), lambda texts: torch.arange(len(texts)))
    judge = judges.ImageNetJudge(network, clip, ("a", "b")).eval()
    images = torch.randint(0, 256, (2, 3, 300, 260), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        objects, styles = judge(images.float() / 127.5 - 1)
        expected = network(ResNet50_Weights.IMAGENET1K_V2.transforms()(images))
    assert torch.allclose(objects, expected, atol=0.02) and styles.shape == (2, 2)


@pytest.mark.slow
def test_open_clip_models_take_any_size_and_openclips_own_normalisation():
    import open_clip
    from torchvision.transforms.functional import to_pil_image

    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32-quickgelu", pretrained=None)
    ours = judges.OpenClip(model.eval(), preprocess)
    images = torch.randint(0, 256, (1, 3, 512, 512), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.avg_pool2d(images.float(), 9, 1, 4).to(torch.uint8)
    with torch.no_grad():
        mine = ours.encode_image(images.float() / 127.5 - 1, normalize=True)
        theirs = model.encode_image(preprocess(to_pil_image(images[0]))[None], normalize=True)
    assert (mine @ theirs.T).item() > 0.999


def test_nudenet_detects_nothing_in_emoji_and_gets_bgr(world):
    nudenet = pytest.importorskip("nudenet")
    images = world.reference_images({"church", "dog"})[:4]
    detector = judges.NudeNet()
    assert detector(images).shape == (4, 8) and (detector(images) < 0.5).all()
    seen = []
    detector.detector = type("Recorder", (), {"detect": lambda self, image: seen.append(image) or []})()
    detector(images[:1])
    assert (seen[0] == images[0].permute(1, 2, 0).numpy()[..., ::-1]).all()
    assert set(detector.LABELS) <= set(nudenet.nudenet.__dict__["__labels"])
