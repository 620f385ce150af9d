"""Fixtures of the command line: images, a saved model, and a command that runs in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from small_models import small_vit
from stream_support import make_images

import lambda_vit.cli.main as cli
from lambda_kernels import save_pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A small full model, saved."""
    return save_pretrained(small_vit(), tmp_path_factory.mktemp("model") / "full")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line in this process; gives (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lambda-vit", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
