"""From which distribution parameters were drawn, and fresh draws from it."""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from perennial.noise import Noise, elements, seed_key
from perennial.units.draw import Distribution, build_and_record
from perennial.units.recover import recover

# peft asks a model of transformers by a name that transformers is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def noise(seed: int = 0) -> Noise:
    return Noise(torch.tensor(seed_key(seed, "method"), dtype=torch.int32), torch.tensor(3, dtype=torch.int32))


# --- draws ----------------------------------------------------------------------------------------------------------

DISTRIBUTIONS = {
    "uniform": Distribution("uniform", -0.3, 0.7),
    "normal": Distribution("normal", 0.1, 0.2),
    "truncated": Distribution("truncated_normal", 0.1, 0.2, -0.1, 0.5),
    "constant": Distribution("constant", 0.4),
    "orthogonal": Distribution("orthogonal", 1.4, 0.9),
    "padded": Distribution("normal", 0.0, 1.0, zeros=(6, 12)),
}


@pytest.mark.parametrize(
    ("mean", "std", "low", "high"),
    [(0.0, 0.02, -2.0, 2.0), (0.5, 2.0, -1.0, 3.0), (0.0, 1.0, 5.0, math.inf), (0.0, 1.0, -math.inf, -5.0),
     (1.0, 0.5, 4.0, 4.5), (-1.0, 1.0, 0.0, 0.1)],
)  # fmt: skip
def test_a_truncated_normal_is_its_inverse_distribution_function(
    mean: float, std: float, low: float, high: float
) -> None:
    element = torch.arange(4000, dtype=torch.int32)
    found = Distribution("truncated_normal", mean, std, low, high).draw(noise(), "w", element).double().numpy()
    uniform = noise().uniform("w", element).double().numpy()
    ends = (low - mean) / std, (high - mean) / std
    expected = scipy.stats.truncnorm.ppf(uniform, *ends, loc=mean, scale=std)
    if ends[0] + ends[1] > 0:  # drawn as the mirror image
        expected = -scipy.stats.truncnorm.ppf(uniform, -ends[1], -ends[0], loc=-mean, scale=std)
    assert found == pytest.approx(expected, rel=2e-5, abs=2e-5 * std)
    assert found.min() >= np.float32(low)
    assert found.max() <= np.float32(high)
    assert scipy.stats.kstest(found, scipy.stats.truncnorm(*ends, loc=mean, scale=std).cdf).pvalue > 0.01


@pytest.mark.parametrize("bounds", [(-2.76, -2.759), (0.71, 0.7101), (7.5, math.inf), (-math.inf, 9.0)], ids=str)
def test_rounding_puts_no_truncated_normal_outside(bounds: tuple[float, float]) -> None:
    element = torch.arange(200_000, dtype=torch.int32)
    found = Distribution("truncated_normal", 0.1, 1.0, *bounds).draw(noise(), "w", element)
    assert found.isfinite().all()
    assert found.min() >= np.float32(bounds[0])
    assert found.max() <= np.float32(bounds[1])


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", [(5, 6), (5, 2, 3), (5, 3, 1, 2), (12,)], ids=str)
def test_rows_get_the_numbers_of_the_whole(name: str, shape: tuple[int, ...]) -> None:
    if name == "orthogonal" and len(shape) == 1:
        return
    source = DISTRIBUTIONS[name]
    whole = source.draw(noise(), "w", elements(torch.empty(shape)))
    element = elements(torch.empty(shape))[torch.tensor([3, 0, 4])]
    # A sum of squares may round differently in another shape.
    same = torch.equal if name != "orthogonal" else functools.partial(torch.allclose, rtol=1e-6)
    assert same(source.draw(noise(), "w", element), whole[[3, 0, 4]])
    assert same(source.draw(noise(), "w", element[1:2])[0], whole[0])
    lanes = torch.func.vmap(lambda one: source.draw(noise(), "w", one[None])[0])(element)
    assert same(lanes, whole[[3, 0, 4]])


