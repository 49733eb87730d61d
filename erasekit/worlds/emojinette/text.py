"""The text encoder, trained before the U-Net and then frozen: on language, and on pictures seen by an image tower of its own.

Three losses:
- pictures: captions and images find each other, as in CLIP;
- words: at a word's own position the output still says which word it is;
- language: a sentence about any common word lies near the captions of the objects whose words GloVe puts near it.
Words of `words.FORBIDDEN` are in none of them.
"""

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from ...checkpoints import seeded
from ...pipelines import files
from . import fit, networks, pictures, tokens, words
from .art import Art

BATCH = 80  # pictures and captions
SENTENCES = 40  # about common words
GROUPS = 3  # of texts of like length, encoded together: a third of the time is saved
FEATURES = 128
SHARPNESS, SCALE = 16.0, 10.0  # of GloVe's similarities as a target, and of the features' that are to follow them
LANGUAGE, WORDS = 0.5, 0.5  # weights of the two losses beside the pictures'
EXTRA = ("a photo of a {}", "the {}", "one {}", "this is a {}")  # only in sentences


class ImageTower(nn.Module):
    """A small convolutional network of 32 x 32 pixels; it teaches the text encoder and is not shipped. No judge shares it."""

    def __init__(self):
        super().__init__()
        channels = (3, 24, 48, 96, 160)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, 1 if n == 0 else 2, 1, bias=False), nn.GroupNorm(8, b), nn.SiLU())
                for n, (a, b) in enumerate(pairwise(channels))
            )
        )
        self.out = nn.Linear(160 * 16, FEATURES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Unit vectors (B, 128) of images (B, 3, 64, 64)."""
        return F.normalize(self.out(self.layers(F.avg_pool2d(images, 2)).flatten(1)), dim=-1)


class TextAndPictures(nn.Module):
    """The text encoder with what trains it."""

    def __init__(self, tokenizer, table: torch.Tensor):
        super().__init__()
        self.tokenizer = tokenizer
        self.encoder = networks.make_text_encoder(tokenizer)
        embedding = self.encoder.get_input_embeddings()
        embedding.weight.data.copy_(table)
        embedding.weight.requires_grad_(False)
        self.project = nn.Linear(networks.WIDTH, FEATURES, bias=False)
        self.readout = nn.Linear(networks.WIDTH, networks.WIDTH, bias=False)
        self.tower = ImageTower()
        self.scale = nn.Parameter(torch.tensor(2.7))

    def ids(self, texts: list[str]) -> torch.Tensor:
        """Token ids (B, 24), padded with the end token."""
        return self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def ends(self, ids: torch.Tensor) -> torch.Tensor:
        """Where each text ends (B,)."""
        return (ids == self.tokenizer.eos_token_id).int().argmax(1)

    def features(self, hidden: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Unit vectors (B, 128) read at the given positions of the outputs (B, T, 192)."""
        return F.normalize(self.project(hidden[torch.arange(len(where)), where]), dim=-1)

    def text_features(self, texts: list[str]) -> torch.Tensor:
        """Unit vectors (B, 128) read at the end tokens."""
        ids = self.ids(texts)
        return self.features(self.encoder(ids.to(self.scale.device)).last_hidden_state, self.ends(ids))


class Meanings:
    """GloVe's view of the vocabulary: which common words there are, and which objects each is near."""

    def __init__(self, tokenizer, objects: list[str]):
        rows, vectors = tokens.centred()
        self.whole = {w: t for w, t in tokens.whole_words(tokenizer).items() if w in rows and not words.forbidden(w)}
        caption_words = set(words.caption_words())
        self.common = [w for w in self.whole if w not in caption_words]
        of_words = vectors[[rows[w] for w in self.common]]
        near = torch.full((len(self.common), len(objects)), -1.0)
        for n, name in enumerate(objects):
            for text in (name, *words.OBJECTS[name].synonyms):
                parts = [vectors[rows[w]] for w in text.split() if w in rows]
                if parts:
                    near[:, n] = torch.maximum(near[:, n], of_words @ F.normalize(torch.stack(parts).mean(0), dim=0))
        self.near = near
        # Words that are near some object are asked for more often: others teach little about pictures.
        self.weights = (SCALE * near.max(1).values).exp()


def train_text(
    art: Art, steps: int, seed: int, minutes: float | None = None, device: str = "cpu"
) -> TextAndPictures | None:
    """Train on all the art; None where the time was up first."""
    torch.manual_seed(seed)
    tokenizer = tokens.make_tokenizer()
    table = tokens.token_table(tokenizer).to(device)
    model = TextAndPictures(tokenizer, table).train().to(device)
    meanings, covers = Meanings(tokenizer, art.objects), pictures.coverage()
    weights = torch.ones(len(art.object_id))
    vocabulary = torch.tensor(sorted(meanings.whole.values()))
    index = {name: n for n, name in enumerate(art.objects)}
    templates = (*words.TEMPLATES, *EXTRA)
    taught = torch.zeros(len(tokenizer), dtype=torch.bool)
    taught[vocabulary] = True
    of_captions = torch.tensor([meanings.whole[w] for w in words.caption_words() if w in meanings.whole])

    def encode(ids: torch.Tensor, generator: torch.Generator, full: bool):
        """Features at the ends (B, 128), and own tokens (M,) with their outputs (M, 192).

        Attention is causal, so what pads a text changes nothing before it: texts of like length are cut alike. With `full` the
        shortest keep their padding and half of them are read in it: it repeats the end token, and the U-Net reads it too.
        """
        ends = model.ends(ids)
        order = ends.argsort(stable=True)
        features, here, outputs = [], [], []
        for n, group in enumerate(order.chunk(GROUPS)):
            where, part = ends[group], ids[group]
            if full and n == 0:
                later = where + (torch.rand(len(group), generator=generator) * (part.shape[1] - where)).long()
                where = torch.where(torch.rand(len(group), generator=generator) < 0.5, later, where)
            else:
                part = part[:, : int(where.max()) + 1]
            with fit.autocast(device):
                hidden = model.encoder(part.to(device)).last_hidden_state.float()
            features.append(model.features(hidden, where))
            here.append(part.flatten())
            outputs.append(hidden.flatten(0, 1))
        return torch.cat(features)[order.argsort()], torch.cat(here), torch.cat(outputs)

    def word_loss(here: torch.Tensor, outputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Tell each position's own word from all words of the captions and a thousand others."""
        spots = taught[here].nonzero().flatten()
        spots = spots[torch.randperm(len(spots), generator=generator)[:256]]
        others = vocabulary[torch.randint(len(vocabulary), (1024,), generator=generator)]
        candidates, right = torch.cat([here[spots], of_captions, others]).unique(return_inverse=True)
        read = F.normalize(model.readout(outputs[spots]), dim=-1)
        return F.cross_entropy(14 * read @ table[candidates].T, right[: len(spots)].to(device))

    def loss(step: int) -> torch.Tensor:
        generator = seeded("text", seed, step)
        images, shown = pictures.draw(art, weights, BATCH, generator)
        said = [pictures.describe(p, generator) for p in shown]
        asked = torch.multinomial(meanings.weights, SENTENCES, generator=generator)
        forms = torch.randint(len(templates), (SENTENCES,), generator=generator).tolist()
        sentences = [words.article(templates[f].format(meanings.common[w])) for f, w in zip(forms, asked.tolist())]
        text, here, outputs = encode(model.ids([c.text for c in said] + sentences), generator, full=step % 4 == 0)
        captions, spoken = text[:BATCH], text[BATCH:]
        noise = 0.1 * torch.rand(BATCH, 1, 1, 1, generator=generator)
        images = images + noise * torch.randn(images.shape, generator=generator)
        with fit.autocast(device):
            image = model.tower(images.to(device)).float()
        scale = model.scale.exp().clamp(max=100)
        fits = torch.tensor([[c.fits(p, covers) for p in shown] for c in said], dtype=torch.float32).to(device)
        logits = scale * captions @ image.T
        total = (pictures.agreement(logits, fits) + pictures.agreement(logits.T, fits.T)) / 2
        single = [n for n, p in enumerate(shown) if len(p.objects) == 1]
        owners = torch.tensor([index[shown[n].objects[0]] for n in single])
        target = (SHARPNESS * meanings.near[asked][:, owners]).softmax(1).to(device)
        guess = (SCALE * spoken @ captions[single].T).log_softmax(1)
        total = total + LANGUAGE * (target * (target.clamp(min=1e-9).log() - guess)).sum(1).mean()
        return total + WORDS * word_loss(here, outputs, generator)

    done = fit.fit("text", model, loss, steps, lr=1e-3, weight_decay=0.05, ema=0.99, minutes=minutes)
    return model if done >= steps else None


def save(model: TextAndPictures, folder: Path) -> None:
    """Tokeniser and text encoder of a pipeline folder, in half precision; the rest stays in the checkpoint."""
    files.save_part(model.tokenizer, folder / "tokenizer")
    files.save_part(model.encoder.cpu().half(), folder / "text_encoder")
    networks.load_in_float32(folder / "text_encoder")
