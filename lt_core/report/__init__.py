"""Tables beside the published values and figures in one style: what the notebooks use."""

from lt_core.methods import METHODS, classifiers, predict, probabilities
from lt_core.report.figures import (
    STYLES,
    accuracy_by_class_size,
    crossings,
    figure2_data,
    figure_style,
    save_figure,
    style_of,
)
from lt_core.report.published import published, published_notes, published_rows, published_rule
from lt_core.report.rendering import TableView
from lt_core.report.tables import Row, build_table, load_table, per_class_table, save_table, show_table

__all__ = [
    "METHODS",
    "STYLES",
    "Row",
    "TableView",
    "accuracy_by_class_size",
    "build_table",
    "classifiers",
    "crossings",
    "figure2_data",
    "figure_style",
    "load_table",
    "per_class_table",
    "predict",
    "probabilities",
    "published",
    "published_notes",
    "published_rows",
    "published_rule",
    "save_figure",
    "save_table",
    "show_table",
    "style_of",
]
