"""DEFault++ as published (package ``defaultplusplus`` 0.4.1), on runs of the fault benchmark.

Its `FeatureExtractor` sits in our training loop as its own documentation says: `step` after each
forward and backward pass and before the optimizer's step, `epoch_end` and `record_validation` after
each tenth of the run (its windows are thirds of the epochs, its example has ten; a run here is not
two epochs long). The features go through its `RuntimeNormalizer` (``mode="raw"``) to its
`load_pretrained` predictor. The shorter form of its README, ``predict(finalize())``, always raises
ValueError, since features that its own extractor makes are not in the schema of its own weights.

It asks for a Hugging Face model, so a subject's model is shown to it with the configuration, the
attention weights and the hidden states that such a model has (`Shown`). Nothing of the training
changes: its forward passes happen with the random numbers and the training modes put back. What it
refuses (encoder-decoder models, models of one block) is a row with the status ``refused``; where it
breaks, one with ``failed``; both say where. A feature is *filled* where the extractor gives its
name, and *zero* where the value is exactly 0, which is also what the extractor writes for what it
did not measure.

Its model was learned from the fine-tuning of large models, so that a small model trained from
scratch is far from all that it knows: a learning rate of 4e-3 is 1700 of its standard deviations
away. ``clipped_probability`` says what it would answer without that: every value is brought to
within three standard deviations of its own healthy reference, and what is zero is taken from there.

Run it with ``python -m benchmarks.defaultplusplus``. It installs nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import io
import math
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from diagnoser.benchmark.configuration import Catalogue, catalogue
from diagnoser.benchmark.dataset import Truth
from diagnoser.benchmark.harm import OK
from diagnoser.benchmark.plan import CLEAN, Item, make_plan
from diagnoser.benchmark.results import write_whole
from diagnoser.benchmark.scoring import Verdict
from diagnoser.errors import BenchmarkError, DiagnoserError
from diagnoser.injection import Training, assemble, train
from diagnoser.injection.training import TARGETS, Batch

PACKAGE: Final = "defaultplusplus"
VERSION: Final = "0.4.1"
NEEDED: Final = ("pandas", "scipy", "sklearn")  # of what it depends on, what is used here
SUBJECTS: Final = ("video", "seq2seq", "series", "distilbert")
ROLES: Final = ("clean", "fault", "compound", "HC2", "HC3", "HC4")
CLEAN_SEEDS: Final = 6
PARTS: Final = 10  # of a run, each an epoch to the tool
CLIP: Final = 3.0  # standard deviations of its healthy reference
REFUSED, FAILED = "refused", "failed"
SHARES: Final = ("filled", "zeros")  # of the features that its model wants

Row = dict[str, Any]

SCHEMA: Final = pa.schema(
    [
        ("hash", pa.string()),
        ("subject", pa.string()),
        ("recipe", pa.string()),
        ("role", pa.string()),
        ("operator", pa.string()),
        ("severity", pa.string()),
        ("place", pa.string()),
        ("seed", pa.int64()),
        ("version", pa.string()),  # of the tool
        ("status", pa.string()),  # ok, refused or failed
        ("reason", pa.string()),
        ("is_faulty", pa.bool_()),  # null, as all of what it says, where not ok
        ("probability", pa.float64()),
        ("category", pa.string()),
        ("root_cause", pa.string()),
        ("clipped_probability", pa.float64()),  # no part of the tool: see above
        ("schema", pa.int64()),  # features that its model wants
        ("filled", pa.int64()),  # of them, those that its extractor gave a value
        ("zeros", pa.int64()),  # of those filled, exactly 0
        ("score", pa.float64()),  # of the training, to be held against the benchmark's own runs
        ("wall_s", pa.float64()),
    ]
)

# What its labels mean in the benchmark's words, the nearest first. Its root causes are names of
# mutation operators; where a word says less than the operator does, more than one stands here.
ROOT_CAUSES: Final[Mapping[str, tuple[str, ...]]] = {
    # embedding: rows of the table swapped or zeroed, or a table left out
    "embedding_swap": ("perturbed_parameters",),
    "embedding_zero": ("perturbed_parameters", "initialization"),
    "type_embedding_drop": ("perturbed_parameters", "initialization"),
    # ffn: another activation, neurons switched off, weights scaled
    "activation_distortion": ("activation_function",),
    "ffn_neuron_drop": ("perturbed_parameters", "initialization"),
    "ffn_weight_scaling": ("initialization", "perturbed_parameters"),
    # kernel: another backend, another dropout than in training, another layout
    "force_unoptimized": ("numeric_precision",),
    "inconsistent_dropout": ("train_eval_mode",),
    "wrong_layout": ("attention_wiring",),
    # layernorm
    "ln_beta_fault": ("normalization",),
    "ln_gamma_fault": ("normalization",),
    "ln_stats_fault": ("normalization",),
    # masking, and what its decoder model has of its own
    "inverted_mask": ("attention_mask",),
    "wrong_mask_broadcast": ("attention_mask",),
    "zero_mask": ("attention_mask",),
    "break_causal_mask": ("attention_mask",),
    "pad_masking_error": ("attention_mask", "loss_function"),
    # output: the last layer's weights noisy, zeroed or scaled
    "out_noise": ("perturbed_parameters",),
    "out_row_drop": ("perturbed_parameters", "initialization"),
    "out_scale": ("initialization", "perturbed_parameters"),
    # positional
    "double_position": ("positional_encoding",),
    "missing_positional": ("positional_encoding",),
    "off_by_one": ("positional_encoding",),
    "truncate_positions": ("positional_encoding",),
    # qkv
    "freeze_qkv": ("component_not_optimized",),
    "swapped_qk": ("attention_wiring",),
    "tie_heads": ("attention_wiring",),
    "wrong_head_dim": ("attention_wiring", "attention_scale"),
    "zero_key": ("initialization", "perturbed_parameters"),
    "zero_query": ("initialization", "perturbed_parameters"),
    "zero_value": ("initialization", "perturbed_parameters"),
    # residual
    "residual_drop": ("residual",),
    "residual_noise": ("residual", "perturbed_parameters"),
    "residual_scale": ("residual",),
    # score: dropout before the softmax, the scale left out or wrong, half precision
    "misplaced_dropout": ("attention_scale", "softmax_axis"),
    "missing_scaling": ("attention_scale",),
    "unsafe_type_cast": ("numeric_precision",),
    "wrong_scaling_factor": ("attention_scale",),
    # variant: a causal mask in an encoder; one head that works, of several
    "causal_in_noncausal": ("attention_mask",),
    "wrong_variant": ("attention_wiring",),
    # kv_cache: keys and values of another step or request
    "cross_request_cache_leak": ("attention_wiring",),
    "off_by_one_index": ("attention_wiring", "positional_encoding"),
    "stale_cache": ("attention_wiring",),
    "truncated_cache": ("attention_wiring",),
}
CATEGORIES: Final[Mapping[str, tuple[str, ...]]] = {
    "embedding": ("perturbed_parameters", "initialization"),
    "ffn": ("activation_function", "initialization", "perturbed_parameters"),
    "kernel": ("numeric_precision", "train_eval_mode", "attention_wiring"),
    "layernorm": ("normalization",),
    "masking": ("attention_mask",),
    "decoder_masking": ("attention_mask",),
    "output": ("perturbed_parameters", "initialization", "loss_function"),
    "positional": ("positional_encoding",),
    "qkv": ("attention_wiring", "initialization", "component_not_optimized"),
    "residual": ("residual", "perturbed_parameters"),
    "score": ("attention_scale", "softmax_axis", "numeric_precision"),
    "variant": ("attention_wiring", "attention_mask"),
    "kv_cache": ("attention_wiring",),
}


# -- the tool --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tool:
    """What is used of the package: its public names."""

    extractor: Callable[..., Any]
    settings: Callable[..., Any]
    predictor: Callable[[str], Any]
    normalizer: Callable[[str], Any]


class ToolError(Exception):
    """The tool failed; ``status`` says whether before the training began or within it."""

    def __init__(self, status: str, doing: str, error: Exception) -> None:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        super().__init__(f"{doing}, {_place_of(error)}: {text}"[:500])
        self.status = status


def load_tool() -> Tool:
    """Imports the package.

    Raises:
        BenchmarkError: It is not installed, or in another version; the text says what to install.
    """
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    others = " ".join(absent).replace("sklearn", "scikit-learn")
    install = f"run: pip install --no-deps {PACKAGE}=={VERSION}"
    if absent:
        install += f" && pip install {others}"
        raise BenchmarkError(f"{PACKAGE} needs {others}; {install}")
    try:
        package = importlib.import_module(PACKAGE)
        diagnosis = importlib.import_module(f"{PACKAGE}.diagnosis")
        processing = importlib.import_module(f"{PACKAGE}.processing")
    except ImportError as error:
        raise BenchmarkError(f"{PACKAGE} cannot be imported ({error}); {install}") from error
    if package.__version__ != VERSION:
        found = package.__version__
        raise BenchmarkError(f"{PACKAGE} is {found} here, {VERSION} is compared with; {install}")
    return Tool(
        package.FeatureExtractor,
        package.ExtractionConfig,
        functools.cache(diagnosis.load_pretrained),
        functools.cache(processing.RuntimeNormalizer.load),
    )


def _place_of(error: Exception) -> str:
    """Returns where in the package an error was raised; else where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f"/{PACKAGE}/" in f.filename] or frames
    if not own:
        return "at an unknown place"
    name = own[-1].filename.rpartition(f"/{PACKAGE}/")[2] if own is not frames else ""
    return f"{name or Path(own[-1].filename).name}:{own[-1].lineno}"


