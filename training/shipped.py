"""Where the shipped bundles and the committed results lie."""

from pathlib import Path

BUNDLES_DIR = Path(__file__).parents[1] / "service" / "bundles"
RESULTS_DIR = Path(__file__).parent / "results"

SUITES = {"text": "text-smollm2", "detection": "detection-embedded"}
"""Name of each suite's bundle, and of the folder of its results."""