@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (7, 2, 3, 3)], ids=str)
def test_orthogonal_rows_are_as_long_as_torchs(shape: tuple[int, ...]) -> None:
    def factory() -> nn.Module:
        module = nn.Module()
        module.w = nn.Parameter(torch.empty(shape))
        nn.init.orthogonal_(module.w, gain=1.7)
        return module

    model, found = build_and_record(factory)
    fresh = found["w"].draw(noise(), "w", elements(model.w))
    assert found["w"].kind == "orthogonal"
    assert found["w"].first == pytest.approx(1.7)
    lengths = fresh.flatten(1).norm(dim=1)
    assert torch.allclose(lengths, lengths[:1])
    assert fresh.square().sum().item() == pytest.approx(model.w.square().sum().item(), rel=1e-5)
    other = found["w"].draw(noise(1), "w", elements(model.w))
    assert not torch.allclose(fresh, other)


def test_orthogonal_directions_are_spread_evenly() -> None:
    rows = Distribution("orthogonal", 1.0, 1.0).draw(noise(), "w", elements(torch.empty(4000, 5)))
    assert rows.mean(0).abs().max() < 0.03
    assert torch.allclose(rows.T @ rows / 4000, torch.eye(5) / 5, atol=0.02)


def test_single_elements_of_an_orthogonal_weight_are_refused() -> None:
    with pytest.raises(ValueError, match=r"head\.weight was drawn orthogonal.*\[7\]; give elements \[rows"):
        Distribution("orthogonal", 1.0, 1.0).draw(noise(), "head.weight", torch.arange(7, dtype=torch.int32))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Distribution("gamma", 1.0), "'gamma'; it is one of uniform, normal"),
        (lambda: Distribution("truncated_normal", 0.0, 0.0, -1.0, 1.0), "deviation must be above 0"),
        (lambda: Distribution("truncated_normal", 0.0, 1.0, 1.0, -1.0), "lower bound below the upper"),
        (lambda: Distribution("truncated_normal", 0.0, 1.0, 20.0, 21.0), "almost no probability from 20 to 21"),
    ],
)
def test_impossible_distributions_are_refused(make: Callable[[], Distribution], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("factor", [0.5, -2.0, 0.0])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_scaled_draws_are_draws_scaled(name: str, factor: float) -> None:
    source = DISTRIBUTIONS[name]
    element = elements(torch.empty(3000, 5))
    drawn, scaled = source.draw(noise(), "w", element), source.scaled(factor).draw(noise(), "w", element)
    size = abs(factor) + 1e-9
    assert torch.allclose(scaled.mean(), drawn.mean() * factor, atol=0.03 * size)
    assert torch.allclose(scaled.std(), drawn.std() * abs(factor), atol=0.03 * size)
    assert torch.allclose(scaled.max(), (drawn * factor).max(), atol=0.02 * size) or name in ("normal", "padded")


# --- what the recorder understands ----------------------------------------------------------------------------------


def _record(make: Callable[[], Tensor], act: Callable[[Tensor], Any] = lambda w: None) -> Distribution | None:
    def factory() -> nn.Module:
        module = nn.Module()
        module.w = nn.Parameter(make())
        with torch.no_grad():
            act(module.w)
        return module

    return build_and_record(factory)[1].get("w")


def _empty() -> Tensor:
    return torch.empty(5, 6)


def _written(w: Tensor, value: Tensor) -> None:
    w.data = value


UNDERSTOOD: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], Any], Distribution]] = {
    "multiplied": (_empty, lambda w: w.uniform_(-1, 2).mul_(0.5), Distribution("uniform", -0.5, 1.0)),
    "multiplied by a negative": (_empty, lambda w: w.uniform_(-1, 2).mul_(-2), Distribution("uniform", -4.0, 2.0)),
    "divided": (_empty, lambda w: w.normal_(1, 3).div_(4), Distribution("normal", 0.25, 0.75)),
    "multiplied by zero": (_empty, lambda w: w.normal_().mul_(0), Distribution("constant", 0.0)),
    "a gain on a constant": (_empty, lambda w: w.fill_(3.0).mul_(0.5), Distribution("constant", 1.5)),
    "a gain by its data": (_empty, lambda w: w.data.normal_().mul_(0.1), Distribution("normal", 0.0, 0.1)),
    "a gain by torch": (_empty, lambda w: w.normal_().__imul__(0.1), Distribution("normal", 0.0, 0.1)),
    "truncated": (
        _empty, lambda w: nn.init.trunc_normal_(w, 0.1, 0.2, -0.3, 0.4),
        Distribution("truncated_normal", 0.1, 0.2, -0.3, 0.4),
    ),
    "truncated, scaled": (
        _empty, lambda w: nn.init.trunc_normal_(w, 0.0, 1.0, -1.0, 2.0).mul_(-0.5),
        Distribution("truncated_normal", 0.0, 0.5, -1.0, 0.5),
    ),
    "orthogonal": (_empty, lambda w: nn.init.orthogonal_(w), Distribution("orthogonal", 1.0, 1.0)),
    "orthogonal, tall": (
        lambda: torch.empty(8, 2), lambda w: nn.init.orthogonal_(w, 3.0), Distribution("orthogonal", 3.0, 1.5),
    ),
    "orthogonal convolution": (
        lambda: torch.empty(9, 2, 2), lambda w: nn.init.orthogonal_(w, 0.5).mul_(-2),
        Distribution("orthogonal", 1.0, 2 / 3),
    ),
    "a copy": (_empty, lambda w: w.copy_(torch.rand(5, 6)), Distribution("uniform", 0.0, 1.0)),
    "a loaded copy": (_empty, lambda w: _written(w, torch.empty(5, 6).normal_().clone()),
                      Distribution("normal", 0.0, 1.0)),
    "another dtype": (lambda: torch.empty(5, 6).normal_(0, 2).double(), lambda w: None,
                      Distribution("normal", 0.0, 2.0)),
    "made and scaled": (lambda: 0.02 * torch.randn(5, 6) / 2, lambda w: None, Distribution("normal", 0.0, 0.01)),
    "made of ones": (lambda: torch.ones(5), lambda w: None, Distribution("constant", 1.0)),
    "made full": (lambda: torch.full((5,), 0.1), lambda w: None, Distribution("constant", 0.1)),
    "made like": (lambda: torch.randn_like(torch.empty(3, 2)), lambda w: None, Distribution("normal", 0.0, 1.0)),
    "made new": (lambda: torch.empty(3).new_full((2, 2), 3.0), lambda w: None, Distribution("constant", 3.0)),
    "made normal": (lambda: torch.normal(1.0, 2.0, (3, 2)), lambda w: None, Distribution("normal", 1.0, 2.0)),
    "a padding row": (
        lambda: nn.Embedding(5, 6, padding_idx=2).weight.detach(), lambda w: None,
        Distribution("normal", 0.0, 1.0, zeros=(12, 18)),
    ),
    "a padding row, scaled": (
        lambda: nn.Embedding(5, 6, padding_idx=4).weight.detach(), lambda w: w.mul_(0.5),
        Distribution("normal", 0.0, 0.5, zeros=(24, 30)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_understands(name: str) -> None:
    make, act, expected = UNDERSTOOD[name]
    found = _record(make, act)
    assert found is not None
    assert (found.kind, found.zeros) == (expected.kind, expected.zeros)
    assert (found.first, found.second, found.low, found.high) == pytest.approx(
        (expected.first, expected.second, expected.low, expected.high)
    )


NOT_UNDERSTOOD: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], Any]]] = {
    "multiplied by a tensor": (_empty, lambda w: w.normal_().mul_(torch.rand(6))),
    "divided by its own norm": (_empty, lambda w: w.normal_().div_(w.norm())),
    "turned signs of a normal": (_empty, lambda w: w.normal_().mul_(torch.ones(6))),
    "part of it multiplied": (_empty, lambda w: w.normal_()[1:].mul_(0.5)),
    "many at once": (_empty, lambda w: torch._foreach_mul_([w.normal_()], 0.5)),
    "many copied at once": (_empty, lambda w: torch._foreach_copy_([w.normal_()], [torch.rand(5, 6)])),
    "a part filled with a value": (_empty, lambda w: w.normal_()[1].fill_(0.5)),
    "two parts zero": (_empty, lambda w: (w.normal_(), w[1].zero_(), w[3].zero_())),
    "a column zero": (_empty, lambda w: w.normal_()[:, 1].zero_()),
    "a row of an orthogonal": (_empty, lambda w: nn.init.orthogonal_(w)[1].zero_()),
    "an orthogonal, of another shape": (lambda: nn.init.orthogonal_(torch.empty(4, 9)).reshape(6, 6), lambda w: None),
    "a factor of another matrix": (_empty, lambda w: w.copy_(torch.linalg.qr(torch.rand(5, 6) + 1)[1])),
    "a copy of a part": (_empty, lambda w: w.copy_(torch.rand(10, 6)[:5])),
    "a copy spread out": (_empty, lambda w: w.copy_(torch.rand(6))),
    "a padding row, turned": (lambda: nn.Embedding(5, 6, padding_idx=2).weight.detach().t(), lambda w: None),
    "rounded": (_empty, lambda w: w.normal_().div_(0.1, rounding_mode="floor")),
    "bounds too far out": (_empty, lambda w: nn.init._no_grad_trunc_normal_(w, 0.0, 1.0, 13.0, 14.0)),
    "of tensors": (lambda: torch.normal(torch.zeros(3), torch.ones(3)), lambda w: None),
    "clamped": (_empty, lambda w: w.normal_().clamp_(-1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
@pytest.mark.filterwarnings("ignore:mean is more than 2 std")
def test_leaves_out_what_it_does_not_understand(name: str) -> None:
    assert _record(*NOT_UNDERSTOOD[name]) is None


def test_layers_that_were_copied_are_known() -> None:
    """nn.TransformerEncoder clones its layers."""
    layer = functools.partial(nn.TransformerEncoderLayer, 8, 2, 16, batch_first=True)
    model, found = build_and_record(lambda: nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False).double())
    assert found.keys() == dict(model.named_parameters()).keys()
    assert found["layers.1.linear1.weight"] == found["layers.0.linear1.weight"]


def test_running_statistics_are_known() -> None:
    _, found = build_and_record(lambda: nn.BatchNorm1d(3))
    assert found == {
        "weight": Distribution("constant", 1.0),
        "bias": Distribution("constant", 0.0),
        "running_mean": Distribution("constant", 0.0),
        "running_var": Distribution("constant", 1.0),
    }


# --- recovered from a live model ------------------------------------------------------------------------------------


def _transformers() -> Any:
    return pytest.importorskip("transformers")


def _bert() -> nn.Module:
    t = _transformers()
    config = t.BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                          intermediate_size=64, max_position_embeddings=40, initializer_range=0.05)  # fmt: skip
    return t.BertForMaskedLM(config)  # type: ignore[no-any-return]


def _two_models() -> nn.Module:
    """A model of transformers inside another, each with a config of its own."""
    t = _transformers()
    sizes = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 64, "max_position_embeddings": 40}  # fmt: skip

    class Outer(t.PreTrainedModel):  # type: ignore[name-defined,misc]
        config_class = t.BertConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.inner = t.BertModel(t.BertConfig(**sizes, initializer_range=0.05))
            self.head = nn.Linear(32, 32)
            self.post_init()

    return Outer(t.BertConfig(**sizes, initializer_range=0.3))


