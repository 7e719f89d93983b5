"""`ttt-adapt serve`: what it refuses before it begins."""

from __future__ import annotations

import sys

import pytest

from command_line import status


@pytest.fixture(autouse=True)
def _no_token(monkeypatch):
    monkeypatch.delenv("TTT_ADAPT_TOKEN", raising=False)


def test_a_host_that_others_reach_is_refused_without_a_token(monkeypatch, model_folder, capsys):
    assert status(monkeypatch, "serve", "--host=0.0.0.0", f"--checkpoint={model_folder}/model0.safetensors") == 1
    error = capsys.readouterr().err
    assert "--host is '0.0.0.0', which others can reach, and there is no token" in error
    assert "--token-file" in error


def test_a_missing_package_is_told_with_the_command_that_installs_it(monkeypatch, model_folder, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert status(monkeypatch, "serve", f"--checkpoint={model_folder}/model0.safetensors") == 1
    assert 'pip install "ttt-adapt[serve]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--rate=-1"], "rate is -1.0"),
        (["--arm=online", "--preset=paper"], "give one of them"),
        (["--arm=fixed"], "keeps one video only"),
        (["--sources=absent"], "is no folder"),
        (["--source-url=file:///etc"], "expected the beginning of addresses"),
        (["--token-file=absent"], "cannot be read"),
        (["--checkpoint=absent.safetensors"], "absent.safetensors"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_the_reason(options, told, monkeypatch, model_folder, capsys):
    pytest.importorskip("uvicorn")
    pytest.importorskip("prometheus_client")
    given = [] if options[0].startswith("--checkpoint") else [f"--checkpoint={model_folder}/model0.safetensors"]
    assert status(monkeypatch, "serve", *given, *options) == 1
    assert told in capsys.readouterr().err
