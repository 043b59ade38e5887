"""Pipelines saved as a user has them, and a command line that leaves the process as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli.usage import Done
from typer.testing import CliRunner

import greenroom.sim  # noqa: F401  (so that every test starts on a fresh simulator)
from greenroom.cli import app
from greenroom.zoo import tiny


@pytest.fixture
def greenroom_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """``greenroom ...`` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> Done:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Done(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small pipeline, by its name in the zoo."""

    @functools.cache
    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp("models") / name
        tiny(name).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(autouse=True)
def libraries_as_loud_as_before() -> Iterator[None]:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggings = (diffusers_logging, transformers_logging)
    before = [logging.get_verbosity() for logging in loggings]
    yield
    for logging, verbosity in zip(loggings, before, strict=True):
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
