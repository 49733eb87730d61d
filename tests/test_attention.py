"""The prompted attention against plain softmax and against diffusers; and that it leaves no trace."""

import math

import pytest
import torch

from erasekit.attention import PLACES, Prompt, PromptAttnProcessor, augment, initial_prompt

WIDTH = 32  # of the toy's text embeddings
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
MID = "mid_block.attentions.0.transformer_blocks.0.attn2"
UP = [f"up_blocks.1.attentions.{n}.transformer_blocks.0.attn2" for n in (0, 1)]


@pytest.fixture
def inputs():
    """Latents (2, 4, 8, 8), time steps (2,) and text embeddings (2, 5, WIDTH)."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return latents, torch.tensor([100, 700]), torch.randn(2, 5, WIDTH, generator=generator)


@pytest.fixture
def alike(prompt):
    """A prompt with p_k = p_v: the same as more text."""
    return Prompt(prompt.k, prompt.k)


def with_tokens(inputs, prompt):
    """The inputs with the prompt's tokens as text."""
    latents, t, text = inputs
    return latents, t, torch.cat([text, prompt.k.expand(2, -1, -1)], dim=1)


@torch.no_grad()
def predict(unet, inputs, **kwargs):
    return unet(*inputs, **kwargs).sample


def prompted(unet, inputs, prompt, place="all", **kwargs):
    with augment(unet, place, prompt):
        return predict(unet, inputs, **kwargs)


# ----------------------------------------------------------------------------------------------------- no prompt, no trace


@pytest.mark.parametrize("place", PLACES)
def test_an_empty_slot_is_the_base_bit_for_bit(unet, inputs, place):
    base = predict(unet, inputs)
    assert torch.equal(prompted(unet, inputs, None, place), base)


def test_the_base_comes_back_bit_for_bit(unet, inputs, prompt):
    base, processors = predict(unet, inputs), unet.attn_processors
    assert not torch.equal(prompted(unet, inputs, prompt), base)
    assert unet.attn_processors == processors
    assert torch.equal(predict(unet, inputs), base)


def test_processors_come_back_after_an_exception(unet, prompt):
    processors = unet.attn_processors
    with pytest.raises(KeyboardInterrupt), augment(unet, "all", prompt):
        raise KeyboardInterrupt
    assert unet.attn_processors == processors


def test_holding_nothing_is_the_base_also_inside(unet, inputs, prompt):
    base = predict(unet, inputs)
    with augment(unet, "all", prompt) as slot, slot.holding(None):
        assert torch.equal(predict(unet, inputs), base)


def test_holding_gives_the_previous_prompt_back_after_an_exception(unet, prompt):
    with augment(unet, "all", prompt) as slot:
        with pytest.raises(KeyboardInterrupt), slot.holding(None):
            raise KeyboardInterrupt
        assert slot.prompt is prompt


def test_augmented_twice_the_inner_prompt_counts(unet, inputs, prompt, alike):
    expected = prompted(unet, inputs, alike)
    with augment(unet, "all", prompt):
        assert torch.equal(prompted(unet, inputs, alike), expected)


# -------------------------------------------------------------------------------------------------------------- what it is


def plain_attention(attn, x, text, prompt):
    """W_O softmax(Q K^T / sqrt(d)) V, head by head."""
    q = x @ attn.to_q.weight.T
    k = torch.cat([text, prompt.k.expand(len(x), -1, -1)], dim=1) @ attn.to_k.weight.T
    v = torch.cat([text, prompt.v.expand(len(x), -1, -1)], dim=1) @ attn.to_v.weight.T
    size = q.shape[-1] // attn.heads
    heads = []
    for part in (slice(h * size, (h + 1) * size) for h in range(attn.heads)):
        weights = (q[..., part] @ k[..., part].mT / math.sqrt(size)).softmax(dim=-1)
        heads.append(weights @ v[..., part])
    return torch.cat(heads, dim=-1) @ attn.to_out[0].weight.T + attn.to_out[0].bias


