"""The report of `check`, on models of several kinds, and its command."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import prune

import pytorch2jax
from pytorch2jax import ConversionError, OptionError, __main__ as command, check, torch2jax
from pytorch2jax._check import Cost, Report, _check, _costs, _machine
from pytorch2jax._check._rows import Comparison
from pytorch2jax._check._subject import Subject

ROWS = ["eager", "jit", "grad", "jvp", "second order", "vmap", "per-example gradients", "train mode", "export"]


def statuses(report, engine):
    return {row: cell.status for row, cell in report.works[engine].items()}


def agree(report, engine, *but):
    return {row for row, status in statuses(report, engine).items() if status != "agrees"} == set(but)


def gives(monkeypatch, row, found):
    """Have a row of the table come out like this where torch gives a one, with both engines."""
    arrays = list(map(jnp.asarray, found))
    monkeypatch.setitem(_check.ROWS, row, lambda engine: Comparison(lambda: arrays, lambda: [torch.ones(())]))


@pytest.fixture(autouse=True)
def _float32(x32):
    torch.manual_seed(0)


@pytest.fixture
def few_rows(monkeypatch):
    """For tests of something else than the table."""
    few = ("eager", "jit", "grad", "train mode")
    monkeypatch.setattr(_check, "ROWS", {row: _check.ROWS[row] for row in few})


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(x)))


def residual():
    return nn.Sequential(nn.Conv2d(3, 4, 3), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


class Reads(nn.Module):
    """Cannot be translated: a value decides."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.fc(x) * 2 if x.sum().item() > 0 else self.fc(x)


