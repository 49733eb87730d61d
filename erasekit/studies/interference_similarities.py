"""How alike objects are, from which the study `interference` predicts: their texts, their pictures, the attention to them."""

SIMILARITIES = ("text", "picture", "attention")
SIMILARITY_SEED = 3000  # of the pictures, and of the latents attention is read at


def similarities(world, objects: list[str], pictures: int, trajectories: int, steps: int) -> dict[str, list]:
    """How alike each two objects are, (objects, objects) each.

    "text": cosine of the text encoder's output at the last token of the name, in its prompt. "picture": cosine of the judge's
    pooled features, mean over pictures that show the object. "attention": soft intersection over union, sum of minima by sum
    of maxima, of the attention to the name's tokens in every layer, head and pixel, at the same latents.
    """
    import torch
    from torch.nn.functional import normalize

    from ..baselines.uce import concept_vectors
    from ..evaluation.metrics import features

    def cosines(rows):
        unit = normalize(rows.double(), dim=1).cpu()
        return unit @ unit.T

    shown = []
    for concept in objects:
        images, _ = world.concept_images(concept, pictures, SIMILARITY_SEED)
        shown.append(features(world, images.add(1).mul(127.5).round().to(torch.uint8)).mean(0))
    maps = attention_to_names(world, objects, trajectories, steps)
    overlap = torch.stack([torch.minimum(maps, own).sum(1) / torch.maximum(maps, own).sum(1) for own in maps])
    matrices = cosines(concept_vectors(world, objects)[0]), cosines(torch.stack(shown)), overlap.double()
    return {name: [[round(x, 5) for x in row] for row in m.tolist()] for name, m in zip(SIMILARITIES, matrices)}


def attention_to_names(world, objects: list[str], trajectories: int, steps: int):
    """Attention (objects, layers x latents x heads x pixels) to the tokens of each object's name in its prompt, their mean.

    At the same latents for all: every step of trajectories of the empty prompt.
    """
    import torch

    from ..attention import augment
    from ..baselines.masks import concept_positions
    from ..conditioning import encode, predict_noise
    from ..trajectories import TRAJECTORIES, make_pool

    pipe, unet = world.pipe, world.pipe.unet
    pool = make_pool(world, [("", "")], SIMILARITY_SEED, trajectories, steps, TRAJECTORIES["guidance"])
    z = pool.latents[0].flatten(0, 1).to(pipe.device, unet.dtype)
    t, found = pool.timesteps.repeat(trajectories).to(pipe.device), []
    with torch.no_grad(), augment(unet) as state:
        for concept in objects:
            at = concept_positions(pipe, prompt := world.prompt(concept), concept)
            with state.record() as maps, world.autocast():
                predict_noise(unet, z, t, encode(pipe, [prompt]).expand(len(z)))
            found.append(torch.cat([m[..., at].float().mean(-1).flatten() for m in maps.values()]).cpu())
    return torch.stack(found)
