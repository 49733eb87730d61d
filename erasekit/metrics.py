"""What judges say of images, and the field's rates made of it. Images are uint8 (N, 3, H, W) throughout."""

import torch


def judged(world, images: torch.Tensor, batch_size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Object probabilities (N, objects) and style probabilities (N, styles) by the world's judge."""
    objects, styles = [], []
    with torch.no_grad():
        for chunk in images.split(batch_size):
            o, s = world.judge(chunk.to(world.pipe.device).float() / 127.5 - 1)
            objects.append(o.softmax(1).cpu())
            styles.append(s.softmax(1).cpu())
    return torch.cat(objects), torch.cat(styles)


def in_top(probabilities: torch.Tensor, names: list[str], labels: list[str], k: int = 1) -> torch.Tensor:
    """Boolean (N,): whether each image's label is among the judge's first k."""
    top = probabilities.topk(k, dim=1).indices
    wanted = torch.tensor([names.index(label) for label in labels])
    return (top == wanted[:, None]).any(1)


def object_rate(world, images: torch.Tensor, labels: list[str], k: int = 1) -> torch.Tensor:
    """Boolean (N,): the object judge's top-k holds the label. Its mean is PSR-k of kept classes, 1 - ESR-k of erased ones."""
    return in_top(judged(world, images)[0], world.judge.objects, labels, k)


def style_rate(world, images: torch.Tensor, labels: list[str]) -> torch.Tensor:
    """Boolean (N,): the style judge's first choice is the label."""
    return in_top(judged(world, images)[1], world.judge.styles, labels)


def percent(hits: torch.Tensor) -> float:
    """Share of true values, in percent, to one decimal."""
    return round(100 * hits.float().mean().item(), 1)


def clip_alignment(world, images: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """100 x cosine (N,) between image and text embeddings of the world's open_clip model."""
    model, tokenizer = world.clip
    with torch.no_grad():
        image = model.encode_image(images.float() / 127.5 - 1, normalize=True)
        text = model.encode_text(tokenizer(texts), normalize=True)
    return 100 * (image * text).sum(1)
