"""`reward-jax train`: a diffusion model of trajectories or of images, from data of them."""

from reward_jax.planning.train_run import TrainOptions as Config
from reward_jax.planning.train_run import load_training, run_training

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    """Train and write; prints where the denoiser is."""
    print(run_training(load_training(config), config))
