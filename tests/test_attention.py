"""The prompted attention against plain softmax and against diffusers; and that it leaves the model unchanged."""

import math

import pytest
import torch

from erasekit.attention import LAYERS, Prompt, PromptAttnProcessor, augment, initial_prompt

WIDTH = 32  # of the toy's text embeddings
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
MID = "mid_block.attentions.0.transformer_blocks.0.attn2"
UP = [f"up_blocks.1.attentions.{n}.transformer_blocks.0.attn2" for n in (0, 1)]
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture
def inputs():
    """Latents (2, 4, 8, 8), time steps (2,) and text embeddings (2, 5, WIDTH)."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return latents, torch.tensor([100, 700]), torch.randn(2, 5, WIDTH, generator=generator)


@pytest.fixture
def equal_halves(prompt):
    """A prompt with p_k = p_v: the same as more text."""
    return Prompt(prompt.k, prompt.k)


def with_tokens(inputs, prompt):
    """The inputs with the prompt's tokens as text."""
    latents, t, text = inputs
    return latents, t, torch.cat([text, prompt.k.expand(2, -1, -1)], dim=1)


@torch.no_grad()
def predict(unet, inputs, **kwargs):
    return unet(*inputs, **kwargs).sample


def prompted(unet, inputs, prompt, layers="all", **kwargs):
    with augment(unet, layers, prompt):
        return predict(unet, inputs, **kwargs)


# ------------------------------------------------------------------------------------------------------- state is restored


@pytest.mark.parametrize("layers", LAYERS)
def test_without_a_prompt_the_output_is_bit_identical(unet, inputs, prompt, layers):
    base = predict(unet, inputs)
    assert torch.equal(prompted(unet, inputs, None, layers), base)
    with augment(unet, layers, prompt) as state, state.use(None):
        assert torch.equal(predict(unet, inputs), base)


def test_the_base_is_restored_bit_for_bit(unet, inputs, prompt):
    base, processors = predict(unet, inputs), unet.attn_processors
    assert not torch.equal(prompted(unet, inputs, prompt), base)
    assert unet.attn_processors == processors
    assert torch.equal(predict(unet, inputs), base)


def test_an_exception_restores_processors_and_prompt(unet, prompt):
    processors = unet.attn_processors
    with pytest.raises(KeyboardInterrupt), augment(unet, "all", prompt) as state:
        with pytest.raises(ZeroDivisionError), state.use(None):
            _ = 1 / 0
        assert state.prompt is prompt
        raise KeyboardInterrupt
    assert unet.attn_processors == processors


def test_of_two_nested_prompts_the_inner_one_is_used(unet, inputs, prompt, equal_halves):
    expected = prompted(unet, inputs, equal_halves)
    with augment(unet, "all", prompt):
        assert torch.equal(prompted(unet, inputs, equal_halves), expected)


# ------------------------------------------------------------------------------------------------------------ the equation


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


def test_every_prompted_layer_is_plain_softmax_attention(unet, inputs, prompt):
    checked = []

    def compare(attn, arguments, keywords, output):
        expected = plain_attention(attn, arguments[0], keywords["encoder_hidden_states"], prompt)
        torch.testing.assert_close(output, expected, **CLOSE)
        checked.append(attn)

    for name in (DOWN, MID, *UP):
        unet.get_submodule(name).register_forward_hook(compare, with_kwargs=True)
    prompted(unet, inputs, prompt)
    assert len(checked) == 4


def test_equal_halves_are_diffusers_on_longer_text(unet, inputs, equal_halves):
    assert {type(p).__name__ for p in unet.attn_processors.values()} == {"AttnProcessor2_0"}
    expected = predict(unet, with_tokens(inputs, equal_halves))
    torch.testing.assert_close(prompted(unet, inputs, equal_halves), expected, **CLOSE)


def test_masked_text_is_diffusers_on_longer_text(unet, inputs, equal_halves):
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    longer = torch.cat([mask, torch.ones(2, 3).bool()], dim=1)
    expected = predict(unet, with_tokens(inputs, equal_halves), encoder_attention_mask=longer)
    found = prompted(unet, inputs, equal_halves, encoder_attention_mask=mask)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not torch.allclose(found, prompted(unet, inputs, equal_halves), atol=1e-4)


def test_the_order_of_tokens_does_not_matter_but_both_halves_do(unet, inputs, prompt):
    expected = prompted(unet, inputs, prompt)
    torch.testing.assert_close(prompted(unet, inputs, Prompt(prompt.k.flip(0), prompt.v.flip(0))), expected, **CLOSE)
    assert not torch.allclose(prompted(unet, inputs, Prompt(prompt.v, prompt.k)), expected, atol=1e-4)


def test_a_prompt_of_zeros_is_not_neutral(unet, inputs):
    zeros = Prompt(torch.zeros(3, WIDTH), torch.zeros(3, WIDTH))
    assert not torch.allclose(prompted(unet, inputs, zeros), predict(unet, inputs), atol=1e-4)


