"""`reward-jax data`: episodes of a task, recorded in D4RL's layout or Minari's."""

from reward_jax.planning.record import RecordOptions as Config
from reward_jax.planning.record import record

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    """Record and write; prints what."""
    print(record(config))
