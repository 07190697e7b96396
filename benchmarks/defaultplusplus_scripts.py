"""DEFault++ 0.4.1 on the reproductions that train a Hugging Face model: what it accepts.

``python -m benchmarks.defaultplusplus_scripts`` trains both forms of each such script with its
`FeatureExtractor` attached: its ``step`` before every optimizer step, its ``epoch_end`` and
``record_validation`` after each tenth of the run. The scripts are not changed. What has to be given
to the tool is taken from the outermost call of a `PreTrainedModel`, which is asked for attention
weights and hidden states on top (with eager attention, which alone has them); validation is that
model in eval mode on the batch at hand, since a script's own is not known from outside. How its
answer is read stands in `defaultplusplus`. A form in which it breaks or is refused is a row that
says so and calls nothing faulty. Writes ``benchmarks/results/defaultplusplus-scripts.json``.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks import defaultplusplus
from benchmarks.defaultplusplus import FAILED, PARTS, REFUSED, Tool, ToolError, undisturbed
from benchmarks.reproductions import load
from benchmarks.reproductions_runs import DEFAULTPLUSPLUS, Row, complete, execute, script_of, words
from diagnoser.benchmark.harm import OK

SEEDS: Final = 1  # two trainings each, and it answers the same whatever the seed
HUGGING_FACE: Final = ("from transformers import", "import transformers")
BERTS: Final = (
    "bert",
    "roberta",
)  # on which its hooks on sublayers always break; it can do without
DECODERS: Final = ("llama", "gpt2")
CODE: Final = f"defaultplusplus {defaultplusplus.VERSION}"


class Attached:
    """The tool on a script: sees its model, its losses and its steps.

    Args:
        tool: The tool; None to count steps alone.
        steps: How many steps the script makes.
    """

    def __init__(self, tool: Tool | None, steps: int) -> None:
        self.tool, self.steps, self.step, self.part = tool, steps, 0, 0
        self.extractor: Any = None
        self.arch = ""
        self.model: Any = None
        self.given: dict[str, Any] = {}
        self.output: Any = None
        self.loss: Tensor | None = None
        self._depth = 0
        self._inside = False  # the tool itself calls the model

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Wraps calls of pretrained models, backward and the optimizers' steps."""
        from transformers import PreTrainedModel  # noqa: PLC0415 - seconds, and only here

        call, backward, attached = nn.Module.__call__, torch.autograd.backward, self

        def called(model: Any, /, *args: Any, **kwargs: Any) -> Any:
            outermost = attached._depth == 0 and attached.tool is not None
            if not (outermost and torch.is_grad_enabled() and not attached._inside):
                return call(model, *args, **kwargs)
            attached._depth += 1
            try:
                return attached._call(call, model, args, kwargs)
            finally:
                attached._depth -= 1

        def back(tensors: Any, *args: Any, **kwargs: Any) -> None:
            attached.loss = tensors if isinstance(tensors, Tensor) else None
            backward(tensors, *args, **kwargs)

        PreTrainedModel.__call__ = called
        torch.autograd.backward = back
        handle = register_optimizer_step_pre_hook(
            lambda optimizer, *_: self._before_step(optimizer)
        )
        try:
            yield
        finally:
            handle.remove()
            torch.autograd.backward = backward
            del PreTrainedModel.__call__

    def _call(self, call: Any, model: Any, args: Any, kwargs: Any) -> Any:
        if self.extractor is None:
            model.set_attn_implementation("eager")
            self.arch = "decoder" if model.config.model_type in DECODERS else "encoder"
            assert self.tool is not None
            with undisturbed(model, model):
                try:
                    self.extractor = self.tool.extractor(
                        model, arch=self.arch, config=self.tool.settings()
                    )
                    if model.config.model_type in BERTS:
                        self.extractor.collector.sublayer_capture.remove()
                except Exception as error:
                    raise ToolError(REFUSED, "its extractor refuses the model", error) from error
            self.model = model
        asked = {"output_attentions": True, "output_hidden_states": True}
        output = call(model, *args, **{**kwargs, **asked})
        names = ("input_ids", "attention_mask")
        self.given = dict(zip(names, args, strict=False)) | kwargs
        self.output = output
        return output

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.step += 1
        if self.tool is None:
            return
        if self.extractor is None:
            error = ValueError("no model of Hugging Face is called")
            raise ToolError(REFUSED, "before its first step", error)
        self._inside = True
        with undisturbed(self.model, self.model):
            try:
                self.extractor.step(
                    loss=None if self.loss is None else self.loss.detach(),
                    outputs=self.output,
                    input_ids=self.given.get("input_ids"),
                    attention_mask=self.given.get("attention_mask"),
                    labels=self.given.get("labels"),
                    optimizer=optimizer,
                )
                if self.step * PARTS // self.steps > self.part:
                    self.extractor.epoch_end(self.part)
                    self.extractor.record_validation(self.part, self._validated())
                    self.part += 1
            except Exception as error:
                raise ToolError(FAILED, f"step {self.step}", error) from error
            finally:
                self._inside = False

    def _validated(self) -> dict[str, float]:
        """Loss and, where there are labels, accuracy of the batch at hand, in eval mode."""
        self.model.eval()
        with torch.no_grad():
            output = self.model(**{k: v for k, v in self.given.items() if v is not None})
        found = {}
        loss = getattr(output, "loss", None)
        if loss is not None:
            found["loss"] = float(loss)
        labels, logits = self.given.get("labels"), getattr(output, "logits", None)
        if labels is not None and logits is not None and labels.shape == logits.shape[:-1]:
            found["accuracy"] = float((logits.argmax(-1) == labels).float().mean())
        return found

    def verdict(self) -> dict[str, Any]:
        """Returns what the tool says at the end.

        Raises:
            ToolError: It breaks.
        """
        assert self.tool is not None
        if self.extractor is None:
            raise ToolError(REFUSED, "at the end", ValueError("no model of Hugging Face is called"))
        try:
            with self.extractor:
                features = self.extractor.finalize()
            normalizer, predictor = self.tool.normalizer(self.arch), self.tool.predictor(self.arch)
            said = predictor.predict(normalizer.encode(features, mode="raw"))
        except Exception as error:
            raise ToolError(FAILED, "its prediction", error) from error
        causes = defaultplusplus.causes_of(said.category, said.root_cause)
        return {
            "status": OK,
            "reason": "",
            "verdict": "faulty" if said.is_faulty else "healthy",
            "probability": float(said.detection_prob),
            "label": f"{said.category}/{said.root_cause}",
            "causes": [[cause, "model"] for cause in causes] if said.is_faulty else [],
        }


