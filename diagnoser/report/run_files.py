"""What a run directory holds beside the log: ``diagnosis.json`` and ``report.html``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from diagnoser.errors import UsageError
from diagnoser.report.data import report_data
from diagnoser.report.html import write_report
from diagnoser.report.json_file import diagnosis_to_json
from diagnoser.runlog import Recording
from diagnoser.types import Diagnosis


def write_run(diagnosis: Diagnosis, recording: Recording, directory: Path) -> None:
    """Writes ``diagnosis.json`` and ``report.html``, each whole or not at all.

    Raises:
        UsageError: The directory cannot be written.
    """
    path = directory / "diagnosis.json"
    part = path.with_suffix(".json.part")
    try:
        part.write_text(diagnosis_to_json(diagnosis), encoding="utf-8", newline="\n")
        part.replace(path)
    except OSError as error:
        with suppress(OSError):  # a disk that is no longer written to
            part.unlink()
        raise UsageError(
            f"{path}: cannot be written ({error.strerror}); the log is kept: "
            f"`diagnoser diagnose {directory}` repeats the diagnosis"
        ) from error
    write_report(diagnosis, report_data(recording, diagnosis.cost), directory / "report.html")
