"""A rule that holds in every training, for tests of what is done about a finding."""

from __future__ import annotations

from pathlib import Path

# It asks for what changes nothing, unless told otherwise: then nothing is kept.
ALWAYS = """
title: Always
status: stable
description: Detects every run.
references: ["none"]
fault: slow_convergence
scope: run
when: median_update_ratio > 0
severity: high
message: "a step changes {{median_update_ratio:.2g}}"
causes: [label_noise]
repairs:
{repairs}
falsepositives: ["every run"]
tests:
  - name: any
    series: {{median_update_ratio: [0.1]}}
    fires: true
  - name: none
    series: {{median_update_ratio: [0]}}
    fires: false
"""
CLIP = "{name: clip_gradient, component: model, parameters: {norm: 1000000.0}}"


def always(folder: Path, *repairs: str) -> tuple[str, str]:
    """Options that have the rule on."""
    directory = folder / "rules"
    directory.mkdir(exist_ok=True)
    listed = "\n".join(f"  - {repair}" for repair in repairs or (CLIP,))
    (directory / "always.yaml").write_text(ALWAYS.format(repairs=listed))
    return ("--rules", str(directory), "--classifier", "off")
