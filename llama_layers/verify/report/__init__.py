"""The findings of a check or a comparison as data, text, JSON and a page."""

from llama_layers.verify.report.comparison import Comparison, SiteDifference
from llama_layers.verify.report.html import to_html, write_html
from llama_layers.verify.report.logprobs import (
    LogprobDifference,
    NormalDifference,
    SiteContribution,
    TokenDifference,
)
from llama_layers.verify.report.remedy import Remedy
from llama_layers.verify.report.report import Report
from llama_layers.verify.report.results import (
    EDGES,
    SITE_VERDICTS,
    Element,
    Explanation,
    SiteResult,
    SiteVerdict,
)

__all__ = [
    "EDGES",
    "SITE_VERDICTS",
    "Comparison",
    "Element",
    "Explanation",
    "LogprobDifference",
    "NormalDifference",
    "Remedy",
    "Report",
    "SiteContribution",
    "SiteDifference",
    "SiteResult",
    "SiteVerdict",
    "TokenDifference",
    "to_html",
    "write_html",
]
