from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bimamba_lit.report import Summary, write_summary

MIB = 8 * 2**20


def make_summary(**changes: Any) -> Summary:
    values: dict[str, Any] = {
        "name": "student",
        "scheme": "FBI",
        "bits_per_byte": 2.16,
        "perplexity": 13.4,
        "eval_data": {"name": "offline corpus, val", "sha256": "ab" * 32},
        "context": 256,
        "stride": 128,
        "params": 2_000_000,
        "binarized_params": 1_500_000,
        "true_bits": MIB,
        "tokens_seen": 2_048_000,
        "seconds": 1300.0,
        "seed": 0,
        "teacher": None,
        "version": "0.1.0",
        "agreement": 0.75,
    }
    return Summary(**{**values, **changes})


@pytest.fixture
def summary() -> Callable[..., Summary]:
    return make_summary


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Make a run folder with a summary, and with a config.yaml where one is given."""

    def make(folder: str, config: str | None = None, **changes: Any) -> Path:
        path = tmp_path / folder
        write_summary(path, make_summary(**{"name": path.name, **changes}))
        if config is not None:
            (path / "config.yaml").write_text(config)
        return path

    return make