class Refused(nn.Module):
    """Has a parameter with a hook that JAX would never run."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.fc.weight.register_post_accumulate_grad_hook(lambda p: None)

    def forward(self, x):
        return self.fc(x)


def test_a_recurrent_model(capsys):
    report = check(Recurrent(), torch.randn(3, 5, 4))
    assert list(report.works) == ["torch", "xla"]
    assert list(report.works["torch"]) == ROWS
    assert agree(report, "torch", "export")
    assert agree(report, "xla")
    assert report.found.parameters == sum(p.numel() for p in Recurrent().parameters())
    assert report.found.inputs == ["#0 float32[3, 5, 4]"]
    assert [cost.what for cost in report.costs["torch"]] == ["forward", "value and gradient"]
    assert report.costs["xla"][0].copied_bytes == 0
    assert report.costs["torch"][0].copied_bytes == 3 * 2 * 4
    assert "Take `backend=" in report.advice[0]
    printed = capsys.readouterr().out
    assert printed == report.to_text()
    assert "\x1b" not in printed
    assert not report.differs


def test_a_residual_network():
    report = check(residual(), torch.randn(2, 3, 8, 8), timing=False)
    assert agree(report, "torch", "export")
    assert agree(report, "xla")
    assert report.found.trained_buffers == [
        f"{i}.norm.{name}" for i in (1, 2) for name in ("running_mean", "running_var", "num_batches_tracked")
    ]
    assert not report.costs


def test_a_transformer_with_dropout_and_tied_weights():
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertForMaskedLM(config)
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    report = check(model, input_ids=torch.arange(6).reshape(2, 3), timing=False)
    assert agree(report, "torch", "export")  # masks included, and the second order of fused attention
    assert agree(report, "xla", "train mode")
    assert report.works["xla"]["train mode"].status == "ran"
    assert "random numbers" in report.works["xla"]["train mode"].reason
    assert any("bert.embeddings.word_embeddings.weight" in names for names in report.found.tied)
    assert any("word_embeddings" in name for name in report.found.frozen)
    assert any("draws random numbers in train mode" in note for note in report.found.notes)


def test_a_model_that_reads_values():
    report = check(Reads(), torch.ones(2, 3))
    assert statuses(report, "xla") == {"eager": "refused", "jit": "refused"}
    assert "item()" in report.works["xla"]["jit"].reason
    assert agree(report, "torch", "export")
    assert any(note.startswith("reads values") for note in report.found.notes)
    assert any("attributes that a call changes" in note and "calls" in note for note in report.found.notes)
    assert report.loops  # a batch is a loop
    assert report.advice[0].startswith('Take `backend="torch"`: the other engine does not run')
    assert list(report.costs) == ["torch"]


def test_a_model_that_is_refused():
    report = check(Refused(), torch.ones(2, 3))
    for engine in ("torch", "xla"):
        assert statuses(report, engine) == {"convert": "refused"}
        assert "expected a parameter that torch does not train" in report.works[engine]["convert"].reason
    assert report.found.hooks == {"hooks on gradients": ["fc.weight"]}
    assert report.advice == ["Neither engine runs it; the reasons are above."]
    assert not report.differs


def test_what_is_no_model_and_what_does_not_run():
    with pytest.raises(ConversionError, match="check: expected a torch.nn.Module, got function"):
        check(lambda x: x, 1)
    with pytest.raises(OptionError, match="expected arguments on which the module runs in torch, got RuntimeError"):
        check(nn.Linear(2, 3), torch.ones(2, 7))


def test_a_difference_is_found(monkeypatch):
    gives(monkeypatch, "grad", [1.5])
    report = check(nn.Linear(2, 3), torch.ones(2, 2), timing=False)
    assert report.differs
    cell = report.works["torch"]["grad"]
    assert (cell.status, cell.error) == ("differs", 0.5)
    assert "differs from torch by 5.0e-01, expected 1e-03 at most" in report.to_text()


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([float("nan")], "differs from torch by nan"),
        ([], "expected 1 arrays, got 0"),
        ([[1.0, 1.0]], r"number 0: expected float32[], got float32[2]"),
        ([1], r"number 0: expected float32[], got int32[]"),
    ],
)
def test_a_nan_another_shape_and_another_dtype_are_differences(monkeypatch, found, said, few_rows):
    gives(monkeypatch, "jit", found)
    report = check(nn.Linear(2, 3), torch.ones(2, 2), timing=False)
    assert report.works["xla"]["jit"].status == "differs"
    assert said in report.to_text()


def test_an_interrupt_leaves_what_was_found(monkeypatch, capsys):
    def interrupt(engine):
        raise KeyboardInterrupt

    monkeypatch.setitem(_check.ROWS, "jvp", interrupt)
    report = check(nn.Linear(2, 3), torch.ones(2, 2))
    assert not report.is_complete
    assert list(report.works["torch"]) == ["eager", "jit", "grad"]
    assert "interrupted" in capsys.readouterr().out


class Scaled(nn.Module):
    """Small values, and no parameters."""

    def forward(self, x):
        return {"second": 1e-6 * x.sin(), "first": 1e-9 * x}  # keys that JAX sorts


def test_small_values_outputs_by_name_and_derivatives_of_arguments(monkeypatch):
    report = check(Scaled(), torch.randn(2, 3), timing=False)
    assert agree(report, "torch", "export")
    assert agree(report, "xla")
    row = _check.ROWS["grad"]

    def doubled(engine):
        found, expected = row(engine)
        return Comparison(lambda: [2 * g for g in found()], expected)

    monkeypatch.setitem(_check.ROWS, "grad", doubled)
    cell = check(Scaled(), torch.randn(2, 3), timing=False).works["xla"]["grad"]
    assert (cell.status, round(cell.error, 3)) == ("differs", 1.0)


def test_frozen_models_have_derivatives_of_their_arguments():
    model = nn.Linear(3, 2).requires_grad_(False)
    assert agree(check(model, torch.randn(4, 3), timing=False), "torch", "export")
    report = check(nn.Embedding(3, 2).requires_grad_(False), torch.tensor([0, 2]), timing=False)
    assert report.works["torch"]["grad"].status == "not applicable"


def test_rows_of_padding_in_which_the_two_modes_of_torch_differ():
    report = check(nn.Embedding(5, 2, padding_idx=0), torch.tensor([[0, 2], [3, 4]]), timing=False)
    assert agree(report, "torch", "export")
    assert agree(report, "xla")


def test_masks_of_the_first_engine_are_those_of_torch():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    report = check(model, torch.randn(2, 5, 8), timing=False)
    assert agree(report, "torch", "export")  # second order of fused attention included
    assert agree(report, "xla", "train mode")


# -- interrupts --------------------------------------------------------------------------------------------------------


class Interrupts(nn.Module):
    """Ctrl-C comes while torch runs it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 3)

    def forward(self, x):
        raise KeyboardInterrupt