def test_every_prompted_layer_agrees_with_plain_softmax(unet, inputs, prompt):
    checked = []

    def compare(attn, arguments, keywords, output):
        expected = plain_attention(attn, arguments[0], keywords["encoder_hidden_states"], prompt)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
        checked.append(attn)

    for name in (DOWN, MID, *UP):
        unet.get_submodule(name).register_forward_hook(compare, with_kwargs=True)
    prompted(unet, inputs, prompt)
    assert len(checked) == 4


def test_with_equal_halves_agrees_with_diffusers_on_longer_text(unet, inputs, alike):
    assert {type(p).__name__ for p in unet.attn_processors.values()} == {"AttnProcessor2_0"}
    expected = predict(unet, with_tokens(inputs, alike))
    torch.testing.assert_close(prompted(unet, inputs, alike), expected, atol=1e-5, rtol=1e-4)


def test_a_masked_text_agrees_with_diffusers_on_longer_text(unet, inputs, alike):
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    longer = torch.cat([mask, torch.ones(2, 3).bool()], dim=1)
    expected = predict(unet, with_tokens(inputs, alike), encoder_attention_mask=longer)
    got = prompted(unet, inputs, alike, encoder_attention_mask=mask)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(got, prompted(unet, inputs, alike), atol=1e-4)


def test_the_order_of_the_tokens_does_not_matter(unet, inputs, prompt):
    turned = Prompt(prompt.k.flip(0), prompt.v.flip(0))
    torch.testing.assert_close(prompted(unet, inputs, turned), prompted(unet, inputs, prompt), atol=1e-5, rtol=1e-4)


def test_both_halves_matter(unet, inputs, prompt):
    exchanged = Prompt(prompt.v, prompt.k)
    assert not torch.allclose(prompted(unet, inputs, exchanged), prompted(unet, inputs, prompt), atol=1e-4)


def test_a_prompt_of_zeros_is_not_neutral(unet, inputs):
    zeros = Prompt(torch.zeros(3, WIDTH), torch.zeros(3, WIDTH))
    assert not torch.allclose(prompted(unet, inputs, zeros), predict(unet, inputs), atol=1e-4)


def test_a_prompt_for_each_image_equals_each_alone(unet, inputs, prompt, alike):
    both = prompted(unet, inputs, Prompt(torch.stack([prompt.k, alike.k]), torch.stack([prompt.v, alike.v])))
    for n, one in enumerate((prompt, alike)):
        alone = prompted(unet, [x[n : n + 1] for x in inputs], one)
        torch.testing.assert_close(both[n : n + 1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("place, names", [("mid", [MID]), ("mid+up", [MID, *UP]), ("all", [DOWN, MID, *UP])])
def test_only_the_place_is_prompted(unet, place, names):
    with augment(unet, place):
        ours = {name for name, p in unet.attn_processors.items() if isinstance(p, PromptAttnProcessor)}
    assert ours == {f"{name}.processor" for name in names}


def test_places_differ(unet, inputs, prompt):
    mid, up, everywhere = (prompted(unet, inputs, prompt, place) for place in PLACES)
    assert not torch.equal(mid, up) and not torch.equal(up, everywhere)


def test_a_half_precision_model_takes_a_float32_prompt(unet, inputs, prompt):
    exact = prompted(unet, inputs, prompt)
    latents, t, text = inputs
    rough = prompted(unet.bfloat16(), (latents.bfloat16(), t, text.bfloat16()), prompt)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, atol=0.05, rtol=0.05)


# -------------------------------------------------------------------------------------------------------------- gradients


def gradients(unet, inputs, prompt):
    k, v = prompt.k.clone().requires_grad_(), prompt.v.clone().requires_grad_()
    with augment(unet) as slot, slot.holding(Prompt(k, v)):
        loss = unet(*inputs).sample.square().mean()
        return torch.autograd.grad(loss, [k, v])


def test_gradients_reach_both_halves(unet, inputs, prompt):
    for gradient in gradients(unet, inputs, prompt):
        assert (gradient.abs().amax(dim=-1) > 1e-9).all()  # every token's


def test_gradients_are_the_same_with_checkpointing(unet, inputs, prompt):
    unet.train()
    expected = gradients(unet, inputs, prompt)
    unet.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(unet, inputs, prompt), expected)