def test_a_prompt_per_image_equals_each_alone(unet, inputs, prompt, equal_halves):
    pair = Prompt(torch.stack([prompt.k, equal_halves.k]), torch.stack([prompt.v, equal_halves.v]))
    both = prompted(unet, inputs, pair)
    for n, one in enumerate((prompt, equal_halves)):
        alone = prompted(unet, [x[n : n + 1] for x in inputs], one)
        torch.testing.assert_close(both[n : n + 1], alone, **CLOSE)


def test_only_the_named_layers_are_prompted(unet, inputs, prompt):
    names = {"mid": [MID], "mid+up": [MID, *UP], "all": [DOWN, MID, *UP]}
    outputs = []
    for layers in LAYERS:
        with augment(unet, layers, prompt):
            ours = {name for name, p in unet.attn_processors.items() if isinstance(p, PromptAttnProcessor)}
            outputs.append(predict(unet, inputs))
        assert ours == {f"{name}.processor" for name in names[layers]}
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])


def test_a_half_precision_model_takes_a_float32_prompt(unet, inputs, prompt):
    exact = prompted(unet, inputs, prompt)
    latents, t, text = inputs
    rough = prompted(unet.bfloat16(), (latents.bfloat16(), t, text.bfloat16()), prompt)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, atol=0.05, rtol=0.05)


# --------------------------------------------------------------------------------------------------------------- gradients


def gradients(unet, inputs, prompt):
    k, v = prompt.k.clone().requires_grad_(), prompt.v.clone().requires_grad_()
    with augment(unet) as state, state.use(Prompt(k, v)):
        loss = unet(*inputs).sample.square().mean()
        return torch.autograd.grad(loss, [k, v])


def test_every_token_of_both_halves_has_a_gradient(unet, inputs, prompt):
    for gradient in gradients(unet, inputs, prompt):
        assert (gradient.abs().amax(dim=-1) > 1e-9).all()


def test_gradient_checkpointing_does_not_change_gradients(unet, inputs, prompt):
    unet.train()
    expected = gradients(unet, inputs, prompt)
    unet.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(unet, inputs, prompt), expected)


# ---------------------------------------------------------------------------------------------------------- recorded maps


def test_recorded_maps_are_probabilities_over_text_and_prompt(unet, inputs, prompt):
    with augment(unet, "mid+up", prompt) as state, state.record() as maps:
        predict(unet, inputs)
    shapes = {name: tuple(weights.shape) for name, weights in maps.items()}
    assert shapes == {MID: (2, 2, 16, 8), UP[0]: (2, 2, 64, 8), UP[1]: (2, 2, 64, 8)}
    for weights in maps.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert (weights > 0).all()


def test_recording_without_a_prompt_records_the_base(unet, inputs):
    base = predict(unet, inputs)
    with augment(unet) as state:
        with pytest.raises(KeyboardInterrupt), state.record() as maps:
            torch.testing.assert_close(predict(unet, inputs), base, **CLOSE)
            raise KeyboardInterrupt
        assert state.maps is None and maps[MID].shape[-1] == 5
        maps.clear()
        predict(unet, inputs)
    assert maps == {}


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("switch, arguments", [("set_attention_slice", ["max"]), ("fuse_qkv_projections", [])])
def test_replaced_processors_are_noticed_and_undone(unet, inputs, prompt, switch, arguments, sentence):
    base, processors = predict(unet, inputs), unet.attn_processors
    with pytest.raises(RuntimeError, match="dropped from 4 layers") as error, augment(unet, "all", prompt):
        getattr(unet, switch)(*arguments)
    sentence(error)
    assert unet.attn_processors == processors
    torch.testing.assert_close(predict(unet, inputs), base, **CLOSE)


def test_an_ip_adapter_is_refused(unet, inputs, prompt, sentence):
    sizes = [unet.get_submodule(name.removesuffix(".processor")).inner_dim for name in unet.attn_processors]
    adapter = {f"{n}.to_{x}_ip.weight": torch.randn(size, WIDTH) for n, size in enumerate(sizes) for x in "kv" if n % 2}
    projection = {"proj.weight": torch.randn(4 * WIDTH, 16), "proj.bias": torch.randn(4 * WIDTH)}
    projection |= {"norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH)}
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": adapter}])
    image = {"image_embeds": [torch.randn(2, 1, 16)]}
    with pytest.raises(ValueError, match="unload_ip_adapter") as error:
        prompted(unet, inputs, prompt, added_cond_kwargs=image)
    sentence(error)


@pytest.mark.parametrize(
    "layers, width, message",
    [
        ("head", WIDTH, r"unknown layers 'head': accepted are mid, mid\+up, all"),
        ("all", 48, f"48 wide but this model takes {WIDTH}"),
    ],
)
def test_unknown_layers_and_another_width_are_refused(unet, layers, width, message, sentence):
    with pytest.raises(ValueError, match=message) as error:
        augment(unet, layers, Prompt(torch.zeros(3, width), torch.zeros(3, width))).__enter__()
    sentence(error)


@pytest.mark.parametrize("m", [0, True, 2.0])
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
