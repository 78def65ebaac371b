"""`tuco-jax plan`: memory, FLOPs and exchanges of scoring a pair on devices that are not here."""

from tuco_jax.scoring.plan import PlanOptions as Config

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    """Plan, and print what binds."""
    from common_jax.io.files import check_writable, write_json
    from tuco_jax.scoring.plan import plan_score

    path = check_writable(config.out, (".json",)) if config.out is not None else None
    found, device = plan_score(config)
    print("\n".join(found.lines(device)))
    if path is not None:
        write_json(path, found.on(device))
        print(f"figures: {path}")
