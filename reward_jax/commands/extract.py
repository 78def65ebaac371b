"""`reward-jax extract`: the reward of an expert relative to its base, of either kind."""

from reward_jax.planning.reward_run import RewardRunOptions as Config
from reward_jax.planning.reward_run import load_extraction, run_extraction

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    """Extract and write; prints where the reward is, and how much it explains.

    Raises InputError, before anything is written, where base and expert do not fit each other.
    """
    extraction = load_extraction(config)
    for note in extraction.notes:
        print(f"note: {note}")
    print(run_extraction(extraction, config))
