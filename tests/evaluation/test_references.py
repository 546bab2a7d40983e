"""What samples are scored against."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import numpy as np

from common.errors import WriteError
from data import open_dataset
from evaluation import references
from evaluation.references import DatasetReference
from evaluation.statistics import Statistics


def test_statistics_that_cannot_be_kept_are_not_lost(tmp_path, monkeypatch, caplog):
    """A full disk in the place of the cache costs the next run its time, and this one nothing."""
    found = Statistics(np.zeros(2), np.eye(2), 10)

    def refuse(path, statistics):
        raise WriteError(path, errno.ENOSPC)

    monkeypatch.setattr(references.Reference, "statistics", lambda *_: found)
    monkeypatch.setattr(references, "save_statistics", refuse)
    dataset = open_dataset("digits", None, img_size=8, in_chans=1, num_classes=-1, crop=None)
    extractor = SimpleNamespace(name="none", describe=lambda: {})
    assert DatasetReference(dataset, 10, tmp_path).statistics(extractor, 4, quiet=True) is found
    assert "No space left on device" in caplog.text and str(tmp_path) in caplog.text
