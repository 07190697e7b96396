"""Ways to show a diagnosis: JSON for programs, text for a terminal, one HTML page for people."""

from diagnoser.report.data import ReportComponent, ReportData, report_data
from diagnoser.report.html import render_report, write_report
from diagnoser.report.json_file import diagnosis_schema, diagnosis_to_json
from diagnoser.report.run_files import write_run
from diagnoser.report.terminal import finding_line, print_diagnosis

__all__ = [
    "ReportComponent",
    "ReportData",
    "diagnosis_schema",
    "diagnosis_to_json",
    "finding_line",
    "print_diagnosis",
    "render_report",
    "report_data",
    "write_report",
    "write_run",
]
