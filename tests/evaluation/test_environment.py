"""Where a result was made, and what of that makes two results different."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from ttt_adapt.evaluation.environment import differing, environment


def test_the_environment_is_json_and_names_versions_and_commit():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"]
    assert found["cpu_count"] >= 1
    root = Path(__file__).parents[2]
    git = subprocess.run(["git", "-C", root, "ls-files", "ttt_adapt/errors.py"], capture_output=True, text=True)
    if git.stdout.strip():
        assert len(found["commit"]) == 40
        assert isinstance(found["dirty"], bool)
    else:
        assert found["commit"] is None


def test_a_package_inside_a_foreign_checkout_has_no_commit(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    module = tmp_path / "venv" / "ttt_adapt" / "evaluation" / "environment.py"
    module.parent.mkdir(parents=True)
    module.parents[1].joinpath("errors.py").touch()
    monkeypatch.setattr("ttt_adapt.evaluation.environment.__file__", str(module))
    assert (environment()["commit"], environment()["dirty"]) == (None, None)


def test_what_differs_is_named_with_both_values_and_packages_one_by_one():
    here = environment()
    assert differing(here, dict(here)) == []
    other = {**here, "cpu_count": 96, "packages": {**here["packages"], "torch": "1.0"}}
    torch = here["packages"]["torch"]
    assert differing(other, here) == [f"cpu_count (96, now {here['cpu_count']})", f"torch (1.0, now {torch})"]
    assert "commit (None, now abc)" in differing({}, {"commit": "abc"})
    assert differing({"dirty": None, "commit": None}, {}) == []
