"""Tests of the OpenMMLab integration: skipped as a whole where mmengine is missing."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("mmengine") else ["test_*.py"]