def _t5(tied: bool) -> nn.Module:
    t = _transformers()
    config = t.T5Config(vocab_size=90, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
                        tie_word_embeddings=tied)  # fmt: skip
    return t.T5ForConditionalGeneration(config)  # type: ignore[no-any-return]


def _llama() -> nn.Module:
    t = _transformers()
    config = t.LlamaConfig(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                           num_key_value_heads=1, intermediate_size=64)  # fmt: skip
    return t.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def _vit() -> nn.Module:
    t = _transformers()
    config = t.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                         image_size=16, patch_size=4)  # fmt: skip
    return t.ViTForImageClassification(config)  # type: ignore[no-any-return]


def _lora(base: Callable[[], nn.Module] = _llama, **settings: Any) -> nn.Module:
    base_model = base()
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "up_proj"], **settings})
    return peft.get_peft_model(base_model, config)  # type: ignore[no-any-return]


class _Nano(nn.Module):
    """Applies an initialiser of its own to everything inside."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(40, 40), nn.LayerNorm(40))
        self.table = nn.Embedding(30, 40)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.07)


class _Vision(nn.Module):
    """Initialises itself in one go, through a list and a method kept as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.Linear(20, 60)
        self.parts = [self.conv, self.head]
        self.fill = self._fill
        self.gain = functools.partial(self._gain, self.head)
        self._initialize_weights()

    def _fill(self, index: int) -> None:
        nn.init.kaiming_normal_(self.parts[index].weight)

    def _gain(self, head: nn.Linear) -> None:
        head.weight.data.mul_(0.5)

    def _initialize_weights(self) -> None:
        for index in range(2):
            self.fill(index)
        self.gain()


