"""`reward-jax policy`: a policy of a task at several stages, by reinforcement learning."""

from reward_jax.tasks.locomotion.learn import LearnOptions as Config
from reward_jax.tasks.locomotion.learn import learn

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    """Learn and write; prints the stages and where they are."""
    print(learn(config))
