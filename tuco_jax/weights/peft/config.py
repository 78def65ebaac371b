"""Which adapters a folder holds, and what the configuration of one says of its modules."""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from common_jax.errors import InputError
from tuco_jax.weights.peft.layout import CONFIG

__all__ = ["AdapterConfig", "adapters", "choose", "is_adapter"]

DEFAULT = "default"  # what PEFT calls the adapter that lies in the folder itself
_MERGE = "merge it into its base with peft's merge_and_unload and give the merged model"

# Each kind's rank, and the number that its scale is made of; None: it has none.
_KINDS: dict[str, tuple[str, str] | None] = {
    "LORA": ("r", "lora_alpha"),
    "ADALORA": ("init_r", "lora_alpha"),
    "LOHA": ("r", "alpha"),
    "LOKR": ("r", "alpha"),
    "IA3": None,
    "LN_TUNING": None,
    "TRAINABLE_TOKENS": None,
}
# Kinds that leave every weight as it is, so that nothing of them can be merged into any.
_VIRTUAL = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
_VIRTUAL += ("ADAPTION_PROMPT", "CARTRIDGE", "CPT")
_MIXED = ("POLY", "XLORA")  # whose weights depend on the input
# Fields of a LoRA config that change what is computed in ways not offered here.
_UNSUPPORTED = {
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "layer_replication": "layer replication",
    "target_parameters": "adapters of bare parameters",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
_REWRITES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # at initialisation


def adapters(directory: str | pathlib.Path) -> dict[str, pathlib.Path]:
    """The adapters that a folder holds: name -> folder; "default" is the folder's own."""
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        return {}
    inner = (path for path in sorted(directory.iterdir()) if (path / CONFIG).is_file())
    own = {DEFAULT: directory} if (directory / CONFIG).is_file() else {}
    return {path.name: path for path in inner} | own


def is_adapter(directory: str | pathlib.Path) -> bool:
    """Whether a folder holds adapters, of its own or in folders named after them.

    One that holds a model, whose training left adapters in folders below, is none.
    """
    directory = pathlib.Path(directory)
    own = (directory / CONFIG).is_file()
    return own or (not (directory / "config.json").is_file() and bool(adapters(directory)))


def choose(directory: str | pathlib.Path, name: str | None) -> pathlib.Path:
    """The folder of one adapter: the named one, or else the folder's own, or else the only one."""
    found = adapters(directory)
    if name is None and (DEFAULT in found or len(found) == 1):
        return found.get(DEFAULT) or next(iter(found.values()))
    if name is None or name not in found:
        lacking = "holds several adapters" if name is None else f"holds no adapter {name!r}"
        raise InputError(
            f"{directory}: {lacking}: it has {', '.join(found)}; name one of them with --adapter"
        )
    return found[name]


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The fields of adapter_config.json, checked: one that is not offered here is an InputError.

    where: the file, for messages.
    """

    fields: Mapping[str, Any]
    where: str

    def __post_init__(self) -> None:
        kind = self.fields.get("peft_type")
        if kind in _VIRTUAL:
            raise self._error(
                f"an adapter of type {kind} adds virtual tokens and changes no weight of the "
                "base, so there is no tuned model to compare, nor anything to merge; give a "
                "tuning that changes weights, such as LoRA"
            )
        if kind in _MIXED:
            raise self._error(
                f"an adapter of type {kind} changes weights anew for each input, so it cannot be "
                "merged; give one of the adapters that it mixes, or another kind"
            )
        if not isinstance(kind, str) or kind not in _KINDS:
            raise self._error(
                f"adapters of type {_text(kind)} are not supported, only {', '.join(_KINDS)}; "
                f"{_MERGE}"
            )
        for field, name in _UNSUPPORTED.items():
            if self.fields.get(field):
                raise self._error(f"{field}: {name} is not supported; {_MERGE}")
        if self.fields.get("use_dora") and self.fields.get("lora_bias"):
            raise self._error(f"lora_bias: with use_dora it is not supported; {_MERGE}")
        start = self.fields.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_REWRITES_BASE):
            raise self._error(
                f"init_lora_weights: {start!r} changes the base's weights; save the adapter with "
                "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
            )
        self._check_numbers()

    @classmethod
    def read(cls, directory: str | pathlib.Path) -> "AdapterConfig":
        """That of one adapter's folder."""
        path = pathlib.Path(directory) / CONFIG
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(fields, dict):
                raise ValueError("not a JSON object")
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: cannot be read as JSON ({error})") from None
        return cls(fields, str(path))

    def rank(self, module: str) -> float | None:
        """A LoRA module's rank; None where the tensors alone tell it."""
        if self.fields["peft_type"] != "LORA":
            return None
        return self._pattern("rank_pattern", module, "r")

    def scale(self, module: str, rank: int) -> float:
        """What multiplies a module's change; rank: of its tensors."""
        kind = self.fields["peft_type"]
        if kind == "ADALORA":  # which divides by the rank it began with, whatever it pruned
            alpha = self.fields.get("lora_alpha", 8)
            return (alpha if alpha > 0 else rank) / (self.fields.get("init_r", 12) + 1e-5)
        if kind in ("LOHA", "LOKR"):
            return self._pattern("alpha_pattern", module, "alpha") / self._pattern(
                "rank_pattern", module, "r"
            )
        alpha = self._pattern("alpha_pattern", module, "lora_alpha")
        return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def saves(self, module: str) -> bool:
        """Whether a module stands in `modules_to_save`: it has a copy of its own, never tied."""
        return any(module.endswith(saved) for saved in self.fields.get("modules_to_save") or ())

    @property
    def keeps_ties(self) -> bool:
        """Whether a head that is tied to the embedding follows whatever is done to that."""
        return bool(self.fields.get("ensure_weight_tying"))

    def token_rows(self, module: str) -> list[int]:
        """Which rows of an embedding were trained, in the order in which they are stored."""
        field = "token_indices" if "token_indices" in self.fields else "trainable_token_indices"
        rows = self.fields.get(field)
        if isinstance(rows, dict):
            rows = next((r for key, r in rows.items() if f".{module}".endswith(f".{key}")), None)
        if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows):
            raise self._error(f"{field}: must list the trained rows of {module}, not {rows!r}")
        return rows

    def _error(self, message: str) -> InputError:
        return InputError(f"{self.where}: {message}")

    def _check_numbers(self) -> None:
        """Ranks and alphas are numbers, patterns of them mappings to numbers."""
        fields = _KINDS[self.fields["peft_type"]]
        if fields is None:
            return
        found = {field: self.fields[field] for field in fields if field in self.fields}
        patterned = self.fields["peft_type"] != "ADALORA"  # whose rank_pattern holds masks
        for field in ("rank_pattern", "alpha_pattern") if patterned else ():
            patterns = self.fields.get(field) or {}
            if not isinstance(patterns, dict):
                raise self._error(f"{field}: must map names to numbers, not {patterns!r}")
            found |= {f"{field}: {name}": value for name, value in patterns.items()}
        for field, value in found.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise self._error(f"{field}: must be a number, not {value!r}")
            if not math.isfinite(value) or (value <= 0 and "alpha" not in field):
                raise self._error(f"{field}: must be a number above 0, not {value!r}")

    def _pattern(self, field: str, module: str, default: str) -> float:
        """A rank or alpha: the first pattern that matches the module's name, as in PEFT."""
        for pattern, value in (self.fields.get(field) or {}).items():
            try:
                found = re.match(rf"(.*\.)?({pattern})$", module)
            except re.error as error:
                raise self._error(
                    f"{field}: {pattern!r} is no regular expression ({error})"
                ) from None
            if found:
                return value
        return self.fields.get(default, 8)


def _text(kind: Any) -> str:
    return str(getattr(kind, "value", kind))
