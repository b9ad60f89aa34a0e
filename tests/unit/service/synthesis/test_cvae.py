"""The conditional VAE: exact tokens, shapes for any size, and an untrained one is the soup."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Normal

from service.errors import InvalidBundleError
from service.synthesis.cvae import ConditionalVAE, build_decoder
from service.synthesis.generator_config import GeneratorConfig
from service.synthesis.in_context import InContextDecoder
from service.synthesis.layout import AdapterKind, AdapterLayout
from service.synthesis.normalizer import AdapterNormalizer
from service.synthesis.token_networks import TaskAttention, TokenDecoder, TokenMap
from tests.fixtures.kernel import PROPERTY, adapt_tiny_net, layouts, normal

PRESETS = pytest.mark.parametrize("preset", ["paper", "token", "in_context"])


def make_config(preset: str, depth: int = 3, width: int = 8) -> GeneratorConfig:
    return GeneratorConfig(
        preset,
        condition_dim=5,
        latent_dim=4,
        depth=depth,
        width=width,
        chunk_size=7,
        num_prototypes=3,
        attention_temperature=0.5,
    )


def make_model(preset: str, seed: int = 0, trained: bool = False) -> ConditionalVAE:
    """A small generator; `trained` gives every weight a random value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layout = make_layout()
        model = ConditionalVAE(layout, make_config(preset))
        for parameter in model.parameters() if trained else ():
            nn.init.normal_(parameter, std=0.3)
    if isinstance(model.decoder, TokenDecoder):
        model.decoder.set_keys(normal(3, 5))
    if isinstance(model.decoder, InContextDecoder):
        model.decoder.set_adapters(normal(3, layout.num_params))
    return model


def make_layout() -> AdapterLayout:
    _, layout, _ = adapt_tiny_net(AdapterKind.LORA)
    return layout


@PROPERTY
@given(layouts(), st.integers(1, 40))
def test_tokens_cut_and_join_exactly(layout: AdapterLayout, chunk_size: int) -> None:
    tokens = TokenMap(layout, chunk_size)
    vectors = normal(3, layout.num_params)

    cut = tokens.cut(vectors)

    assert torch.equal(tokens.join(cut), vectors)
    assert cut.shape == (3, len(tokens.role), tokens.chunk_size)
    assert tokens.chunk_size <= chunk_size


@PROPERTY
@given(layouts(), st.integers(1, 40))
def test_a_token_lies_in_one_module_and_knows_where(layout: AdapterLayout, chunk: int) -> None:
    tokens = TokenMap(layout, chunk)
    owner = torch.empty(layout.num_params + 1, dtype=torch.long)
    owner[-1] = -1  # padding
    for entry in layout.entries:
        paths = [module.path for module in layout.modules]
        owner[entry.span] = paths.index(entry.module)

    places = set()
    for number, index in enumerate(tokens.index):
        modules = set(owner[index].tolist()) - {-1}
        assert len(modules) == 1
        assert layout.modules[modules.pop()].role == layout.roles[tokens.role[number]]
        places.add(tuple(int(t[number]) for t in (tokens.role, tokens.layer, tokens.chunk)))
    assert len(places) == len(tokens.role)  # role, layer and chunk tell all tokens apart


@PROPERTY
@given(layouts(), st.integers(1, 40))
def test_padding_is_zero_on_the_way_in_and_dropped_on_the_way_out(
    layout: AdapterLayout, chunk_size: int
) -> None:
    tokens = TokenMap(layout, chunk_size)
    padding = tokens.index == layout.num_params
    vectors = torch.ones(2, layout.num_params)

    cut = tokens.cut(vectors)

    assert torch.equal(cut[0] == 0, padding)
    assert torch.equal(tokens.join(cut.masked_fill(padding, torch.nan)), vectors)


@PRESETS
@PROPERTY
@given(layouts(), st.data())
def test_an_untrained_decoder_gives_the_mean_adapter(
    preset: str, layout: AdapterLayout, data: st.DataObject
) -> None:
    depth = data.draw(st.integers(1, 6))
    decoder = build_decoder(layout, make_config(preset, depth=depth))
    adapters = {"a": normal(1, layout.num_params), "b": normal(1, layout.num_params, seed=1)}
    normalizer = AdapterNormalizer.fit(layout, adapters)

    out = decoder(normal(2, 4), normal(2, 5))

    assert out.shape == (2, layout.num_params)
    assert not out.any()
    soup = normalizer.mean.expand(2, -1)
    assert torch.equal(normalizer.denormalize(out), soup)


@PRESETS
@PROPERTY
@given(layouts(), st.data())
def test_encoder_gives_a_finite_posterior_for_any_layout(
    preset: str, layout: AdapterLayout, data: st.DataObject
) -> None:
    depth = data.draw(st.integers(1, 6))
    model = ConditionalVAE(layout, make_config(preset, depth=depth))

    mean, log_variance = model.encoder(normal(2, layout.num_params, std=100), normal(2, 5))

    assert mean.shape == log_variance.shape == (2, 4)
    assert mean.isfinite().all()
    assert ((log_variance >= -12) & (log_variance <= 6)).all()


