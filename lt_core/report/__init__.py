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
from lt_core.report.rendering import TableView, to_summary, typeset
from lt_core.report.rows import TABLE1, TABLE2, method_rows, provenance, quoted_rows
from lt_core.report.tables import (
    Row,
    build_table,
    effect_in_words,
    load_table,
    per_class_table,
    save_table,
    show_table,
)

__all__ = [
    "METHODS",
    "STYLES",
    "TABLE1",
    "TABLE2",
    "Row",
    "TableView",
    "accuracy_by_class_size",
    "build_table",
    "classifiers",
    "crossings",
    "effect_in_words",
    "figure2_data",
    "figure_style",
    "load_table",
    "method_rows",
    "per_class_table",
    "predict",
    "probabilities",
    "provenance",
    "published",
    "published_notes",
    "published_rows",
    "published_rule",
    "quoted_rows",
    "save_figure",
    "save_table",
    "show_table",
    "style_of",
    "to_summary",
    "typeset",
]
