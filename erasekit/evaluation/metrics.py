"""Judges' outputs on images, and rates, scores and distances computed from them. Images are uint8 (N, 3, H, W) throughout."""

import torch
from torch import Tensor


def judge_images(world, images: Tensor, batch_size: int = 128) -> tuple[Tensor, Tensor]:
    """Object probabilities (N, objects) and style probabilities (N, styles) by the world's judge."""
    with torch.no_grad():
        parts = [world.judge(_scaled(world, chunk)) for chunk in images.split(batch_size)]
    objects, styles = zip(*parts)
    return tuple(torch.cat([logits.softmax(1).cpu() for logits in part]) for part in (objects, styles))


def in_top_k(probabilities: Tensor, names: list[str], labels: list[str], k: int = 1) -> Tensor:
    """Boolean (N,): each image's label is among the k most probable names."""
    wanted = torch.tensor([names.index(label) for label in labels])
    return (probabilities.topk(k, dim=1).indices == wanted[:, None]).any(1)


def object_correct(world, images: Tensor, labels: list[str], k: int = 1) -> Tensor:
    """Boolean (N,): the label is in the object judge's top k. Its mean is PSR-k of kept classes and 1 - ESR-k of erased ones."""
    return in_top_k(judge_images(world, images)[0], world.judge.objects, labels, k)


def style_correct(world, images: Tensor, labels: list[str]) -> Tensor:
    """Boolean (N,): the label is the style judge's first choice."""
    return in_top_k(judge_images(world, images)[1], world.judge.styles, labels)


def percent(values: Tensor) -> float:
    """Share of true values in percent, to one decimal."""
    return round(100 * values.float().mean().item(), 1)


def clip_alignment(world, images: Tensor, texts: list[str], clip=None) -> Tensor:
    """100 x cosine similarity (N,) of image and text embeddings, by the world's open_clip model or another `clip`.

    `clip`: (model, tokeniser).
    """
    model, tokenizer = clip or world.clip
    size = 64 if world.keeps_images else len(images)  # small images go in one batch
    with torch.no_grad():
        image = torch.cat([model.encode_image(_scaled(world, part), normalize=True) for part in images.split(size)])
        text = model.encode_text(tokenizer(texts).to(world.pipe.device), normalize=True)
    return 100 * (image * text).sum(1).cpu()


def perceptual_distance(world, images: Tensor, others: Tensor) -> Tensor:
    """LPIPS (N,) with the object judge as its network and all weights 1 (Zhang et al., arXiv 1801.03924, eq. 1).

    Squared distance of unit feature vectors, averaged over positions and summed over layers.
    """

    def unit_features(batch):
        return [f / f.norm(dim=1, keepdim=True).clamp(min=1e-10) for f in world.judge.features(_scaled(world, batch))]

    with torch.no_grad():
        pairs = zip(unit_features(images), unit_features(others))
        return sum((a - b).square().sum(1).mean((1, 2)) for a, b in pairs).cpu()


def features(world, images: Tensor, batch_size: int = 128) -> Tensor:
    """The judge's last layer, pooled, (N, d) in double precision: the features of FID and KID here."""
    with torch.no_grad():
        parts = [world.judge.features(_scaled(world, chunk))[-1].mean((2, 3)) for chunk in images.split(batch_size)]
    return torch.cat([part.double().cpu() for part in parts])


def fid(x: Tensor, y: Tensor) -> float:
    """Frechet distance of two sets of features (N, d) (Heusel et al., arXiv 1706.08500). Biased upwards for small N."""
    cov_x, cov_y = torch.cov(x.T), torch.cov(y.T)
    # The trace of (cov_x cov_y)^(1/2) from the product's eigenvalues: with fewer images than features the
    # product is singular, where scipy.linalg.sqrtm loses digits.
    root = torch.linalg.eigvals(cov_x @ cov_y).real.clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * root).item()


def kid(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of features (N, d) with the kernel (x . y / d + 1)^3 (Binkowski et al., arXiv 1801.01401)."""
    from sklearn.metrics.pairwise import polynomial_kernel

    def off_diagonal_mean(k):
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    within = off_diagonal_mean(polynomial_kernel(x)) + off_diagonal_mean(polynomial_kernel(y))
    return float(within - 2 * polynomial_kernel(x, y).mean())


def roc_auc(scores, labels) -> float:
    """Area under the ROC curve to four decimals: the chance that a positive scores above a negative. NaN without both kinds."""
    from sklearn.metrics import roc_auc_score

    labels = [bool(label) for label in labels]
    return round(float(roc_auc_score(labels, scores)), 4) if len(set(labels)) == 2 else float("nan")


def _scaled(world, images: Tensor) -> Tensor:
    """uint8 to [-1, 1], on the world's device."""
    return images.to(world.pipe.device).float() / 127.5 - 1
