"""`reward-jax report`: one HTML page of a base, an expert and the reward between them."""

from reward_jax.report.write import ReportOptions as Config
from reward_jax.report.write import write_report

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    """Measure, draw, write; prints the peak against the goal, and what comes of plans."""
    print(write_report(config))
