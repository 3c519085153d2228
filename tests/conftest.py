"""What the tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data_root() -> Path:
    """The folder that holds the real flickr8k-cn: CLIPCAP_DATA, or ../shared/data beside the repository.

    Elsewhere the test is skipped. With CI=true it fails instead if the default place has the corpus, so that a wrong
    setting cannot pass for a machine without data.
    """
    default = ROOT.parent / "shared" / "data"
    root = Path(os.environ.get("CLIPCAP_DATA") or default)
    if (root / "flickr8k-cn").is_dir():
        return root
    reason = f"{root / 'flickr8k-cn'} is not there; set CLIPCAP_DATA to the folder that holds flickr8k-cn"
    if os.environ.get("CI") == "true" and (default / "flickr8k-cn").is_dir():
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The tests' models are toys: threads that wait for each other take longer than the work."""
    torch.set_num_threads(1)