RECOVERED: dict[str, Callable[[], nn.Module]] = {
    "linear, conv, norms": lambda: nn.Sequential(
        nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.GroupNorm(2, 20), nn.PReLU(), nn.Flatten(), nn.Linear(20, 60),
        nn.LayerNorm(60), nn.Embedding(40, 30), nn.Embedding(40, 30, padding_idx=3), nn.RMSNorm(60),
        nn.Bilinear(9, 9, 9),
    ),
    "recurrent": lambda: nn.Sequential(nn.LSTM(20, 20), nn.GRUCell(20, 20)),
    "attention": lambda: nn.MultiheadAttention(32, 4),
    "attention, other widths": lambda: nn.MultiheadAttention(32, 4, kdim=30, vdim=28, add_bias_kv=True),
    "encoder layer": lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
    "transformer": lambda: nn.Transformer(32, 4, 1, 1, 64, batch_first=True),
    "an own initialiser": _Nano,
    "an initialiser of everything": _Vision,
    "in another": lambda: nn.ModuleDict({"a": _Nano(), "b": nn.Linear(40, 40)}),
    "shared module": lambda: nn.Sequential(layer := nn.Linear(40, 40), nn.ReLU(), layer),
    "bert": _bert,
    "two models in one": _two_models,
    "t5": lambda: _t5(False),
    "t5, tied": lambda: _t5(True),
    "llama": _llama,
    "vit": _vit,
    "lora": _lora,
    "lora, gaussian": lambda: _lora(init_lora_weights="gaussian"),
    "lora, as linear layers": lambda: _lora(init_lora_weights=False),
    "dora": lambda: _lora(use_dora=True),
    "lora of embeddings": lambda: _lora(target_modules=["embed_tokens"]),
    "lora and a saved head": lambda: _lora(modules_to_save=["lm_head"]),
    "lora of bert": lambda: _lora(_bert, target_modules=["query"]),
    "lora of a plain model": lambda: _lora(_Nano, target_modules=["body.0"]),
}  # fmt: skip