# -- a subject as the tool wants to see it ---------------------------------------------------------


class Shown(nn.Module):
    """A subject's model under the names, and with the configuration, of a Hugging Face model.

    It shares all modules with the model and has no parameters of its own.
    """

    def __init__(self, training: Training) -> None:
        super().__init__()
        model: Any = training.model
        settings = training.settings
        if hasattr(model, "distilbert"):
            self.config: Any = model.distilbert.config
            self.distilbert = model.distilbert
        else:
            self.config = SimpleNamespace(
                model_type="bert",  # its word for a model in which every place sees every other
                is_encoder_decoder=hasattr(model, "decoder_layers"),
                num_hidden_layers=settings.depth,
                num_attention_heads=settings.heads,
                hidden_size=settings.width,
            )
            self.model = model
        if hasattr(model, "head"):
            self.classifier = model.head
        self._predict = functools.partial(training.subject.predict, model)

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        """Token numbers, (batch, length), to logits."""
        return SimpleNamespace(logits=self._predict({"tokens": input_ids}))


class Watch:
    """Sees a training and hands each step to an extractor.

    The last outputs, targets, loss, attention weights of each block (batch, heads, length, length)
    and states between blocks (batch, length, width) are kept until the optimizer is about to step.
    """

    def __init__(self, training: Training, tool: Tool, arch: str) -> None:
        self.training = training
        self.shown = Shown(training)
        tokens = "tokens" in training.data.train
        settings = tool.settings(pad_token_id=0, cls_token_id=1) if tokens else tool.settings()
        with undisturbed(training.model, self.shown):
            try:
                self.extractor = tool.extractor(self.shown, arch=arch, config=settings)
            except Exception as error:
                raise ToolError(REFUSED, "its extractor refuses the model", error) from error
        self.step = self.part = 0
        self.states: dict[int, Tensor] = {}
        self.weights: dict[int, Tensor] = {}
        self._attach()

    def _attach(self) -> None:
        training = self.training
        predict, criterion = training.subject.predict, training.criterion

        def predicted(model: nn.Module, batch: Batch) -> Tensor:
            self.batch, self.outputs = batch, predict(model, batch)
            return self.outputs

        def criticised(outputs: Tensor, targets: Tensor) -> Tensor:
            self.loss = criterion(outputs, targets)
            return self.loss

        self.predict = predict
        training.subject = dataclasses.replace(training.subject, predict=predicted)
        training.criterion = criticised
        for index, layer in enumerate(blocks(training.model)):
            layer.register_forward_pre_hook(self._before(index), with_kwargs=True)
            layer.register_forward_hook(self._after(index))
            attention: Any = next((m for m in layer.modules() if hasattr(m, "weigh")), None)
            if attention is not None:
                attention.weigh = self._weighed(index, attention.weigh)
        training.optimizers[0].register_step_pre_hook(self._before_step)

    def _before(self, index: int) -> Callable[..., None]:
        def keep(_: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            self.states[index] = _first_tensor((*given, *named.values())).detach()

        return keep

    def _after(self, index: int) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self.states[index + 1] = _first_tensor(output).detach()

        return keep

    def _weighed(self, index: int, weigh: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def keep(*given: Any, **named: Any) -> Tensor:
            weights = weigh(*given, **named)
            self.weights[index] = weights.detach()
            return weights

        return keep

    def _before_step(self, *_: Any) -> None:
        training, batch = self.training, self.batch
        tokens, targets = batch.get("tokens"), batch[TARGETS]
        mask = None if tokens is None else (tokens != 0).long()
        if tokens is None and self.states[0].ndim == 3:  # else there is more than one length
            mask = torch.ones(self.states[0].shape[:2], dtype=torch.long)
        outputs = SimpleNamespace(
            logits=self.outputs.detach(),
            attentions=tuple(self.weights[i] for i in sorted(self.weights)),
            hidden_states=tuple(self.states[i] for i in sorted(self.states)),
        )
        self.step += 1
        with undisturbed(training.model, self.shown):
            try:
                self.extractor.step(
                    loss=self.loss.detach(),
                    outputs=outputs,
                    input_ids=tokens,
                    attention_mask=mask,
                    labels=None if targets.is_floating_point() else targets,
                    optimizer=training.optimizers[0],
                )
                if self.step * PARTS // training.settings.steps > self.part:
                    self.extractor.epoch_end(self.part)
                    self.extractor.record_validation(self.part, self._validated())
                    self.part += 1
            except Exception as error:
                raise ToolError(FAILED, f"step {self.step}", error) from error

    def _validated(self) -> dict[str, float]:
        """Loss on held-out samples, and accuracy where there are classes, as the author sees it."""
        training, held_out = self.training, self.training.data.held_out
        training.model.train(not training.settings.eval_mode)
        with torch.no_grad():
            outputs = self.predict(training.model, held_out)
            right = training.subject.criterion(training.settings)
            found = {"loss": float(right(outputs, held_out[TARGETS]))}
        if not held_out[TARGETS].is_floating_point():
            found["accuracy"] = training.subject.score(outputs, held_out[TARGETS])
        return found

    def finish(self) -> dict[str, float]:
        """Returns the features of the run.

        Raises:
            ToolError: The extractor broke.
        """
        try:
            with self.extractor:
                features: dict[str, float] = self.extractor.finalize()
        except Exception as error:
            raise ToolError(FAILED, "its features at the end", error) from error
        return features


def blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the repeated blocks of a model, in order; the first list of modules that it has."""
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList))
    return list(next(lists, nn.ModuleList()))


@contextlib.contextmanager
def undisturbed(model: nn.Module, shown: nn.Module) -> Iterator[None]:
    """Puts random numbers and training modes back, whatever is done to them."""
    shown.training = model.training
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=[]):
        yield
    for module, mode in modes:
        module.training = mode


def _first_tensor(found: Any) -> Tensor:
    values = found if isinstance(found, (tuple, list)) else (found,)
    return next(value for value in values if isinstance(value, Tensor))


# -- runs ------------------------------------------------------------------------------------------


def run(tool: Tool, known: Catalogue, item: Item, seed: int) -> Row:
    """Trains a configuration with the tool on it; a failure of either is a row that says so."""
    made, begin = item.configuration, time.monotonic()
    row: Row = {
        "hash": item.hash,
        "subject": made.subject,
        "recipe": made.recipe,
        "role": item.role,
        "operator": made.operator,
        "severity": made.severity,
        "place": made.place,
        "seed": seed,
        "version": VERSION,
        "status": OK,
        "reason": "",
    }
    subject = known.subject(made.subject)
    try:
        settings, injected = made.settings(subject), made.injected(known)
        training, _ = assemble(subject, settings, seed, injected)
        # Each subject that it is shown as such is an encoder; it refuses encoder-decoders.
        row |= _judged(tool, training, "encoder")
    except ToolError as error:
        row |= {"status": error.status, "reason": str(error)}
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        row |= {"status": FAILED, "reason": f"the training, {_place_of(error)}: {text}"[:500]}
    return row | {"wall_s": round(time.monotonic() - begin, 2)}


def _judged(tool: Tool, training: Training, arch: str) -> Row:
    watch = Watch(training, tool, arch)
    outcome = train(training)
    features = watch.finish()
    try:
        said = _said(tool.normalizer(arch), tool.predictor(arch), features)
    except Exception as error:
        raise ToolError(FAILED, "its prediction", error) from error
    return {**said, "score": outcome.score}


def _said(normalizer: Any, predictor: Any, features: Mapping[str, float]) -> Row:
    encoded = normalizer.encode(features, mode="raw")
    said = predictor.predict(encoded)
    filled, schema = normalizer.coverage(features)
    # What is missing comes out as in its reference, so that other values show what was given.
    given = normalizer.encode({name: float(value != 0) for name, value in features.items()})
    blank = normalizer.encode(dict.fromkeys(features, 0.0))
    measured = {name for name in blank if given[name] != blank[name]}
    known = normalizer.reference
    clipped = {
        name: min(max(encoded[name], middle - CLIP * spread), middle + CLIP * spread)
        if name in measured
        else middle
        for name, middle, spread in zip(
            known.schema, map(float, known.median), map(float, known.std), strict=True
        )
    }
    return {
        "is_faulty": bool(said.is_faulty),
        "probability": float(said.detection_prob),
        "category": said.category,
        "root_cause": said.root_cause,
        "clipped_probability": float(predictor.predict(clipped).detection_prob),
        "schema": schema,
        "filled": filled,
        "zeros": filled - len(measured),
    }


def wanted(known: Catalogue, subjects: Collection[str]) -> list[tuple[Item, int]]:
    """Returns the runs: six seeds of each clean recipe, one of every other configuration."""
    items = make_plan(known, "small", only=subjects).items
    first: dict[str, Item] = {}
    for item in items:
        if item.role in ROLES:
            first.setdefault(item.hash, item)
    chosen = sorted(first.values(), key=lambda i: SUBJECTS.index(i.configuration.subject))
    return [
        (item, seed) for item in chosen for seed in range(CLEAN_SEEDS if item.role == CLEAN else 1)
    ]


def execute(
    path: Path,
    runs: Sequence[tuple[Item, int]],
    make: Callable[[Item, int], Row],
    minutes: float | None,
    say: Callable[[str], None],
) -> list[Row]:
    """Makes the runs that are not in a file yet, and keeps each as soon as it is finished.

    Args:
        path: A Parquet file; it is there whole or not at all.
        runs: Configurations and seeds, in order.
        make: Makes one.
        minutes: No run is begun after so many; None: no limit.
        say: Told of each run.

    Returns:
        All rows of the file; those of code that is gone stay in it.

    Raises:
        BenchmarkError: The file cannot be read or written.
    """
    rows = read(path)
    done = {(row["hash"], row["seed"]) for row in rows if row["version"] == VERSION}
    left = [(item, seed) for item, seed in runs if (item.hash, seed) not in done]
    begin = time.monotonic()
    for number, (item, seed) in enumerate(left, start=1):
        if minutes is not None and time.monotonic() - begin > 60 * minutes:
            say(f"{len(left) - number + 1} runs left; give the same command again to go on")
            break
        rows.append(make(item, seed))
        write(path, rows)
        say(f"{number}/{len(left)} {_line(rows[-1])}")
    return rows


def _line(row: Row) -> str:
    what = " ".join(str(row[k]) for k in ("subject", "recipe", "role", "operator", "severity"))
    said = row["reason"]
    if row["status"] == OK:
        judged = "faulty" if row["is_faulty"] else "healthy"
        said = f"{judged} p={row['probability']:.3f} {row['category']}/{row['root_cause']}"
    return f"{' '.join(what.split())} seed {row['seed']}, {row['wall_s']:.1f} s: {said}"


def read(path: Path) -> list[Row]:
    """Returns the rows of a file; none where it does not exist.

    Raises:
        BenchmarkError: It is damaged, or of other columns.
    """
    if not path.exists():
        return []
    try:
        table = pq.read_table(io.BytesIO(path.read_bytes()))
    except (OSError, pa.ArrowException) as error:
        raise BenchmarkError(
            f"{path} cannot be read ({error}); remove it or choose --out"
        ) from error
    if not table.schema.equals(SCHEMA):
        raise BenchmarkError(f"{path} has other columns; remove it or choose another --out")
    rows: list[Row] = table.to_pylist()
    return rows


def write(path: Path, rows: Iterable[Row]) -> None:
    """Writes all rows.

    Raises:
        BenchmarkError: They cannot be written; the file stays as it was.
    """
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), content, compression="zstd")
    write_whole(path, content.getvalue())


# -- scores ----------------------------------------------------------------------------------------


def causes_of(category: str | None, root_cause: str | None) -> tuple[str, ...]:
    """Returns its labels in the benchmark's words: of the root cause, then of its category.

    >>> causes_of("qkv", "zero_query")
    ('initialization', 'perturbed_parameters', 'attention_wiring', 'component_not_optimized')
    >>> causes_of(None, None)
    ()
    """
    near = ROOT_CAUSES.get(root_cause or "", ())
    return tuple(dict.fromkeys((*near, *CATEGORIES.get(category or "", ()))))


def verdicts(rows: Iterable[Row], truths: Mapping[str, Truth]) -> list[Verdict]:
    """Returns what the tool says of runs whose truth is known, for `scoring.figures`.

    A run in which it broke is one that it did not call faulty (probability 0): whoever used it was
    told nothing. What it refuses to look at is left out, as is what has no truth. It names no
    components, and no causes of runs that it calls healthy.
    """
    found = []
    for row in rows:
        if row["hash"] not in truths or row["status"] == REFUSED:
            continue
        ok = row["status"] == OK
        found.append(
            Verdict(
                truths[row["hash"]],
                row["seed"],
                ok and row["is_faulty"],
                row["probability"] if ok else 0.0,
                causes_of(row["category"], row["root_cause"]),
            )
        )
    return found


def summary(rows: Iterable[Row]) -> list[str]:
    """Returns a line for each subject and role: how many runs, and what the tool said of them."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["subject"], row["role"]), []).append(row)
    lines = []
    for (subject, role), group in sorted(groups.items()):
        statuses = Counter(row["status"] for row in group)
        ok = [row for row in group if row["status"] == OK]
        text = ", ".join(f"{count} {status}" for status, count in statuses.items())
        if ok:
            named = Counter(f"{r['category']}/{r['root_cause']}" for r in ok if r["is_faulty"])
            often = ", ".join(f"{name} {count}" for name, count in named.most_common(3))
            shares = [sum(r[k] for r in ok) / sum(r["schema"] for r in ok) for k in SHARES]
            text += f"; called faulty {sum(r['is_faulty'] for r in ok)}/{len(ok)} ({often}), "
            text += f"if clipped {sum(r['clipped_probability'] > 0.5 for r in ok)}/{len(ok)}; "
            text += f"features filled {shares[0]:.0%}, exactly 0 {shares[1]:.0%}; "
            text += f"{math.fsum(r['wall_s'] for r in ok) / len(ok):.1f} s a run"
        lines.append(f"{subject} {role}: {text}")
    return lines


def main() -> int:
    """Runs DEFault++ 0.4.1 on the benchmark's test subjects and on distilbert."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("diagnoser-bench/defaultplusplus.parquet"))
    parser.add_argument("--minutes", type=float, help="begin no run after so many minutes")
    parser.add_argument("--only", nargs="+", default=SUBJECTS, choices=SUBJECTS, metavar="SUBJECT")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        tool = load_tool()
        known = catalogue()
        runs = wanted(known, arguments.only)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tool's, of every step

            def make(item: Item, seed: int) -> Row:
                return run(tool, known, item, seed)

            rows = execute(
                arguments.out,
                runs,
                make,
                arguments.minutes,
                lambda line: print(line, file=sys.stderr, flush=True),
            )
    except DiagnoserError as error:
        print(f"defaultplusplus: {error}", file=sys.stderr)
        return 2
    current = {(item.hash, seed) for item, seed in runs}
    print("\n".join(summary(row for row in rows if (row["hash"], row["seed"]) in current)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
