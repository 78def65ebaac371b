"""How far can vectors in front of a prompt push its TuCo down, or up?

python examples/soft_prompt.py [--maximise] [--max_norm 1.0] [--tiny]
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from common import arguments, load

from tuco_jax import SoftPromptOptions, Tokens, fit_soft_prompt
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.read import as_prompts

FITTED = (
    "Name three rivers in Europe.",
    "How do I iron a shirt?",
    "Write a poem about autumn.",
    "Explain what a prime number is.",
)
HELD_OUT = (
    "Suggest a name for a grey cat.",
    "What do bees eat in winter?",
    "Describe the taste of a lemon.",
    "How long does it take to boil an egg?",
)


def tokens(tokenizer, texts) -> Tokens:
    """Conversations of one user turn, right-padded to one length."""
    rows = encode(tokenizer, as_prompts([[{"role": "user", "content": t}] for t in texts]))
    length = max(r.size for r in rows)
    mask = np.arange(length)[None] < np.asarray([r.size for r in rows])[:, None]
    padded = np.stack([np.pad(r, (0, length - r.size)) for r in rows])
    return Tokens(jnp.asarray(padded), jnp.asarray(mask))


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--maximise", action="store_true", help="push TuCo up, not down")
    parser.add_argument("--max_norm", type=float, help="norm of a vector, in mean embedding norms")
    parser.add_argument("--vectors", type=int, default=4)
    parser.add_argument("--position", type=int, default=0, help="tokens before them")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    pair, tokenizer = load(options.tiny)
    fit = SoftPromptOptions(
        vectors=options.vectors,
        position=options.position,
        steps=options.steps,
        maximise=options.maximise,
        max_norm=options.max_norm,
        learning_rate=0.05,
    )
    found = fit_soft_prompt(
        pair, tokens(tokenizer, FITTED), fit, held_out=tokens(tokenizer, HELD_OUT)
    )
    print(dataclasses.asdict(fit))
    print("mean TuCo by step:", " ".join(f"{x:.4f}" for x in found.history))
    assert found.held_out is not None
    rows = ("fitted", (found.plain, found.start, found.fitted)), ("held out", found.held_out)
    for name, (plain, start, fitted) in rows:
        print(
            f"{name}: TuCo {plain.mean():.4f} without vectors, {start.mean():.4f} with those of "
            f"random tokens, {fitted.mean():.4f} with the fitted ones"
        )


if __name__ == "__main__":
    main()
