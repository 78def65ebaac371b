"""Is an alpha for every layer, learned by gradient, better than the best one for all layers?

python examples/layer_alpha.py [--steps 15] [--folds 3] [--socialiqa 60] [--tiny]

--socialiqa: so many questions of Social IQA (fetched) instead of the few that are written here.
"""

import jax.numpy as jnp
import numpy as np
from common import arguments, load

from tuco_jax import Choices, LayerAlphaOptions, cross_validate_layer_alpha
from tuco_jax.datasets.assets import fetch
from tuco_jax.datasets.multiple_choice import read_social_iqa
from tuco_jax.evaluation.statistics import bootstrap_mean

# (question, options, place of the right one): authored here, for a short run, not a benchmark.
QUESTIONS = (
    ("Which animal says meow?", ("Dog", "Cat", "Cow"), 1),
    ("Which planet do we live on?", ("Mars", "Venus", "Earth"), 2),
    ("How many days has a week?", ("Seven", "Five", "Nine"), 0),
    ("What do cows give?", ("Wine", "Milk", "Oil"), 1),
    ("Which is a fruit?", ("Apple", "Stone", "Chair"), 0),
    ("Which is a metal?", ("Wood", "Wool", "Iron"), 2),
    ("What is frozen water?", ("Steam", "Ice", "Sand"), 1),
    ("Which is the largest?", ("Mouse", "Cat", "Whale"), 2),
    ("Which city is in France?", ("Paris", "Rome", "Berlin"), 0),
    ("What colour is grass?", ("Red", "Green", "Blue"), 1),
    ("Which is a tool?", ("Hammer", "Cloud", "Song"), 0),
    ("When is it dark?", ("Noon", "Morning", "Night"), 2),
)


def social_iqa(count: int) -> list[tuple[str, tuple[str, ...], int]]:
    """The first questions of Social IQA as the package evals has it."""
    task = read_social_iqa(fetch("evals") / "theory_of_mind/socialiqa/test.jsonl", 0)
    return [(q.text, q.choices, q.answer) for q in task.questions[:count]]


def choices(tokenizer, questions) -> Choices:
    """Questions with lettered options as plain text; the options' tokens are the letters'."""
    rows, answers = [], []
    for question, options, answer in questions:
        lines = [f"{letter}. {o}" for letter, o in zip("ABC", options, strict=True)]
        rows.append(tokenizer("\n".join([question, *lines, "Answer:"]))["input_ids"])
        answers.append(answer)
    letters = [tokenizer(f" {x}", add_special_tokens=False)["input_ids"][-1] for x in "ABC"]
    length = max(map(len, rows))
    mask = np.arange(length)[None] < np.asarray([len(r) for r in rows])[:, None]
    tokens = np.asarray([r + [0] * (length - len(r)) for r in rows])
    return Choices(
        jnp.asarray(tokens),
        jnp.asarray(mask),
        jnp.tile(jnp.asarray(letters), (len(rows), 1)),
        jnp.asarray(answers),
    )


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--penalty", type=float, default=1.0)
    parser.add_argument("--socialiqa", type=int, default=0)
    options = parser.parse_args()
    questions = social_iqa(options.socialiqa) if options.socialiqa else QUESTIONS
    pair, tokenizer = load(options.tiny)
    found = cross_validate_layer_alpha(
        pair,
        choices(tokenizer, questions),
        LayerAlphaOptions(options.steps, 0.02, options.penalty),
        folds=options.folds,
    )
    print(f"{len(found.fold)} questions, {options.folds} folds, judged where held out")
    names = {"one": "alpha 1", "grid": "best of the grid", "learned": "learned by layer"}
    for key, name in names.items():
        loss, hits = found.losses[key].mean(), found.hits[key].mean()
        print(f"{name}: loss {loss:.4f} nats, accuracy {hits:.3f}")
    gain = bootstrap_mean(found.losses["grid"] - found.losses["learned"])
    print(
        f"learned better than the grid by {gain.value:.4f} nats a question, 95% interval "
        f"{gain.low:.4f} to {gain.high:.4f}"
    )
    print("the grid's alpha by fold:", " ".join(f"{a:.2f}" for a in found.grid))
    print("learned alpha by layer, mean of folds:")
    print(" ".join(f"{a:.3f}" for a in found.alphas.mean(axis=0)))


if __name__ == "__main__":
    main()