def test_an_interrupt_before_the_first_cell(capsys):
    report = check(Interrupts(), torch.ones(2, 2))
    assert not report.is_complete
    assert report.found.parameters == 9
    printed = capsys.readouterr().out
    assert printed.startswith("pytorch2jax: Interrupts (interrupted: what was found until then)")
    assert "parameters: 9 numbers" in printed
    assert "largest difference" not in printed
    assert Report.from_dict(json.loads(report.to_json())) == report


def test_an_interrupt_before_anything_is_found(monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(_check, "Subject", interrupt)
    assert not check(nn.Linear(2, 3), torch.ones(2, 2)).is_complete
    printed = capsys.readouterr().out
    assert "interrupted" in printed
    assert "parameters" not in printed


def test_an_interrupt_that_the_garbage_collector_drops(monkeypatch):
    row = _check.ROWS["jit"]

    def dropping(engine):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return row(engine)

    monkeypatch.setitem(_check.ROWS, "jit", dropping)
    handler = signal.getsignal(signal.SIGINT)
    report = check(nn.Linear(2, 3), torch.ones(2, 2))
    assert not report.is_complete
    assert list(report.works["torch"]) == ["eager", "jit"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_it_runs_in_other_threads(few_rows):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(check, nn.Linear(2, 3), torch.ones(2, 2), timing=False).result().is_complete


# -- random numbers ----------------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    """Dropout also in eval mode."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(nn.functional.dropout(x))


class Noisy(nn.Module):
    """Numbers of torch, NumPy and Python."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(x) * torch.randn(2) + float(np.random.rand()) + random.random()


def test_a_model_that_draws_in_eval_mode_is_compared():
    report = check(Dropping(), torch.randn(4, 8), timing=False)
    assert agree(report, "torch", "export")  # whose numbers are those of torch, seeded alike
    assert set(statuses(report, "xla").values()) == {"ran"}
    assert "draws random numbers in eval and train mode: pass keys (`rng=`)" in report.found.notes
    said = report.works["xla"]["grad"].reason
    assert said.startswith("values were not compared, because the model draws random numbers")
    assert said.endswith("two calls with one key are equal")
    assert "ran, not compared" in report.to_text()


def test_numbers_of_numpy_and_python_are_seeded_alike():
    report = check(Noisy(), torch.randn(4, 8), timing=False)
    assert agree(report, "torch", "export")
    assert any(note.startswith("draws numbers of NumPy's or Python's") for note in report.found.notes)


@pytest.mark.parametrize("row", ["jit", "train mode"])
def test_two_calls_with_one_key_that_differ(monkeypatch, row, few_rows):
    made = iter(range(100))
    monkeypatch.setitem(
        _check.ROWS, row, lambda engine: Comparison(lambda: [jnp.float32(next(made))], lambda: [torch.ones(())])
    )
    report = check(Dropping(), torch.ones(2, 8), timing=False)
    assert report.works["xla"][row].status == "differs"
    assert f"xla, {row}: two calls with one key differ" in report.to_text()


def test_random_numbers_of_another_shape_or_dtype(monkeypatch, few_rows):
    gives(monkeypatch, "jit", [[1.0, 1.0]])
    gives(monkeypatch, "eager", [1])
    report = check(Dropping(), torch.ones(2, 8), timing=False)
    assert report.works["xla"]["jit"].reason == "differs from torch: number 0: expected float32[], got float32[2]"
    assert report.works["xla"]["eager"].reason == "differs from torch: number 0: expected float32[], got int32[]"


def test_the_generators_are_left_alone(few_rows):
    model = nn.Sequential(nn.LazyLinear(8), Noisy())
    before = _machine.generators()
    check(model, torch.ones(2, 3), timing=False)
    assert _machine.generators() == before


# -- weights without values, lazy modules ------------------------------------------------------------------------------


def test_weights_without_values():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with pytest.raises(
        ConversionError, match=r"0.weight \(and 3 more\): expected weights with values, got .* meta"
    ) as e:
        check(model, torch.ones(4, 3))
    assert "load_state_dict(weights, assign=True)" in str(e.value)
    with pytest.raises(OptionError, match="Linear: #0: expected an argument with values"):
        check(nn.Linear(3, 2), torch.empty(4, 3, device="meta"))


def test_a_lazy_module_is_tried_on_a_copy():
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    report = check(model, torch.randn(4, 3), timing=False)
    assert agree(report, "torch", "export")
    assert agree(report, "xla")
    made = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert report.found.made[:4] == made
    assert report.found.parameters == 18
    assert "made by the first call, here that of a copy: 0.weight, 0.bias, 1.weight, 1.bias" in report.to_text()
    assert report.advice[0].startswith("Call the model once in torch before you convert it")
    assert model[0].weight.__class__ is nn.UninitializedParameter
    assert not report.found.hooks  # that of the lazy modules is gone after the call


class MakesItself(nn.Module):
    """Makes its weight in its first call."""

    def __init__(self):
        super().__init__()
        self.register_parameter("weight", None)

    def forward(self, x):
        if self.weight is None:
            self.weight = nn.Parameter(torch.ones(x.shape[-1]))
        return x * self.weight


def test_parameters_that_the_first_call_makes(few_rows):
    model = MakesItself()
    report = check(model, torch.randn(4, 3), timing=False)
    assert report.found.made == ["weight"]
    assert agree(report, "xla")
    assert model.weight is None


# -- hooks, state, precision -------------------------------------------------------------------------------------------


def test_hooks_are_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    model[0].register_forward_hook(lambda module, args, out: 2 * out)
    model[1][1].register_forward_pre_hook(lambda module, args: None)
    model[1].register_full_backward_hook(lambda module, given, got: None)
    model[1][0].register_full_backward_pre_hook(lambda module, got: None)
    model.register_forward_hook(lambda module, args, out: None)
    model[0].weight.register_hook(lambda gradient: 2 * gradient)
    report = check(model, torch.randn(4, 3), timing=False)
    assert report.found.hooks == {
        "forward hooks": ["", "0"],
        "forward pre-hooks": ["1.1"],
        "backward hooks": ["1", "1.0"],
        "hooks on gradients": ["0.weight"],
    }
    assert "forward hooks: the model, 0\nforward pre-hooks: 1.1\nbackward hooks: 1, 1.0\n" in report.to_text()
    assert agree(report, "torch", "export")  # gradients by the hooks, too, which copies in torch do not have
    assert statuses(report, "xla") == {"convert": "refused"}
    assert "0.weight" in report.works["xla"]["convert"].reason


class Counts(nn.Module):
    """Has a state, also in eval mode."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.fc(x) * self.calls


def test_what_one_call_changes_the_next_one_does_not_see():
    model = Counts()
    report = check(model, torch.randn(4, 3), timing=False)
    assert agree(report, "torch", "export")
    assert agree(report, "xla")
    assert model.calls == 0


class Holds(nn.Module):
    """Has an attribute whose text is another one in each copy."""

    def __init__(self):
        super().__init__()
        self.fc, self.helper = nn.Linear(3, 2), object()

    def forward(self, x):
        return self.fc(x)


def test_attributes_that_copies_have_of_their_own_are_not_changed_by_a_call(few_rows):
    assert not check(Holds(), torch.ones(2, 3), timing=False).found.notes


WAYS = ('jax.config.update("jax_enable_x64", True)', "JAX_ENABLE_X64=1", "model.float()")


def test_double_precision_while_jax_has_none():
    report = check(nn.Linear(3, 2).double(), torch.ones(4, 3, dtype=torch.float64), timing=False)
    assert statuses(report, "torch")["jit"] == "refused"
    assert statuses(report, "xla")["jit"] == "refused"
    for way in WAYS:
        assert way in report.works["torch"]["jit"].reason
        assert way in report.works["xla"]["jit"].reason
    assert "Traceback" not in report.to_text()
    assert "double precision, rounded to single while `jax_enable_x64` is off: weight and 2 more" in report.found.notes


def test_double_precision_that_runs_in_single_is_compared_as_that():
    report = check(nn.Embedding(5, 3).double(), torch.arange(4), timing=False)
    assert agree(report, "torch", "export")
    assert report.works["torch"]["jit"].tolerance == 1e-4


def test_double_precision_with_jax_in_double():
    with jax.enable_x64(True):
        report = check(nn.Linear(3, 2).double(), torch.ones(4, 3, dtype=torch.float64), timing=False)
    assert agree(report, "xla")
    assert report.works["torch"]["jit"].tolerance == 1e-9
    assert not report.found.notes


def test_arguments_of_another_precision_than_the_parameters():
    with pytest.raises(OptionError, match="arguments are float64, the parameters float32: convert the ones"):
        check(nn.Linear(3, 2), torch.ones(4, 3, dtype=torch.float64))


# -- derivatives that somebody has written -----------------------------------------------------------------------------


class _Sign(torch.autograd.Function):
    """Of a straight-through estimator: the derivative is that of the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class _Odd(torch.autograd.Function):
    """A product, with gradients that are those of no function: their derivative is not symmetric."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        return gradient * y * y, gradient * x


class Straight(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(_Sign.apply(self.first(x)))


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.x, self.y = nn.Parameter(torch.tensor([2.0, 3.0])), nn.Parameter(torch.tensor([5.0, 7.0]))

    def forward(self):
        return _Odd.apply(self.x, self.y)


@pytest.mark.parametrize("engine", ["torch", "xla"])
def test_a_straight_through_derivative_is_compared_with_double_backward(engine):
    report = check(Straight(), torch.randn(5, 3), timing=False)
    assert report.works[engine]["second order"].status == "agrees"


@pytest.mark.parametrize("engine", ["torch", "xla"])
def test_second_order_of_gradients_that_are_those_of_no_function(engine):
    cell = check(Odd(), timing=False).works[engine]["second order"]
    assert cell.status == "agrees", cell.reason


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient


class Once(Straight):
    def forward(self, x):
        return self.last(_Once.apply(self.first(x)))


def test_second_order_that_torch_does_not_have():
    report = check(Once(), torch.randn(5, 3), timing=False)
    cell = report.works["torch"]["second order"]
    assert cell.status == "not applicable"
    assert cell.reason.startswith("torch itself fails here: a backward pass is marked `once")
    assert report.works["xla"]["second order"].status == "ran"
    assert report.works["torch"]["grad"].status == "agrees"


def test_what_torch_itself_does_not_run(monkeypatch):
    def fails():
        raise ValueError("not today")

    row = _check.ROWS["vmap"]
    monkeypatch.setitem(_check.ROWS, "vmap", lambda engine: row(engine)._replace(expected=fails))
    cell = check(nn.Linear(3, 2), torch.randn(5, 3), timing=False).works["torch"]["vmap"]
    assert (cell.status, cell.reason) == ("ran", "torch itself fails here: not today")


# -- what it costs -----------------------------------------------------------------------------------------------------


def test_bytes_copied_by_a_gradient_are_counted(few_rows):
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    forward, gradient = check(model, x).costs["torch"]
    outputs, arguments, parameters = 4 * 2 * 4, 4 * 3 * 4, 8 * 4
    assert forward.copied_bytes == outputs
    assert (
        gradient.copied_bytes == outputs + outputs + arguments + parameters
    )  # the output's gradient and all gradients


def test_bytes_copied_in_loops_are_counted_as_often():
    call = torch2jax(torch.sin)
    jaxpr = jax.make_jaxpr(lambda x: jax.lax.scan(lambda carry, _: (call(carry), None), x, None, length=5))(jnp.ones(3))
    assert _costs.copied_bytes(jaxpr.jaxpr) == 5 * 3 * 4


def test_large_gradients_are_not_copied(few_rows):
    model = nn.Linear(1000, 1000, bias=False)
    assert check(model, torch.randn(2, 1000)).costs["torch"][1].copied_bytes < 10**5


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_memory_is_measured():
    if jax.default_backend() != "cpu":
        pytest.skip("the memory of the host")
    one = 1 << 24

    def run():
        x, y = np.ones(one, np.uint8), np.ones(one, np.uint8)
        return x + y

    run()  # what it frees here goes back to the system before the next call
    peak = _machine.peak_bytes(run)
    if peak is None:
        pytest.skip("the system does not tell")
    assert 2.5 * one < peak < 3.5 * one


def test_a_peak_that_is_not_set_back_is_not_measured(monkeypatch):
    monkeypatch.setattr(_machine, "_memory", {"VmHWM": 10**9, "VmRSS": 10**8}.__getitem__)
    assert _machine.peak_bytes(lambda: None) is None
    cost = Cost("forward", 1.0, 1.0, 1.0, peak_bytes=None, copied_bytes=None)
    text = Report("Linear", torch_seconds={"forward": 1.0}, costs={"torch": [cost]}).to_text()
    assert text.count("not measured") == 2
    cost.peak_bytes = 0
    assert "under 4 kB" in Report("Linear", torch_seconds={"forward": 1.0}, costs={"torch": [cost]}).to_text()


def test_what_torch_itself_does_not_run_costs_nothing(monkeypatch, few_rows):
    def fails(*args, **kwargs):
        raise ValueError("not today")

    monkeypatch.setattr(Subject, "gradients", fails)
    report = check(nn.Linear(2, 3), torch.ones(2, 2))
    assert report.works["xla"]["grad"].status == "ran"
    assert [cost.what for cost in report.costs["xla"]] == ["forward"]


def test_a_busy_machine_is_said_to_be_one(monkeypatch, few_rows):
    monkeypatch.setattr(_machine, "load_average", lambda: (7.9, 2))
    monkeypatch.setattr(_machine, "scatter", lambda times: 0.8)
    report = check(nn.Linear(2, 3), torch.ones(2, 2))
    assert report.busy == "the machine is busy: load 7.9 on 2 cores, times of one computation scatter by 80%"
    assert "what it costs; rough figures: the machine is busy: load 7.9" in report.to_text()
    assert "rough figures" in report.to_markdown()


def test_a_quiet_machine(monkeypatch, few_rows):
    monkeypatch.setattr(_machine, "load_average", lambda: (0.4, 2))
    monkeypatch.setattr(_machine, "scatter", lambda times: 0.1)
    report = check(nn.Linear(2, 3), torch.ones(2, 2))
    assert report.busy == ""
    assert "rough" not in report.to_text()


def test_ratios_in_a_few_characters():
    def short(ratio):
        return Cost("forward", 1.0, ratio, 1.0, None, None).short_ratio()

    assert [short(12.345), short(0.123), short(0.0123)] == ["12.35", "0.12", "0.01"]
    assert short(0.00123) == "0.001"


def test_scatter():
    assert _machine.scatter([1.0]) == 0
    assert _machine.scatter([1.0, 1.0, 1.0, 9.0]) == pytest.approx(2.0)
    assert _machine.why_rough((2.0, 2), [0.5]) == ""
    assert _machine.why_rough((1.1, 1), []) == "the machine is busy: load 1.1 on 1 core"


# -- odd models, arguments and outputs ---------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Takes and returns containers of all sorts."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, batch, mode="sum", *, mask=None, shift=(0.0, None)):
        hidden = self.fc(batch["x"]) * mask + shift[0]
        numbers = (batch["pair"][0] + 1, [hidden.mean(), 3.5])
        return {"hidden": hidden, "n": len(hidden), "mode": mode, "none": None, "of": numbers, "np": np.arange(3)}


def test_containers_numbers_strings_and_none(capsys):
    batch = {"x": torch.randn(4, 3), "pair": (torch.arange(4), None)}
    report = check(Mixed(), batch, "mean", mask=torch.ones(4, 1), shift=(0.5, None), timing=False)
    assert agree(report, "torch", "export")
    assert agree(report, "xla")
    assert report.found.inputs == ["#0['pair'][0] int64[4]", "#0['x'] float32[4, 3]", "mask float32[4, 1]"]
    assert "output['n'] int64[]" in report.found.outputs
    assert "returns what is no array, to be left out under `jax.jit`: output['mode']" in report.found.notes


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(3, dtype=torch.complex64)), nn.Parameter(torch.randn(3))

    def forward(self, x, z):
        return torch.fft.fft(x * self.v) * self.w * z


def test_complex_numbers_have_derivatives(monkeypatch):
    arguments = torch.randn(4, 3), torch.randn(3, dtype=torch.complex64)
    report = check(Complex(), *arguments, timing=False)
    assert agree(report, "torch", "export")
    assert agree(report, "xla")
    row = _check.ROWS["grad"]

    def conjugated(engine):
        found, expected = row(engine)
        return Comparison(lambda: [g.conj() for g in found()], expected)

    monkeypatch.setitem(_check.ROWS, "grad", conjugated)
    assert check(Complex(), *arguments, timing=False).works["xla"]["grad"].status == "differs"


class Integers(nn.Module):
    def forward(self, x):
        return x.argmax(-1), x > 0


def test_without_floating_outputs_there_is_nothing_to_differentiate():
    report = check(Integers(), torch.randn(4, 3))
    for row in ("grad", "jvp", "second order", "per-example gradients"):
        assert report.works["xla"][row].status == "not applicable"
        assert report.works["xla"][row].reason == "it has no floating outputs"
    assert [cost.what for cost in report.costs["xla"]] == ["forward"]


def test_an_empty_batch():
    assert agree(check(nn.Linear(3, 2), torch.ones(0, 3), timing=False), "xla")


class OwnKeywords(nn.Module):
    def forward(self, x, train=False, rng=None):
        return x * 2 if train else x


def test_arguments_with_the_names_of_keywords_of_the_library():
    report = check(OwnKeywords(), torch.randn(4, 3), train=True, timing=False)
    assert agree(report, "xla")
    assert "`forward` has arguments of its own named rng and train: pass `prefix=`" in report.found.notes


class Differentiates(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 1)

    def forward(self, x):
        x = x.requires_grad_()
        return torch.autograd.grad(self.fc(x).tanh().sum(), x, create_graph=True)[0]


def test_a_model_that_differentiates_itself():
    assert agree(check(Differentiates(), torch.randn(4, 3), timing=False), "torch", "export")


def test_a_model_with_tensors_that_torch_does_not_copy(few_rows):
    model = nn.Linear(3, 2)
    prune.l1_unstructured(model, "weight", 1)
    report = check(model, torch.randn(4, 3), timing=False)
    assert agree(report, "xla")
    assert report.found.hooks == {"forward pre-hooks": [""]}


def test_train_mode_in_which_torch_itself_fails(few_rows):
    report = check(nn.BatchNorm1d(3), torch.randn(1, 3), timing=False)
    cell = report.works["torch"]["train mode"]
    assert cell.status == "not applicable"
    assert cell.reason.startswith("torch itself fails here: Expected more than 1 value per channel")
    assert report.found.trained_buffers == ["running_mean", "running_var", "num_batches_tracked"]


class Ignores(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x, *rest):
        return self.fc(x)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (np.array(["a"]), "Ignores: #1: expected an array of numbers, got ndarray of dtype <U1"),
        (jax.random.key(0), "Ignores: #1: expected an array of numbers, got PRNGKeyArray of dtype key<fry>"),
        (torch.eye(2).to_sparse(), "Ignores: #1: expected a dense tensor, got a tensor of layout torch.sparse_coo"),
    ],
)
def test_arguments_that_jax_does_not_have(argument, said):
    with pytest.raises(OptionError, match=said):
        check(Ignores(), torch.randn(4, 3), argument)


