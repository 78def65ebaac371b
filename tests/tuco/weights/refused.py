"""What is said of a folder of weights that is refused."""

import pytest

from common_jax.errors import InputError
from tuco_jax.weights.hf.model import load


def refusal(directory) -> str:
    """The one line with which a Hugging Face folder is refused."""
    with pytest.raises(InputError) as caught:
        load(str(directory))
    message = str(caught.value)
    assert "\n" not in message
    return message
