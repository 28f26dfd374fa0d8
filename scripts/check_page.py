"""Write docs/check.md: what `check` prints for five models.

python scripts/check_page.py
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from torch import nn

from pytorch2jax import check

PAGE = Path(__file__).resolve().parent.parent / "docs" / "check.md"

INTRODUCTION = """# check: does my model fit?

```
report = pytorch2jax.check(model, *args, **kwargs)
python -m pytorch2jax check file.py:factory        # or module:factory
```

`check` runs a torch module through both engines and every transformation, compares with what torch itself
gives, measures, prints a report, and returns it as a dataclass (`report.to_json()`, `report.to_markdown()`).
Neither the model nor the random generators are changed: `check` works on a copy.

The factory of the command returns a model and its example arguments: `model, (x,)`, or `model, (x,), {"mask":
m}`. `--json` and `--markdown` write the report, to a file if one is named; `--no-timing` leaves the
measurements out.

| exit status | |
|---|---|
| 0 | nothing differs from torch |
| 1 | something differs from torch |
| 2 | the model cannot be made or run |
| 130 | Ctrl-C; the report has what was found until then (in Python: `report.is_complete`) |

## How to read it

- A number in the table is the largest difference from torch, relative to the largest value.
- *ran, not compared*: torch has no values to compare with, and a line below says why. A model that draws random numbers
  is compared with the first engine, because torch is then seeded alike. The second engine draws from JAX's key: its
  shapes and dtypes are compared with torch's, and two calls with one key with each other.
- *refused*: an error, whose message follows. *not applicable*: there is no such thing for this model or engine, or
  torch itself fails there.
- Derivatives are those of one number that is made of all floating and complex outputs. Second order is forward over
  reverse mode, or reverse over reverse for gradients that somebody has written by hand; torch's is double backward.
- *beside torch* is the median of the ratios within a round. The gradients of each engine are those of the same number
  as torch's.
- *memory* is by how much the process grows in a call at most, in pages of 4 kB; only Linux tells, and only on the CPU.
- *copied* is what a call copies between the frameworks.
- *rough figures*: the machine was busy (more processes than cores before the start, or times that scatter).

The reports on five models, on two cores of a CPU:
"""


class Recurrent(nn.Module):
    """An LSTM and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(64, 128, 2, batch_first=True), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Reads(nn.Module):
    """A model that reads a value."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if x.abs().max().item() < 10 else self.fc(x / 10)


class Hooked(nn.Module):
    """A model with a hook that JAX would never run."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(32))
        self.weight.register_post_accumulate_grad_hook(lambda parameter: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def _models() -> dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    bert = transformers.BertConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    resnet = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic")
    return {
        "BERT, from a small configuration": (transformers.BertModel(bert), (torch.arange(1, 33).reshape(2, 16),)),
        "A ResNet": (transformers.ResNetForImageClassification(resnet), (torch.randn(2, 3, 32, 32),)),
        "An LSTM": (Recurrent(), (torch.randn(8, 32, 64),)),
        "A model that reads a value": (Reads(), (torch.randn(4, 32),)),
        "A model that is refused": (Hooked(), (torch.randn(4, 32),)),
    }


def main() -> None:
    """Write the page."""
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    parts = [INTRODUCTION]
    for title, (model, args) in _models().items():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(model, *args)
        parts.append(f"## {title}\n\n```\n{printed.getvalue()}```\n")
        print(title)
    PAGE.write_text("\n".join(parts).replace(f"{PAGE.parent.parent}/", ""))  # paths as in the repository


if __name__ == "__main__":
    main()
