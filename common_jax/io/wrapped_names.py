"""Names of tensors as a model has them, whatever wrapped it when it was saved."""

__all__ = ["unwrapped"]

# torch.compile, data-parallel, FSDP and checkpointing put these into names.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrapped(name: str) -> str:
    """A tensor's name without the parts that wrappers of a module put into it, at any depth."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