@PRESETS
def test_twelve_convolutions_each_way_unless_told_otherwise(preset: str) -> None:
    model = ConditionalVAE(make_layout(), GeneratorConfig(preset, 5, 4, width=8))

    for half in (model.encoder, model.decoder):
        convolutions = [m for m in half.modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)]
        assert len(convolutions) == 12


@PRESETS
def test_forward_is_the_reparameterised_sample(preset: str) -> None:
    model = make_model(preset, trained=True)
    adapters, condition = normal(2, make_layout().num_params), normal(2, 5)
    mean, log_variance = model.encoder(adapters, condition)
    posterior = Normal(mean, torch.exp(0.5 * log_variance))
    torch.manual_seed(3)
    sample = posterior.rsample()
    torch.manual_seed(3)
    noise = torch.normal(torch.zeros(2, 4), torch.ones(2, 4))

    reconstructed, ours_mean, ours_log_variance = model(adapters, condition, noise)

    assert torch.equal(ours_mean, mean)
    assert torch.equal(ours_log_variance, log_variance)
    torch.testing.assert_close(reconstructed, model.decoder(sample, condition))


@PRESETS
def test_a_row_does_not_depend_on_what_shares_its_batch(preset: str) -> None:
    decoder = make_model(preset, trained=True).decoder
    z, condition = normal(3, 4), normal(3, 5, seed=1)

    together = decoder(z, condition)

    for row in range(3):
        alone = decoder(z[row : row + 1], condition[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone)


@PRESETS
def test_decoder_feels_the_task_vector_and_z(preset: str) -> None:
    decoder = make_model(preset, trained=True).decoder
    z, condition = normal(1, 4), normal(1, 5)
    out = decoder(z, condition)

    assert not torch.allclose(out, decoder(z, condition + 0.5))
    assert not torch.allclose(out, decoder(z + 0.5, condition))


def test_every_layer_of_the_token_decoder_feels_the_condition() -> None:
    decoder = make_model("token", trained=True).decoder
    assert isinstance(decoder, TokenDecoder)

    decoder(normal(1, 4), normal(1, 5)).square().sum().backward()

    for layer in decoder.layers:
        assert layer.film.weight.grad.abs().sum() > 0


def test_task_attention_is_softmax_attention_over_cosines() -> None:
    attention = TaskAttention(make_config("token"))
    prototypes, conditions = normal(3, 5, std=4.0), normal(6, 5, seed=1, std=0.1)
    attention.set_keys(prototypes)
    unit = nn.functional.normalize

    expected = nn.functional.scaled_dot_product_attention(
        unit(conditions, dim=1)[None],
        unit(prototypes, dim=1)[None],
        attention.values[None],
        scale=1 / 0.5,
    )

    torch.testing.assert_close(attention(conditions), expected[0])
    torch.testing.assert_close(attention.keys.norm(dim=1), torch.ones(3))


def test_a_cold_attention_reads_a_wording_as_the_nearest_task() -> None:
    attention = TaskAttention(make_config("token"))
    attention.temperature = 1e-3
    attention.set_keys(torch.eye(5)[:3])

    read = attention(torch.tensor([[0.1, 0.9, 0.3, 0.0, 0.2]]))

    torch.testing.assert_close(read[0], attention.values[1])


@PRESETS
def test_all_weights_of_both_halves_are_trained(preset: str) -> None:
    model = make_model(preset, trained=True)

    out, mean, log_variance = model(normal(2, make_layout().num_params), normal(2, 5), normal(2, 4))
    (out.square().sum() + mean.square().sum() + log_variance.square().sum()).backward()

    assert all(parameter.grad is not None for parameter in model.parameters())


@PRESETS
def test_the_same_seed_gives_the_same_networks(preset: str) -> None:
    first, again, other = make_model(preset), make_model(preset), make_model(preset, seed=1)

    def flat(model: nn.Module) -> Tensor:
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    assert torch.equal(flat(first), flat(again))
    assert not torch.equal(flat(first), flat(other))


@PRESETS
def test_trained_weights_and_keys_alone_are_saved(preset: str) -> None:
    model = make_model(preset)

    context = {"token": {"task.keys"}, "in_context": {"keys", "adapters", "temperature"}}.get(
        preset, set()
    )
    buffers = {f"decoder.{name}" for name in context}
    assert model.state_dict().keys() == dict(model.named_parameters()).keys() | buffers


def test_config_round_trip_and_what_it_refuses() -> None:
    config = make_config("token")

    assert GeneratorConfig.from_json(config.to_json()) == config
    with pytest.raises(InvalidBundleError, match="colour"):
        GeneratorConfig.from_json(config.to_json() | {"colour": "red"})
    with pytest.raises(InvalidBundleError, match="latent_dim"):
        GeneratorConfig.from_json({"preset": "token", "condition_dim": 5})


def test_unknown_preset_is_refused() -> None:
    match = "'diffusion' is unknown: paper, token or in_context"
    with pytest.raises(InvalidBundleError, match=match):
        build_decoder(make_layout(), make_config("diffusion"))
