"""The schedules against the numbers of "The Era of 1-bit LLMs: Training Tips, Code and FAQ"; what decays."""

import pytest
import torch

from tritkit.models.config import ModelConfig
from tritkit.models.transformer import build
from tritkit.optim import OptimConfig, make_optimizer, set_step

T = 100_000  # the paper's run: 100k steps, 1.5e-3 then 1e-3, warm-up 375


def test_two_stage_numbers_of_the_paper():
    o = OptimConfig(lr=1.5e-3, lr_2=1e-3)
    assert o.lr_at(0, T) == pytest.approx(1.5e-3 / 375)
    assert o.lr_at(187, T) == pytest.approx(188 / 375 * 1.5e-3 * (1 - 187 / T))
    assert o.lr_at(374, T) == pytest.approx(1.5e-3 * (1 - 374 / T))
    assert o.lr_at(T // 4, T) == pytest.approx(1.125e-3)
    assert o.lr_at(T // 2 - 1, T) == pytest.approx(7.5e-4, rel=1e-4)
    assert o.lr_at(T // 2, T) == pytest.approx(5e-4)  # the line of the lower peak, no restart at it
    assert o.lr_at(3 * T // 4, T) == pytest.approx(2.5e-4)
    assert o.lr_at(T - 1, T) == pytest.approx(1e-8)
    assert o.lr_at(T, T) == 0
    assert [o.weight_decay_at(s, T) for s in (0, T // 2 - 1, T // 2, T - 1)] == [0.1, 0.1, 0.0, 0.0]


def test_second_peak_is_two_thirds_by_default():
    assert OptimConfig(lr=1.5e-3).lr_at(T // 2, T) == pytest.approx(5e-4)
    assert OptimConfig(lr=3e-3).lr_at(T // 2, T) == pytest.approx(1e-3)


def test_linear_is_one_line_with_constant_decay():
    o = OptimConfig(schedule="linear", lr=2.5e-4)
    for step in (375, T // 2 - 1, T // 2, T - 1):
        assert o.lr_at(step, T) == pytest.approx(2.5e-4 * (1 - step / T))
        assert o.weight_decay_at(step, T) == 0.1


def test_rates_fall_after_the_warm_up_and_an_odd_number_of_steps_has_a_midpoint():
    for schedule in ("two-stage", "linear"):
        o = OptimConfig(schedule=schedule, warmup_steps=10)
        rates = [o.lr_at(s, 101) for s in range(101)]
        assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True) and min(rates) > 0
    o = OptimConfig()
    assert [o.second_stage(s, 101) for s in (50, 51)] == [False, True]
    assert OptimConfig(warmup_steps=0).lr_at(0, T) == 1.5e-3


@pytest.mark.parametrize(
    ("changes", "message"), [({"schedule": "cosine"}, "cosine"), ({"lr": 0.0}, "lr"), ({"lr": -1.0}, "lr")]
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**changes)


def model():
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    return build(ModelConfig(weights="ternary", activations="a8", **sizes), seed=0)


def test_only_the_weights_of_linears_decay():
    m = model()
    optimizer = make_optimizer(m, OptimConfig())
    names = {id(p): n for n, p in m.named_parameters()}
    decayed, rest = ({names[id(p)] for p in g["params"]} for g in optimizer.param_groups)
    assert decayed == {f"{name}.weight" for name in m.linears()}
    assert rest == {n for n, p in m.named_parameters() if "norm" in n or "embed" in n}
    assert decayed | rest == set(names.values())


def test_one_step_with_no_gradient_shrinks_linears_by_lr_times_decay():
    m, o = model(), OptimConfig(warmup_steps=0)
    optimizer = make_optimizer(m, o)
    before = {n: p.detach().clone() for n, p in m.named_parameters()}
    for p in m.parameters():
        p.grad = torch.zeros_like(p)
    assert set_step(optimizer, o, 10, 100) == o.lr_at(10, 100)
    optimizer.step()
    shrunk = 1 - o.lr_at(10, 100) * 0.1
    for name, p in m.named_parameters():
        linear = "_proj" in name
        torch.testing.assert_close(p.detach(), before[name] * (shrunk if linear else 1.0), rtol=1e-6, atol=0)
    set_step(optimizer, o, 50, 100)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.0]
