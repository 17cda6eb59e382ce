"""Tests run from the project's root, where the seven files lie; nothing is installed."""
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
CASES = ROOT / 'tests' / 'cases'
sys.path.insert(0, str(ROOT))
