"""Prints components/monitoring/rules.yaml: the rules of deploy/prometheus as a PrometheusRule.

kustomize takes no file from above its folder and puts no YAML into a field, so the rules are here a second time. A test
fails when the two differ. Run ``python deploy/kubernetes/rules.py`` and send its output to that file.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Final

PROMETHEUS: Final = Path(__file__).parents[1] / "prometheus"
_HEAD: Final = """\
# Printed by `python deploy/kubernetes/rules.py`; change deploy/prometheus instead.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: ckptd
spec:
  groups:
"""


def manifest() -> str:
    """All groups, comments and all."""
    texts = [(PROMETHEUS / name).read_text().partition("groups:\n")[2] for name in ("recording.yml", "alerts.yml")]
    return _HEAD + "".join(textwrap.indent(textwrap.dedent(text), "    ") for text in texts)


if __name__ == "__main__":
    sys.stdout.write(manifest())