@pytest.mark.parametrize("name", RECOVERED)
def test_recovers_what_the_constructor_did(name: str) -> None:
    """Two witnesses: the recorder beside the constructor, and the numbers of models that were made."""
    torch.manual_seed(0)
    model, recorded = build_and_record(RECOVERED[name])
    found = recover(model)
    assert {key: found.get(key) for key in recorded} == recorded
    made = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (RECOVERED[name]() for _ in range(6))]
    assert found.keys() <= made[0].keys()
    compared = 0
    for key, distribution in found.items():
        w = torch.stack([tensors[key].detach() for tensors in made])
        fresh = torch.stack([distribution.draw(noise(i), key, elements(w[i])) for i in range(6)])
        if distribution.kind == "constant":
            assert torch.equal(w, fresh.to(w.dtype)), key
            compared += 1
        elif w[0].numel() >= 900:
            assert fresh.std().item() == pytest.approx(w.std().item(), rel=0.05), key
            assert abs(fresh.mean() - w.mean()) < 0.1 * w.std(), key
            compared += 1
    assert compared
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert {key for key in trained - found.keys() if "lora_magnitude_vector" not in key} == set()


def test_a_padding_row_stays_zero() -> None:
    found = recover(_bert())["bert.embeddings.word_embeddings.weight"]
    fresh = found.draw(noise(), "w", elements(torch.empty(90, 32)))
    assert not fresh[0].any()
    assert fresh[1:].all()
    assert fresh[1:].std().item() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("kind", ["olora", "pissa", "orthogonal"])
def test_adapters_made_of_the_weights_are_absent(kind: str) -> None:
    model = _lora(init_lora_weights=kind)
    found = recover(model)
    assert not [key for key in found if "lora_" in key]
    assert [key for key in found if "q_proj.base_layer.weight" in key]


def test_other_adapters_are_absent() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(_llama(), peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10))
    found = recover(model)
    assert not [key for key in found if "lora_" in key]


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3))
        self.layer = nn.Linear(3, 3)


class _Broken(nn.Linear):
    def reset_parameters(self) -> None:
        super().reset_parameters()
        raise RuntimeError("not today")


class _BrokenOutside(_Plain):
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            raise RuntimeError("not today")


class _Scaled(nn.Linear):
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.weight.data /= self.weight.norm()


