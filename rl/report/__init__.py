"""report.html: one self-contained page about a run, or about two beside each other, made from the files of its folder."""

from rl.report.folder import ReportError, read_lines
from rl.report.page import reported, write_report
