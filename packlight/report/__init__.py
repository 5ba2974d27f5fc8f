"""The HTML report and its figures. Needs matplotlib (extra `report`), imported when drawing."""

from packlight.report.page import write_report

__all__ = ["write_report"]
