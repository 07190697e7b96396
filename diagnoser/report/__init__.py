"""Ways to show a diagnosis: JSON for programs, text for a terminal, one HTML page for people."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from diagnoser.report.json_file import diagnosis_schema, diagnosis_to_json
from diagnoser.report.terminal import finding_line, print_diagnosis

if TYPE_CHECKING:
    from diagnoser.report.data import ReportComponent, ReportData, report_data
    from diagnoser.report.html import render_report, write_report
    from diagnoser.report.notebook import framed
    from diagnoser.report.run_files import write_run

__all__ = [
    "ReportComponent",
    "ReportData",
    "diagnosis_schema",
    "diagnosis_to_json",
    "finding_line",
    "framed",
    "print_diagnosis",
    "render_report",
    "report_data",
    "write_report",
    "write_run",
]

# What only the page needs: a diagnosis on a terminal does not wait for it.
_OF_THE_PAGE: Final = {
    "ReportComponent": "data",
    "ReportData": "data",
    "framed": "notebook",
    "render_report": "html",
    "report_data": "data",
    "write_report": "html",
    "write_run": "run_files",
}


def __getattr__(name: str) -> Any:
    """Imports what belongs to the page when it is first asked for (PEP 562)."""
    if name not in _OF_THE_PAGE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_OF_THE_PAGE[name]}"), name)
