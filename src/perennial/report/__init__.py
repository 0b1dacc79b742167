"""Figures, tables, and one self-contained page of a run directory."""

from perennial.report.load import NoResultsError, NotARunDirectoryError
from perennial.report.page import summary_numbers, summary_table, write_report

__all__ = ["NoResultsError", "NotARunDirectoryError", "summary_numbers", "summary_table", "write_report"]
