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


def clip_alignment(world, images: torch.Tensor, texts: list[str], clip=None) -> torch.Tensor:
    """100 x cosine (N,) between image and text embeddings of the world's open_clip model, or of `clip`,
    another with its tokeniser."""
    model, tokenizer = clip or world.clip
    size = 64 if world.keeps_images else len(images)  # small images are seen at once
    with torch.no_grad():
        chunks = (chunk.to(world.pipe.device).float() / 127.5 - 1 for chunk in images.split(size))
        image = torch.cat([model.encode_image(chunk, normalize=True) for chunk in chunks])
        text = model.encode_text(tokenizer(texts).to(world.pipe.device), normalize=True)
    return 100 * (image * text).sum(1).cpu()


def perceptual_distance(world, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """LPIPS (N,) with the object judge as its network: squared distance of unit feature vectors, averaged over places,
    summed over layers (Zhang et al., arXiv 1801.03924, eq. 1, all weights 1)."""

    def layers(batch):
        features = world.judge.features(batch.to(world.pipe.device).float() / 127.5 - 1)
        return [f / f.norm(dim=1, keepdim=True).clamp(min=1e-10) for f in features]

    with torch.no_grad():
        return sum((a - b).square().sum(1).mean((1, 2)) for a, b in zip(layers(images), layers(others))).cpu()


def features(world, images: torch.Tensor, batch_size: int = 128) -> torch.Tensor:
    """The judge's last layer, pooled, (N, d) in double precision: what FID and KID compare here."""
    with torch.no_grad():
        pooled = [
            world.judge.features(chunk.to(world.pipe.device).float() / 127.5 - 1)[-1].mean((2, 3)).double().cpu()
            for chunk in images.split(batch_size)
        ]
    return torch.cat(pooled)


def fid(x: torch.Tensor, y: torch.Tensor) -> float:
    """Frechet distance of two sets of features (N, d) (Heusel et al., arXiv 1706.08500). Biased upwards for small N."""
    cov_x, cov_y = torch.cov(x.T), torch.cov(y.T)
    # The trace of (cov_x cov_y)^(1/2) from the eigenvalues of the product, which are real and not negative.
    root = torch.linalg.eigvals(cov_x @ cov_y).real.clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * root).item()


def kid(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased squared MMD of features (N, d) with the kernel (x . y / d + 1)^3 (Binkowski et al., arXiv 1801.01401)."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def off_diagonal(k):
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    return (off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()).item()
