"""Damaged and hostile files, a hundred thousand of them, in front of everything that reads files.

Rule files, run logs (of one process, and of ranks side by side), case files, classifiers and logs
that are imported are made of valid ones by one to four mutations (of bytes, of the tokens and
values that each format has, of whole lines and arrays), one in eight of random bytes. What reads
them may take them or refuse them in one of our own errors, one line long, within a second of
processor time and without a warning; nothing in a file may run. A log that is taken is diagnosed,
too, and some are printed, drawn and compared.

    python -m benchmarks.fuzz                writes benchmarks/results/fuzz.json
    python -m benchmarks.fuzz --inputs 100   as many of each, and writes nothing
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from diagnoser.cases import read_case
from diagnoser.classifier import Vectors, load, shipped_classifier
from diagnoser.classifier.predict import Judge
from diagnoser.classifier.trees import Trees
from diagnoser.diagnosis import default_rules, diagnose
from diagnoser.difference import compare
from diagnoser.errors import (
    ClassifierError,
    DiagnoserError,
    LoggedFileError,
    RuleError,
    RunLogError,
    UsageError,
)
from diagnoser.features import CATALOGUE
from diagnoser.importing import import_log
from diagnoser.report import diagnosis_to_json, print_diagnosis, render_report, report_data
from diagnoser.rules import check_directory
from diagnoser.rules.loading import load_rule
from diagnoser.runlog import LOG_FILE, RANK, SHARD, RunLogWriter, read_run
from diagnoser.types import Component, Estimate, Measurement, Part

RESULT = Path(__file__).parent / "results" / "fuzz.json"
ROOT = Path(__file__).parent.parent
INPUTS = 20_000  # of each of five kinds
SEED = 0
LONGEST_S = 1.0  # of processor time
HANGS_S = 20.0  # then it is ended
LONGEST_MESSAGE = 2000

# What no file may bring about. Reading an array's header compiles a literal, but runs nothing.
FORBIDDEN = frozenset(
    {"exec", "pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
     "os.fork", "socket.connect", "ctypes.dlopen", "os.remove", "os.rmdir", "shutil.rmtree",
     "webbrowser.open"}
)  # fmt: skip

WORDS = (
    "&a ", "*a", "!!python/object/apply:os.system ['true']", "!!int ", "[", "]", "{", "}", ": ",
    "- ", "'", '"', "|\n", ">-\n", "? ", "#", "---\n", "...\n", "%YAML 1.1\n", "\t", "\x00", "\x1b",
    "\u202e", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "9" * 400, "1e-3", "no",
    ".nan", ".inf", "-.inf", "null", "~", "0x10", "1:30", "2020-01-01", "<<: ", "[" * 200,
    "x: {" * 60, "- " * 100, "(" * 60, "not " * 80, "a < b < c", "1 / 0", "loss_rise", "and", "{x}",
    "{loss_rise:9999999}", "{component.__class__}", "__import__('os')", "lambda: 0", "\r", "\u2028",
    "&a [*a, *a]", "NaN", "Infinity", "-1", "true", "[[1]]", "a" * 3000,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308,
    -1e308, 5e-324, "NaN", "Infinity", "-Infinity", "", "x", "model", "\x1b[31m", "\u202e",
    "\ud800", "</script>", "[red]", "a" * 2000, "%s", "{}", [], [None], [0], ["NaN"], [[]], {},
    {"a": []}, float("nan"), float("inf"),
)  # fmt: skip

Draw = random.Random


@dataclass
class Seen:
    """What came of the files of one kind."""

    inputs: int = 0
    refused: int = 0
    read: int = 0
    slowest_s: float = 0.0
    wrong: list[str] = field(default_factory=list)


# -- mutations -------------------------------------------------------------------------------------


def mutated(content: bytes, draw: Draw) -> bytes:
    """Changes some bytes, or puts in what formats are made of."""
    data = bytearray(content)
    at = draw.randrange(len(data) + 1)
    length = draw.choice((1, 2, 8, 60, 1000))
    match draw.randrange(7):
        case 0 if data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        case 1:
            data[at:at] = draw.randbytes(draw.randrange(1, 9))
        case 2:
            del data[at : at + length]
        case 3:
            data[at:at] = data[at : at + length] * draw.choice((1, 2, 20))
        case 4:
            other = draw.randrange(len(data) + 1)
            data[at:at] = data[other : other + length]
        case 5:
            del data[at:]
        case _:
            data[at : at + draw.choice((0, 0, 1, 4))] = draw.choice(WORDS).encode("utf-8")
    return bytes(data)


def mutated_value(value: Any, draw: Draw) -> Any:
    """Changes something inside of what JSON holds, or all of it."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        match draw.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {**value, draw.choice(("", "record", "x" * 50, "\x00")): value[key]}
            case _:
                return {**value, key: mutated_value(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        match draw.randrange(6):
            case 0:
                return value[:at]
            case 1:
                return [*value, *value[:at]]
            case _:
                return [*value[:at], mutated_value(value[at], draw), *value[at + 1 :]]
    alike = [other for other in VALUES if type(other) is type(value)]
    return draw.choice(alike if alike and draw.random() < 0.6 else VALUES)


def several(content: bytes, draw: Draw) -> bytes:
    """Changes a file in one to four places; one in eight is random altogether."""
    if draw.randrange(8) == 0:
        return draw.randbytes(draw.randrange(0, 300))
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        content = mutated(content, draw)
    return content


# -- kinds of files --------------------------------------------------------------------------------


class Rules:
    """Rule files; what is loaded has its examples checked, as `rules check` does."""

    refusal = RuleError

    def __init__(self, folder: Path) -> None:
        self._path = folder / "family" / "fuzzed.yaml"
        self._path.parent.mkdir()
        texts = [path.read_bytes() for path in sorted((ROOT / "rules").glob("*/*.yaml"))]
        self._texts = [text for text in texts if len(text) < 3000]

    def make(self, draw: Draw) -> None:
        """Writes a rule file."""
        self._path.write_bytes(several(draw.choice(self._texts), draw))

    def read(self, draw: Draw) -> None:
        """Loads it; the check of a directory says the same, and lists what is wrong."""
        try:
            load_rule(self._path, CATALOGUE)
        except RuleError:
            if draw.randrange(20) == 0:
                assert check_directory(self._path.parent.parent, CATALOGUE)
            raise
        check_directory(self._path.parent.parent, CATALOGUE)


class Logs:
    """Run logs; what is read is diagnosed, some of it printed, drawn and compared."""

    refusal = RunLogError

    def __init__(self, folder: Path) -> None:
        self._path = folder / "run" / LOG_FILE
        self._of_rank = folder / "run" / "rank-1" / LOG_FILE
        self._of_rank.parent.mkdir(parents=True)
        self._logs = []
        for ranks in (1, 2):
            made = folder / f"made{ranks}"
            _write_log(made, ranks)
            self._logs.append((made / LOG_FILE).read_bytes())
        self._healthy = read_run(folder / "made1")
        self._rules = default_rules()

    def make(self, draw: Draw) -> None:
        """Writes a log, one in three of two ranks, either of which may be damaged."""
        self._of_rank.unlink(missing_ok=True)
        alone, shared = self._logs
        if draw.randrange(3):
            self._path.write_bytes(self._damaged(alone, draw))
            return
        paths = [self._path, self._of_rank]
        draw.shuffle(paths)
        paths[0].write_bytes(self._damaged(shared, draw))
        paths[1].write_bytes(shared if draw.random() < 0.7 else self._damaged(shared, draw))

    def _damaged(self, log: bytes, draw: Draw) -> bytes:
        """Returns other bytes, other values, or lines of it elsewhere."""
        if draw.randrange(4) == 0:
            return several(log, draw)
        whole = [json.loads(line) for line in log.splitlines()]
        records = list(whole)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(records))
            match draw.randrange(6):
                case 0:
                    del records[at]
                case 1:
                    records.insert(draw.randrange(len(records) + 1), records[at])
                case _:
                    records[at] = mutated_value(records[at], draw)
            records = records or list(whole)
        return "".join(f"{json.dumps(record)}\n" for record in records).encode("ascii")

    def read(self, draw: Draw) -> Callable[[], None]:
        """Reads and diagnoses it; returns what shows it."""
        recording = read_run(self._path.parent)
        diagnosis = diagnose(recording, self._rules)
        json.loads(diagnosis_to_json(diagnosis))

        def show() -> None:
            match draw.randrange(12):
                case 0:
                    page = render_report(diagnosis, report_data(recording, diagnosis.cost))
                    page.encode("utf-8")
                case 1:
                    print_diagnosis(diagnosis, Console(file=io.StringIO(), width=80))
                case 2:
                    compare(self._healthy, recording)
                    compare(recording, self._healthy)

        return show


class Cases:
    """Case files."""

    refusal = UsageError

    def __init__(self, folder: Path) -> None:
        self._path = folder / "case.yaml"
        self._texts = [path.read_bytes() for path in sorted((ROOT / "cases").glob("*/case.yaml"))]

    def make(self, draw: Draw) -> None:
        """Writes a case file."""
        self._path.write_bytes(several(draw.choice(self._texts), draw))

    def read(self, _: Draw) -> None:
        """Reads it."""
        read_case(self._path)


class Classifiers:
    """Classifiers with few trees: other bytes under a digest that fits, or other arrays."""

    refusal = ClassifierError

    def __init__(self, folder: Path) -> None:
        self._path = folder / "fuzzed.npz"
        shipped = shipped_classifier()
        assert shipped is not None
        self._arrays, self._description = _few_trees(shipped)
        self._content = _npz(self._arrays)
        self._write(self._content, self._description)
        load(self._path)

    def make(self, draw: Draw) -> None:
        """Writes a classifier and its description."""
        content, description = self._content, self._description
        match draw.randrange(4):
            case 0:
                content = several(content, draw)
            case 1:
                description = mutated_value(description, draw)
            case _:
                content = _npz({**self._arrays, **self._others(draw)})
        self._write(content, description)
        if draw.randrange(16) == 0:
            beside = self._path.with_suffix(".json")
            beside.write_bytes(several(beside.read_bytes(), draw))

    def read(self, _: Draw) -> None:
        """Loads it, and judges nothing with it: a run of which nothing is known."""
        load(self._path).predict(Vectors({}, {}, (), ()))

    def _write(self, content: bytes, description: Any) -> None:
        if isinstance(description, dict) and "sha256" in description:
            description = {**description, "sha256": hashlib.sha256(content).hexdigest()}
        self._path.write_bytes(content)
        self._path.with_suffix(".json").write_text(json.dumps(description), encoding="utf-8")

    def _others(self, draw: Draw) -> dict[str, Any]:
        name = draw.choice(list(self._arrays))
        array = self._arrays[name]
        match draw.randrange(8):
            case 0:
                return {name: np.array([Bomb()], dtype=object)}
            case 1:
                return {name: array[: draw.randrange(len(array) + 1)]}
            case 2:
                return {name: np.concatenate([array, array])}
            case 3:
                return {name: array["gain"] if array.dtype.names else array.astype(str)}
            case 4:
                return {"names": _names_of(self._arrays, draw)}
            case 5:
                return {draw.choice(("", "../x", "x" * 300)): array}
            case _:
                return {name: _one_other(array, draw)}


class Imports:
    """Logs that scripts write themselves: a table, a Trainer's, one of TensorBoard."""

    refusal = (LoggedFileError, UsageError)

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        rows = [(step, 2.0 / (1 + step), 0.01, "" if step % 5 else 1.0) for step in range(60)]
        lines = ["step,loss,learning_rate,eval_loss", *(",".join(map(str, row)) for row in rows)]
        entries = [
            {
                "step": step,
                "epoch": step / 20,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": 1.0,
            }
            for step, loss, rate, _ in rows
        ]
        entries.append({"step": 60, "epoch": 3.0, "eval_loss": 1.0, "eval_accuracy": 0.5})
        self._state = {"global_step": 60, "epoch": 3.0, "max_steps": 60, "log_history": entries}
        self._files = {
            "log.csv": "\n".join(lines).encode(),
            "trainer_state.json": json.dumps(self._state).encode(),
            "events.out.tfevents.1.host": _events(rows),
        }
        self._run = folder / "run"
        for name, content in self._files.items():  # imports what they need, too
            self._path = folder / name
            self._path.write_bytes(content)
            import_log(self._path, self._run)
            (self._run / LOG_FILE).unlink()

    def make(self, draw: Draw) -> None:
        """Writes one of them."""
        (self._run / LOG_FILE).unlink(missing_ok=True)
        name = draw.choice(list(self._files))
        self._path = self._folder / name
        content = several(self._files[name], draw)
        if name.endswith(".json") and draw.random() < 0.7:
            content = json.dumps(mutated_value(self._state, draw)).encode("ascii")
        self._path.write_bytes(content)

    def read(self, _: Draw) -> None:
        """Makes a run of it."""
        import_log(self._path, self._run)


class Bomb:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('a file was run')",)


KINDS: dict[str, Callable[[Path], Any]] = {
    "rules": Rules,
    "logs": Logs,
    "cases": Cases,
    "classifiers": Classifiers,
    "imports": Imports,
}


def _write_log(directory: Path, ranks: int) -> None:
    names = ("encoder.attn[query]", "encoder.attn[key]", "encoder.norm", "head")
    kinds = ("query", "key", "norm", "head")
    layers = ("encoder.attn", "encoder.attn", "encoder.norm", "head")
    components = [
        Component(name, kind, layer, i, (Part(f"{name}.weight"),), 64 * (i + 1))
        for i, (name, kind, layer) in enumerate(zip(names, kinds, layers, strict=True))
    ]
    draw = random.Random(0)
    quantities = (
        "gradient_norm", "weight_norm", "update_norm", "update_ratio", "learning_rate", "trainable",
        "optimized", "reached", "zero_share", "lambda_max", "lambda_min", "trace", "moment_ratio",
    )  # fmt: skip
    with RunLogWriter(
        directory, "run", {"script": "train.py", "arguments": ["--lr", "0.1"]}
    ) as log:
        log.components(0, components)
        if ranks > 1:
            log.fact(0, RANK, "model", 0.0, {"ranks": ranks})
        log.fact(0, "optimizer", "model", 1.0, {"class": "Adam", "file": "train.py", "line": 3})
        log.fact(20, "unknown", "label_classes", 1.0, {"reason": "no labels"})
        for step in range(40):
            log.loss(step, 2.0 / (1 + step) + 0.1 * draw.random(), draw.random())
            if step % 5 == 0:
                rows = [
                    Measurement(step, q, c, Estimate(draw.random(), 0.01, None, 4))
                    for q in quantities
                    for c in names
                ]
                of_model = ("optimizers", "classes", "step_sharpness", "input_scale")
                rows += [Measurement(step, q, "model", Estimate(1.0, 0.0)) for q in of_model]
                rows += [
                    Measurement(step, q, names[0], Estimate(draw.random(), 0.1), names[1])
                    for q in ("coupling", "coupling_share", "coupling_norm")
                ]
                shards = ("gradient_norm", "weight_norm", "update_norm") if ranks > 1 else ()
                rows += [
                    Measurement(step, SHARD + q, c, Estimate(draw.random(), samples=32))
                    for q in shards
                    for c in (*names, "model")
                ]
                log.measurement(step, rows, 0.01)
        log.event(20, "trigger", "the loss is 3 after 1", {"value": 3.0})
        log.event(30, "repair", "tried", {"step": 30})
        log.end(0, None)


def _events(rows: Sequence[tuple[Any, ...]]) -> bytes:
    """Returns an event file of TensorBoard, written by its own writer."""
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - heavy

    with tempfile.TemporaryDirectory() as scratch:
        with SummaryWriter(scratch) as writer:
            for step, loss, rate, _ in rows:
                writer.add_scalar("train/loss", loss, step)
                writer.add_scalar("train/learning_rate", rate, step)
        (file,) = Path(scratch).iterdir()
        return file.read_bytes()


def _few_trees(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns arrays and description of a file with two trees a judge and one cause."""
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    names = json.loads(arrays["names"].tobytes())
    names["causes"] = names["causes"][:1]
    arrays["names"] = np.frombuffer(json.dumps(names).encode(), dtype=np.uint8)
    kept = ("verdict", "location", f"cause.{names['causes'][0]}")
    for name in [name for name in arrays if name.endswith(".nodes")]:
        judge = name.removesuffix(".nodes")
        if judge in kept:
            roots = arrays[f"{judge}.roots"]
            arrays[name] = arrays[name][: roots[2]]
            arrays[f"{judge}.roots"] = roots[:2]
        else:
            for part in ("nodes", "roots", "columns", "numbers"):
                del arrays[f"{judge}.{part}"]
    base, slope, intercept = arrays["verdict.numbers"].tolist()
    trees = Trees(arrays["verdict.nodes"], arrays["verdict.roots"], base)
    verdict = Judge(trees, arrays["verdict.columns"], slope, intercept)
    description = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    description["check"] = verdict.probability(arrays["check_rows"]).tolist()
    return arrays, description


def _npz(arrays: dict[str, Any]) -> bytes:
    data = io.BytesIO()
    np.savez(data, allow_pickle=True, **arrays)
    return data.getvalue()


def _names_of(arrays: dict[str, Any], draw: Draw) -> Any:
    names = mutated_value(json.loads(arrays["names"].tobytes()), draw)
    return np.frombuffer(json.dumps(names).encode(), dtype=np.uint8)


def _one_other(array: Any, draw: Draw) -> Any:
    """Returns an array with one number changed."""
    if not array.size:
        return array
    other = array.copy()
    flat = other.reshape(-1)
    at = draw.randrange(len(flat))
    target = flat[draw.choice(array.dtype.names)] if array.dtype.names else flat
    if target.dtype.kind == "f":
        target[at] = draw.choice((0.0, -1.0, np.nan, np.inf, 1e308))
    elif target.dtype.kind == "b":
        target[at] = not target[at]
    else:
        limits = np.iinfo(target.dtype)
        target[at] = draw.choice((0, 1, limits.min, limits.max, min(len(flat), limits.max)))
    return other


# -- running ---------------------------------------------------------------------------------------

_armed = False
_ran: list[str] = []


def _audit(event: str, details: tuple[Any, ...]) -> None:
    if _armed and event in FORBIDDEN and not _is_import(event, details):
        _ran.append(event)


def _is_import(event: str, details: tuple[Any, ...]) -> bool:
    """Whether it is a module of somebody's that is needed for the first time."""
    return event == "exec" and Path(details[0].co_filename).is_file()


@contextmanager
def _watched() -> Iterator[None]:
    global _armed  # noqa: PLW0603 - an audit hook is never taken back
    _ran.clear()
    _armed = True
    try:
        yield
    finally:
        _armed = False


def watch_for_code() -> None:
    """Begins to notice what a file makes run."""
    sys.addaudithook(_audit)


def try_one(kind: Any, draw: Draw, seen: Seen) -> None:
    """Makes a file of a kind, has it read, and notes what came of it."""
    kind.make(draw)
    seen.inputs += 1
    wrong, refused, seconds = _read(kind, draw)
    if seconds > LONGEST_S:  # of a time on a machine that others use the least counts
        seconds = min(seconds, _read(kind, draw)[2])
    seen.refused += refused
    seen.read += not refused
    seen.slowest_s = max(seen.slowest_s, seconds)
    if seconds > LONGEST_S:
        wrong = f"it took {seconds:.1f} s"
    if wrong:
        seen.wrong.append(wrong)


def _read(kind: Any, draw: Draw) -> tuple[str, bool, float]:
    """Returns what was wrong, if anything, whether the file was refused, and the seconds taken."""
    begun = time.process_time()
    wrong, refused = "", False
    try:
        with warnings.catch_warnings(action="error"):
            with _watched():
                show = kind.read(draw)
            if show is not None:
                show()
    except DiagnoserError as error:
        wrong, refused = _what_is_wrong_with(error, kind), True
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        wrong = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"[:300]
    if _ran:
        wrong = f"a file brought about {_ran[0]}"
    return wrong, refused, time.process_time() - begun


def _what_is_wrong_with(error: DiagnoserError, kind: Any) -> str:
    if not isinstance(error, kind.refusal):
        return f"{type(error).__name__}, which is not its error: {error}"
    lines = str(error).split("\n")
    if any(len(line) > LONGEST_MESSAGE or not line for line in lines):
        return f"an error that is empty or endless: {str(error)[:200]}"
    if not all(character.isprintable() or character == "\n" for character in str(error)):
        return f"an error that is not printable: {str(error)[:200]!r}"
    return ""


def _on_alarm(*_: Any) -> None:
    raise TimeoutError("it hangs")


def run(kind: str, inputs: int, seed: int = SEED) -> Seen:
    """Has so many files of a kind read; the same ones for the same seed."""
    seen = Seen()
    with tempfile.TemporaryDirectory() as scratch:
        target = KINDS[kind](Path(scratch))
        signal.signal(signal.SIGVTALRM, _on_alarm)
        for i in range(inputs):
            signal.setitimer(signal.ITIMER_VIRTUAL, HANGS_S)
            before = len(seen.wrong)
            try_one(target, random.Random(f"{kind} {seed} {i}"), seen)
            seen.wrong[before:] = [f"input {i}: {wrong}" for wrong in seen.wrong[before:]]
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return seen


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all kinds and writes what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=INPUTS, help="of each kind")
    parser.add_argument("--only", choices=list(KINDS), help="this kind alone")
    chosen = parser.parse_args(arguments)
    watch_for_code()
    found = {}
    for kind in [chosen.only] if chosen.only else KINDS:
        seen = run(kind, chosen.inputs)
        found[kind] = {
            "inputs": seen.inputs,
            "refused": seen.refused,
            "read": seen.read,
            "slowest_s": round(seen.slowest_s, 3),
            "wrong": seen.wrong[:20],
        }
        print(json.dumps({kind: found[kind]}, indent=1), flush=True)
    if chosen.inputs >= INPUTS and not chosen.only:
        RESULT.write_text(json.dumps({"seed": SEED, "kinds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
