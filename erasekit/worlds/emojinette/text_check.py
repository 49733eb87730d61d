"""What the text encoder knows by itself, before any U-Net: `python -m erasekit.worlds.emojinette.text_check`."""

import json

import torch
import torch.nn.functional as F

from ...checkpoints import read_tensors, seeded
from . import fit, tokens, words
from .art import Art, load_art
from .text import TextAndPictures

ASK = "a picture of a {}"


def load() -> TextAndPictures:
    """The trained encoder with its projection and image tower: the averaged weights of the checkpoint."""
    tokenizer = tokens.make_tokenizer()
    model = TextAndPictures(tokenizer, tokens.token_table(tokenizer))
    tensors, meta = read_tensors(fit.folder() / "text.safetensors")
    state = {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
    state |= {k[4:]: v for k, v in tensors.items() if k.startswith("ema.")}
    model.load_state_dict(state)
    print(f"text encoder at step {meta['step']} of {meta['steps']}, {meta['seconds']:.0f} s")
    return model.eval()


@torch.no_grad()
def zero_shot(model: TextAndPictures, art: Art) -> dict[str, float]:
    """Pictures at new placements on white, one an icon: nearest name of all objects, nearest style given the object, in %."""
    rows = torch.arange(len(art.object_id))
    images, _ = art.draw(rows, seeded("text check"), mirror=0.0, white=1.0)
    image = torch.cat([model.tower(part) for part in images.split(128)])
    names = model.text_features([words.caption(ASK, n) for n in art.objects])
    right = (image @ names.T).argmax(1) == art.object_id
    styled = torch.stack([model.text_features([words.caption(ASK, n, s) for n in art.objects]) for s in art.styles], 1)
    style = torch.einsum("nf,nsf->ns", image, styled[art.object_id]).argmax(1) == art.style_id
    return {"object, %": 100 * right.float().mean().item(), "style, %": 100 * style.float().mean().item()}


@torch.no_grad()
def picture_centres(model: TextAndPictures, art: Art) -> torch.Tensor:
    """Unit vectors (objects, 128): the mean over an object's five pictures."""
    rows = torch.arange(len(art.object_id))
    images, _ = art.draw(rows, seeded("text check"), mirror=0.0, white=1.0)
    image = torch.cat([model.tower(part) for part in images.split(128)])
    return F.normalize(torch.zeros(len(art.objects), image.shape[1]).index_add_(0, art.object_id, image), dim=1)


@torch.no_grad()
def ranks(model: TextAndPictures, art: Art, pairs: list[tuple[str, str]], centres: torch.Tensor) -> torch.Tensor:
    """Rank of the right object's pictures among all objects, for (word, object) pairs."""
    text = model.text_features([words.caption(ASK, word) for word, _ in pairs])
    near = text @ centres.T
    own = near[torch.arange(len(pairs)), [art.objects.index(noun) for _, noun in pairs]]
    return (near > own[:, None]).sum(1) + 1


@torch.no_grad()
def own_token(model: TextAndPictures, art: Art) -> dict:
    """As world_check.own_token: distance from an object's own output to the nearest other's, as a share of the norm."""
    tokenizer = model.tokenizer
    names = [n for n in art.objects if len(tokenizer(n).input_ids) == 3]
    ids = model.ids([words.caption(ASK, n) for n in names])
    hidden = model.encoder(ids).last_hidden_state
    own = torch.stack([hidden[n, model.ends(ids)[n] - 1] for n in range(len(names))])
    gap = torch.cdist(own, own).fill_diagonal_(torch.inf)
    near = gap.min(1).values / own.norm(dim=1).mean()
    neighbours = {
        n: [names[i] for i in gap[names.index(n)].topk(3, largest=False).indices]
        for n in ("dog", "church", "fish", "guitar", "castle")
    }
    return {
        "one-token objects": len(names),
        "median": near.median().item(),
        "smallest": near.min().item(),
        "closer than 0.3": int((near < 0.3).sum()),
        "neighbours": neighbours,
    }


def check() -> dict:
    """All figures."""
    torch.set_num_threads(1)
    model, art = load(), load_art()
    centres = picture_centres(model, art)
    unseen = [(w, n) for n, group in words.UNSEEN.items() for w in group]
    more = [(w, e.name) for e in words.OBJECTS.values() for w in e.held_out if w not in {u for u, _ in unseen}]
    found = {"zero-shot": zero_shot(model, art), "own token": own_token(model, art)}
    for label, pairs in (
        ("the check's unseen words", unseen),
        ("held-out words of ours", more),
        ("synonyms seen", [(w, e.name) for e in words.OBJECTS.values() for w in e.synonyms]),
    ):
        rank = ranks(model, art, pairs, centres)
        found[label] = {
            "pairs": len(pairs),
            "top-1, %": 100 * (rank == 1).float().mean().item(),
            "top-5, %": 100 * (rank <= 5).float().mean().item(),
        }
        if label.startswith("the"):
            found[label]["ranks"] = {w: int(r) for (w, _), r in zip(pairs, rank)}
    return found


if __name__ == "__main__":
    print(json.dumps(check(), indent=1))
