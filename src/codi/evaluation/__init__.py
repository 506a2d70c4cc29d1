"""Image quality: metrics, one evaluation loop for every method, and reports."""

from .evaluate import Method, Results, Row, baselines, evaluate, pipeline_method
from .metrics import Features, enlite0_distance, frechet_distance, psnr, ssim
from .report import contact_sheet, markdown_table, rich_table, write_json

__all__ = [
    "Features",
    "Method",
    "Results",
    "Row",
    "baselines",
    "contact_sheet",
    "enlite0_distance",
    "evaluate",
    "frechet_distance",
    "markdown_table",
    "pipeline_method",
    "psnr",
    "rich_table",
    "ssim",
    "write_json",
]
