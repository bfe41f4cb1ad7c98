"""The report: what a model is made of, measured, drawn, and as a page."""

from keras_compress.report.report import Report, report

__all__ = ["Report", "report"]
