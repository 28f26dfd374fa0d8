"""The report of `check`, on models of several kinds, and its command."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

import pytorch2jax
from pytorch2jax import ConversionError, OptionError, check
from pytorch2jax import __main__ as command
from pytorch2jax._check import Report, _check

ROWS = ["eager", "jit", "grad", "jvp", "second order", "vmap", "per-example gradients", "train mode", "export"]


def statuses(report, engine):
    return {row: cell.status for row, cell in report.works[engine].items()}


def agree(report, engine, *but):
    return {row for row, status in statuses(report, engine).items() if status != "agrees"} == set(but)


@pytest.fixture(autouse=True)
def _float32(x32):
    torch.manual_seed(0)


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

    def __deepcopy__(self, memo):
        new = Refused()
        new.fc.weight.register_post_accumulate_grad_hook(lambda p: None)
        return new

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
    assert report.advice == ["Neither engine runs it; the reasons are above."]
    assert not report.differs


def test_what_is_no_model_and_what_does_not_run():
    with pytest.raises(ConversionError, match="check: expected a torch.nn.Module, got function"):
        check(lambda x: x, 1)
    with pytest.raises(OptionError, match="expected arguments on which the module runs in torch, got RuntimeError"):
        check(nn.Linear(2, 3), torch.ones(2, 7))


def test_a_difference_is_found(monkeypatch):
    monkeypatch.setitem(_check._ROWS, "grad", lambda engine: ([1.5], [torch.ones(())]))
    report = check(nn.Linear(2, 3), torch.ones(2, 2), timing=False)
    assert report.differs
    cell = report.works["torch"]["grad"]
    assert (cell.status, cell.error) == ("differs", 0.5)
    assert "differs from torch by 5.0e-01, expected 1e-03 at most" in report.to_text()


def test_two_calls_with_one_key_that_differ(monkeypatch):
    monkeypatch.setattr(_check, "largest_difference", lambda found, expected: 1.0)
    report = check(nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5)), torch.ones(2, 2), timing=False)
    assert report.works["xla"]["train mode"].status == "differs"


@pytest.mark.parametrize("found", [[float("nan")], [], [[1.0, 1.0]]])
def test_a_nan_and_another_shape_are_differences(monkeypatch, found):
    monkeypatch.setitem(_check._ROWS, "jit", lambda engine: (found, [torch.ones(())]))
    assert check(nn.Linear(2, 3), torch.ones(2, 2), timing=False).works["xla"]["jit"].status == "differs"


def test_an_interrupt_leaves_what_was_found(monkeypatch, capsys):
    def interrupt(engine):
        raise KeyboardInterrupt

    monkeypatch.setitem(_check._ROWS, "jvp", interrupt)
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
    row = _check._ROWS["grad"]
    monkeypatch.setitem(_check._ROWS, "grad", lambda engine: ([2 * g for g in row(engine)[0]], row(engine)[1]))
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


def test_json_and_markdown():
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
def no_arguments(): return nn.Linear(2, 3)
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "factories", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["factories.py:model", "factories:with_keywords", "factories:one"])
def test_the_command(factories, name, capsys):
    assert command.main(["check", name, "--no-timing"]) == 0
    assert "pytorch2jax: Linear" in capsys.readouterr().out


def test_the_command_writes(factories, capsys):
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
        ("factories:no_arguments", "expected arguments on which the module runs"),
    ],
)
def test_the_command_on_what_is_no_model(factories, name, said, capsys):
    assert command.main(["check", name]) == 2
    assert said in capsys.readouterr().err


def test_the_status_of_a_difference(factories, monkeypatch):
    monkeypatch.setitem(_check._ROWS, "grad", lambda engine: ([1.5], [torch.ones(())]))
    assert command.main(["check", "factories:model", "--no-timing"]) == 1


def test_the_command_in_a_process_of_its_own(factories):
    run = subprocess.run(
        [sys.executable, "-m", "pytorch2jax", "check", "factories:model", "--no-timing"],
        capture_output=True, text=True, check=False, env=None,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "largest difference from torch" in run.stdout


def test_it_is_found_under_its_name():
    assert pytorch2jax.check is check