# --------------------------------------------------------------------------------------------------------------- watching


def test_watched_maps_are_probabilities_over_text_and_prompt(unet, inputs, prompt):
    with augment(unet, "mid+up", prompt) as slot, slot.watching() as maps:
        predict(unet, inputs)
    assert {name: tuple(m.shape) for name, m in maps.items()} == {
        MID: (2, 2, 16, 8),
        UP[0]: (2, 2, 64, 8),
        UP[1]: (2, 2, 64, 8),
    }
    for weights in maps.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert (weights > 0).all()


def test_watching_without_a_prompt_shows_the_base(unet, inputs):
    base = predict(unet, inputs)
    with augment(unet) as slot, slot.watching() as maps:
        torch.testing.assert_close(predict(unet, inputs), base, atol=1e-5, rtol=1e-4)
    assert maps[MID].shape[-1] == 5


def test_watching_ends_also_after_an_exception(unet, inputs):
    with augment(unet) as slot:
        with pytest.raises(KeyboardInterrupt), slot.watching() as maps:
            raise KeyboardInterrupt
        predict(unet, inputs)
    assert slot.maps is None and maps == {}


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("switch", ["set_attention_slice", "fuse_qkv_projections"])
def test_what_replaces_processors_is_noticed_and_undone(unet, inputs, prompt, switch, sentence):
    base, processors = predict(unet, inputs), unet.attn_processors
    with (
        pytest.raises(RuntimeError, match="the prompt was dropped from 4 layers") as error,
        augment(unet, "all", prompt),
    ):
        getattr(unet, switch)(*(["max"] if switch == "set_attention_slice" else []))
    sentence(error)
    assert unet.attn_processors == processors
    torch.testing.assert_close(predict(unet, inputs), base, atol=1e-5, rtol=1e-4)


def test_an_ip_adapter_is_refused(unet, inputs, prompt, sentence):
    sizes = [unet.get_submodule(name.removesuffix(".processor")).inner_dim for name in unet.attn_processors]
    adapter = {f"{n}.to_{x}_ip.weight": torch.randn(size, WIDTH) for n, size in enumerate(sizes) for x in "kv" if n % 2}
    projection = {
        "proj.weight": torch.randn(4 * WIDTH, 16),
        "proj.bias": torch.randn(4 * WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": adapter}])
    image = {"image_embeds": [torch.randn(2, 1, 16)]}
    with pytest.raises(ValueError, match="unload_ip_adapter") as error:
        prompted(unet, inputs, prompt, added_cond_kwargs=image)
    sentence(error)


def test_an_unknown_place_is_refused(unet, sentence):
    with pytest.raises(ValueError, match=r"unknown place 'head': accepted are mid, mid\+up, all") as error:
        augment(unet, "head").__enter__()
    sentence(error)


def test_another_width_is_refused(unet, sentence):
    with pytest.raises(ValueError, match=f"48 wide .* {WIDTH} wide") as error:
        augment(unet, "all", Prompt(torch.zeros(3, 48), torch.zeros(3, 48))).__enter__()
    sentence(error)


@pytest.mark.parametrize("m", [0, -1, True, 2.0, "3"])
def test_an_impossible_length_is_refused(m, sentence):
    with pytest.raises(ValueError, match=f"m={m!r} is not possible") as error:
        initial_prompt(torch.zeros(2, WIDTH), m)
    sentence(error)


def test_a_prompt_starts_from_the_tokens_repeated_in_order():
    tokens = torch.randn(2, WIDTH)
    prompt = initial_prompt(tokens, 5)
    assert prompt.m == 5
    assert torch.equal(prompt.k, tokens[[0, 1, 0, 1, 0]]) and torch.equal(prompt.k, prompt.v)
    prompt.k.zero_()
    assert tokens.any() and prompt.v.any(), "the halves are copies"