class _Demanding(nn.Linear):
    def reset_parameters(self, scale: float | None = None) -> None:
        super().reset_parameters()

    def _init_weights(self, first: Any, second: Any) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    ("factory", "absent", "present"),
    [
        (_Plain, {"scale"}, {"layer.weight", "layer.bias"}),
        (lambda: _Broken(3, 3), {"weight", "bias"}, set()),
        (_BrokenOutside, {"scale", "layer.weight", "layer.bias"}, set()),
        (lambda: _Scaled(3, 3), {"weight"}, {"bias"}),
        (lambda: _Demanding(3, 3), set(), {"weight", "bias"}),
        (lambda: parametrizations.spectral_norm(nn.Linear(3, 3)), {"parametrizations.weight.original"}, {"bias"}),
        (lambda: nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), {"0.weight", "0.bias"}, {"1.weight", "1.bias"}),
    ],
    ids=["no initialiser", "broken", "broken outside", "by its numbers", "demanding", "parametrised", "lazy"],
)
def test_what_cannot_be_recovered_is_absent(
    factory: Callable[[], nn.Module], absent: set[str], present: set[str]
) -> None:
    try:
        model = factory()
    except RuntimeError:
        model = _Broken.__new__(_Broken)
        nn.Module.__init__(model)
        model.in_features, model.out_features = 3, 3
        model.weight, model.bias = nn.Parameter(torch.rand(3, 3)), nn.Parameter(torch.rand(3))
    found = recover(model)
    assert not absent & found.keys()
    assert present <= found.keys()


class _Remembers(nn.Module):
    """What a user's model may carry: hooks, tensors with a history, and an initialiser that draws from everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.layer.register_forward_hook(lambda *_: None)
        self.last = self.layer(torch.ones(1, 3))
        self.log: list[Any] = [self.last, (self.layer, {"w": self.layer.weight})]

    def reset_parameters(self) -> None:
        random.random()
        np.random.rand()
        torch.rand(3)
        self.last.detach().zero_()
        self.log[0].detach().zero_()
        self.log[1][0].weight.data.normal_(0, 3)
        self.layer.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("factory", [_Remembers, _bert, RECOVERED["linear, conv, norms"], _lora, _Vision])
def test_recovering_touches_nothing(factory: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = factory()
    model.eval()
    before = {
        "state": copy.deepcopy(model.state_dict()),
        "identities": [id(p) for p in model.parameters()],
        "attributes": [set(vars(m)) for m in model.modules()],
        "versions": [p._version for p in (*model.parameters(), *model.buffers())],
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()),  # type: ignore[index]
    }
    last = model.last.clone() if isinstance(model, _Remembers) else None
    recover(model)
    assert all(torch.equal(w, before["state"][key]) for key, w in model.state_dict().items())
    assert [id(p) for p in model.parameters()] == before["identities"]
    assert [set(vars(m)) for m in model.modules()] == before["attributes"]
    assert [p._version for p in (*model.parameters(), *model.buffers())] == before["versions"]
    assert [len(m._forward_hooks) for m in model.modules()] == before["hooks"]
    assert not any(m.training for m in model.modules())
    assert random.getstate() == before["random"][0]
    assert np.random.get_state()[1].tolist() == before["random"][1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before["random"][2])
    if last is not None:
        assert torch.equal(model.last, last)
        assert recover(model)["layer.weight"] == Distribution("normal", 0.0, 3.0)


def test_a_policy_of_stable_baselines3_needs_its_factory() -> None:
    baselines = pytest.importorskip("stable_baselines3")

    def factory() -> nn.Module:
        return baselines.PPO("MlpPolicy", "CartPole-v1", device="cpu", n_steps=8, batch_size=8).policy  # type: ignore[no-any-return]

    model, found = build_and_record(factory)
    gains = {key: found[key].first for key, p in model.named_parameters() if p.dim() == 2}
    assert {found[key].kind for key in gains} == {"orthogonal"}
    assert gains == pytest.approx({
        "mlp_extractor.policy_net.0.weight": math.sqrt(2), "mlp_extractor.policy_net.2.weight": math.sqrt(2),
        "mlp_extractor.value_net.0.weight": math.sqrt(2), "mlp_extractor.value_net.2.weight": math.sqrt(2),
        "action_net.weight": 0.01, "value_net.weight": 1.0,
    })  # fmt: skip
    assert found["value_net.bias"] == Distribution("constant", 0.0)
    for key in gains:
        w = model.get_parameter(key)
        fresh = found[key].draw(noise(), key, elements(w))
        assert fresh.square().sum().item() == pytest.approx(w.square().sum().item(), rel=1e-4)
    assert recover(model)["action_net.weight"].kind == "uniform"
