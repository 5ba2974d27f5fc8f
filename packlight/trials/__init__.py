"""Hyper-parameter search in one limit of memory: each trial is planned before it runs.

    packlight search examples/char_gpt_search.py --memory 1GiB --trials 200 --workers 2

Needs `pip install 'packlight[search]'`. See docs/search.md.
"""

from __future__ import annotations

from packlight.trials.records import Outcome, Record, Study
from packlight.trials.run import search
from packlight.trials.settings import Settings

__all__ = ["Outcome", "Record", "Settings", "Study", "search"]
