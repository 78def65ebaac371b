"""`tuco-jax generate`: answers under FTC_alpha, each token beside its TuCo."""

from tuco_jax.generation.options import AnswerOptions as Config

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    """Generate, and print the answers; files are named after them."""
    from tuco_jax.generation.generate_file import generate_file, lines

    answers = generate_file(config)
    for answer in answers:
        print("\n".join(lines(answer, names=not config.prompt)))
    for path in (config.out, config.page):
        if path is not None:
            print(f"{len(answers)} answers: {path}")
