"""Reading adapters in the layout of the `peft` library, from a folder of one or several."""

import pathlib

from common_jax.errors import InputError
from tuco_jax.models.decoder import Params
from tuco_jax.weights.assemble import Placement
from tuco_jax.weights.hf.safetensors_files import SafetensorsFile, SafetensorsTensors
from tuco_jax.weights.model import Model
from tuco_jax.weights.peft.adapter import Adapter, Found
from tuco_jax.weights.peft.config import AdapterConfig, choose
from tuco_jax.weights.peft.layout import CHAT_TEMPLATE, WEIGHTS

__all__ = ["find", "load", "read_chat_template"]

_PICKLE = "adapter_model.bin"


def find(directory: str | pathlib.Path, adapter: str | None = None) -> Found:
    """One adapter of a folder, its config and header checked.

    adapter: its name, where the folder holds several in folders of their own; "default" is what
    lies in the folder itself, and is taken where no name is given.
    """
    folder = choose(directory, adapter)
    config = AdapterConfig.read(folder)
    if not (folder / WEIGHTS).is_file():
        if (folder / _PICKLE).is_file():
            raise InputError(
                f"{folder / _PICKLE}: pickled weights can run code when read, so they are "
                "refused; where peft is installed, load the adapter and save_pretrained it again"
            )
        raise InputError(f"{folder / WEIGHTS}: no such file")
    file = SafetensorsFile(folder / WEIGHTS)
    return Found(config, SafetensorsTensors(str(file.path), [file]), str(folder), folder)


def read_chat_template(directory: str | pathlib.Path) -> str | None:
    """The chat template beside an adapter; None where there is none."""
    path = pathlib.Path(directory) / CHAT_TEMPLATE
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the chat template cannot be read ({error})") from None


def load(
    directory: str | pathlib.Path,
    base: Model,
    *,
    dtype: str = "float32",
    placement: Placement | None = None,
    adapter: str | None = None,
) -> tuple[Params, Params]:
    """`Adapter.load` over a model."""
    found = Adapter(find(directory, adapter), base.config)
    return found.load(base.params, dtype=dtype, placement=placement)
