"""Every claim of the paper about its results: a declaration each, tested on the feature caches.

found = evaluate_claims(Study.of_profile("embedded"))      # 68 rows: verdict, evidence, rule
save_claims(found, "embedded")
"""

from lt_core.report.claims.decisions import Claim, Part, verdict
from lt_core.report.claims.page import claims_page, page_data
from lt_core.report.claims.study import Entry, Estimate, Study, System
from lt_core.report.claims.untestable import Untestable
from lt_core.report.claims.verdicts import (
    CLAIMS,
    evaluate_claims,
    save_claims,
    section_of,
    section_table,
    summary,
)

__all__ = [
    "CLAIMS",
    "Claim",
    "Entry",
    "Estimate",
    "Part",
    "Study",
    "System",
    "Untestable",
    "claims_page",
    "page_data",
    "save_claims",
    "section_of",
    "section_table",
    "summary",
    "evaluate_claims",
    "verdict",
]