def train_one(out: Path, steps: int, command: list[str]) -> None:
    """Runs a script with the tool on it (``steps`` of them), or counts its steps (0)."""
    attached = Attached(defaultplusplus.load_tool() if steps else None, steps)
    sys.argv = command
    try:
        with attached.watching():
            runpy.run_path(command[0], run_name="__main__")
            said = attached.verdict() if steps else {"steps": attached.step}
    except ToolError as error:
        said = {"status": error.status, "reason": str(error), "verdict": "none", "causes": []}
    out.write_text(json.dumps(said), encoding="utf-8")


def make(name: str, form: str, seed: int) -> Row:
    """Trains one form of a script twice: to count its steps, then with the tool on it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "said.json"
        said: Row = {"steps": 0}
        for _ in range(2):
            steps = str(said["steps"])
            command = [str(out), steps, *words(name, form, seed)]
            done = execute(["-m", "benchmarks.defaultplusplus_scripts", "train", *command])
            if done.exit_code:
                said = {"status": FAILED, "reason": done.error, "verdict": "none", "causes": []}
                break
            said = json.loads(out.read_text(encoding="utf-8"))
    return said | {"findings": []}


def names() -> list[str]:
    """Returns the scripts that import models of Hugging Face."""
    return [
        name for name in load()[0]
        if any(words in script_of(name).read_text(encoding="utf-8") for words in HUGGING_FACE)
    ]  # fmt: skip


def main() -> None:
    """Trains all that are not kept yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command")
    training = commands.add_parser("train", help="for its own child processes")
    training.add_argument("out", type=Path)
    training.add_argument("steps", type=int)
    training.add_argument("script", nargs=argparse.REMAINDER)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    if given.command == "train":
        torch.set_num_threads(1)
        train_one(given.out, given.steps, given.script)
        return
    defaultplusplus.load_tool()
    complete(DEFAULTPLUSPLUS, names(), SEEDS, make, jobs=given.jobs, code=CODE)


if __name__ == "__main__":
    main()