def test_no_advice_to_take_an_engine_that_differs(monkeypatch, few_rows):
    def differs_in_xla(engine):
        return Comparison(lambda: [jnp.float32(1 if engine.backend == "torch" else 2)], lambda: [torch.ones(())])

    monkeypatch.setitem(_check.ROWS, "grad", differs_in_xla)
    advice = check(nn.Linear(2, 3), torch.ones(2, 2), timing=False).advice
    assert advice[0] == 'Take care with `backend="xla"`: grad should not differ. Please report it.'
    assert advice[1] == 'Take `backend="torch"`: the other engine differs from torch.'
    gives(monkeypatch, "jit", [1.5])
    advice = check(nn.Linear(2, 3), torch.ones(2, 2), timing=False).advice
    assert advice == ["It runs, and gives other values than torch, which should not be: please report it."]


# -- the report ------------------------------------------------------------------------------------------------------


def test_json_and_markdown(few_rows):
    report = check(nn.Linear(2, 3), torch.ones(2, 2))
    assert Report.from_dict(json.loads(report.to_json())) == report
    markdown = report.to_markdown()
    assert "| grad | " in markdown
    assert "| forward | torch |" in markdown


# -- the command -----------------------------------------------------------------------------------------------------

FACTORIES = """
import torch
from torch import nn

def model(): return nn.Linear(2, 3), (torch.ones(2, 2),)
def with_keywords(): return nn.Linear(2, 3), (), {"input": torch.ones(2, 2)}
def one(): return nn.Linear(2, 3), torch.ones(2, 2)
def number(): return 3
def fails(): raise ValueError("no weights")
def listed(): return [nn.Linear(2, 3), torch.ones(2, 2)]
def keywords_as_dict(): return nn.Linear(2, 3), {"input": torch.ones(2, 2)}
def chatty():
    print("not for the report")
    return model()
class Timed(nn.Module):
    def forward(self, x, timing, model): return x
def timed(): return Timed(), (torch.ones(2),), {"timing": 1, "model": 2}
def interrupted(): raise KeyboardInterrupt
def drops():
    import contextlib, signal
    with contextlib.suppress(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)
    return model()
def no_arguments(): return nn.Linear(2, 3)
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "factories", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["factories.py:model", "factories:with_keywords", "factories:one", "factories:listed"])
def test_the_command(factories, name, capsys, few_rows):
    assert command.main(["check", name, "--no-timing"]) == 0
    assert "pytorch2jax: Linear" in capsys.readouterr().out


def test_the_command_writes(factories, capsys, few_rows):
    assert command.main(["check", "factories:model", "--no-timing", "--json", "--markdown", "report.md"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "Linear"
    assert (factories / "report.md").read_text().startswith("## pytorch2jax: Linear")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("factories", "expected module:function"),
        ("nowhere:model", "No module named"),
        ("nowhere.py:model", "FileNotFoundError"),
        ("factories:nothing", "has no attribute 'nothing'"),
        ("factories:fails", "ValueError: no weights"),
        ("factories:number", "expected a function that returns a torch module"),
        ("factories:keywords_as_dict", "(For keyword arguments: `return model, (), {...}`.)"),
        ("factories:no_arguments", "expected arguments on which the module runs"),
    ],
)
def test_the_command_on_what_is_no_model(factories, name, said, capsys):
    assert command.main(["check", name]) == 2
    assert said in capsys.readouterr().err


def test_only_the_report_is_on_standard_output(factories, capsys, few_rows):
    assert command.main(["check", "factories:chatty", "--no-timing", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["model"] == "Linear"
    assert printed.err == "not for the report\n"


def test_arguments_with_the_names_of_those_of_check(factories, capsys, few_rows):
    assert command.main(["check", "factories:timed", "--no-timing"]) == 0
    assert check(nn.Linear(2, 3), input=torch.ones(2, 2), timing=False).found.inputs == ["input float32[2, 2]"]


def test_a_file_that_imports_its_neighbour(factories, tmp_path_factory, capsys, few_rows):
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "neighbour_of_json.py").write_text("from factories_there import model")
    (folder / "factories_there.py").write_text(FACTORIES)
    (folder / "json.py").write_text("from neighbour_of_json import model")
    assert command.main(["check", f"{folder / 'json.py'}:model", "--no-timing"]) == 0
    assert sys.modules["json"] is json


def test_where_a_report_cannot_be_written(factories, capsys, few_rows):
    assert command.main(["check", "factories:model", "--json", "nowhere/report.json"]) == 2
    assert "nowhere/report.json: expected a file in a folder that exists" in capsys.readouterr().err
    assert command.main(["check", "factories:model", "--no-timing", "--json", "."]) == 2
    assert "expected a file that can be written" in capsys.readouterr().err


def test_a_factory_that_is_taken_for_a_file(factories, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["check", "--json", "factories:model"])
    assert "expected a factory (module:function), before `--json`" in capsys.readouterr().err


def test_the_status_of_a_difference(factories, monkeypatch):
    gives(monkeypatch, "grad", [1.5])
    assert command.main(["check", "factories:model", "--no-timing"]) == 1


def test_the_status_of_an_interrupt(factories, monkeypatch, capsys):
    def interrupt(engine):
        raise KeyboardInterrupt

    monkeypatch.setitem(_check.ROWS, "jit", interrupt)
    assert command.main(["check", "factories:model", "--no-timing", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["is_complete"] is False
    gives(monkeypatch, "eager", [1.5])
    assert command.main(["check", "factories:model", "--no-timing"]) == 1


@pytest.mark.parametrize("name", ["interrupted", "drops"])
def test_an_interrupt_before_there_is_a_model(factories, name, capsys):
    assert command.main(["check", f"factories:{name}"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_command_in_a_process_of_its_own(factories):
    run = subprocess.run(
        [sys.executable, "-m", "pytorch2jax", "check", "factories:model", "--no-timing"],
        capture_output=True, text=True, check=False, env=None,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "largest difference from torch" in run.stdout


def test_it_is_found_under_its_name():
    assert pytorch2jax.check is check
