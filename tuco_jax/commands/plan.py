"""`tuco-jax plan`: memory, FLOPs and exchanges of scoring a pair on devices that are not here."""

from tuco_jax.scoring.plan import PlanOptions as Config

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    """Plan, and print what binds."""
    from common_jax.plan import report
    from tuco_jax.scoring.plan import plan_score

    report(lambda: plan_score(config), config.out)
