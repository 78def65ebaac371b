"""Where each of our parameters stands in a checkpoint of Diffuser's or the authors' networks.

A table: our path -> (their name, layout). A layout names the axes of their tensor, then those of
ours: f features, c channels, k taps, 1 an axis of length 1. Rows that a module does not call for
(a shortcut, a norm, a bias, attention) are skipped by its reader.

A level of a U-Net has four entries in Diffuser and in most of the authors' code (block, block,
attention or nothing, resampling), three in those of their networks that have no attention.
"""

from collections.abc import Iterator

__all__ = ["Rows", "half_unet", "mlp", "unet"]

Rows = Iterator[tuple[str, tuple[str, str]]]


def _weights(path: str, name: str, layout: str) -> Rows:
    yield f"{path}/kernel", (f"{name}.weight", layout)
    yield f"{path}/bias", (f"{name}.bias", "f->f")


def _linear(path: str, name: str) -> Rows:
    return _weights(path, name, "fc->cf")


def _conv(path: str, name: str) -> Rows:
    return _weights(path, name, "fck->kcf")


def _time(path: str = "time") -> Rows:
    yield from _linear(f"{path}/first", "time_mlp.1")
    yield from _linear(f"{path}/second", "time_mlp.3")


def _conv_block(path: str, name: str) -> Rows:
    yield from _conv(f"{path}/conv", f"{name}.block.0")
    yield f"{path}/norm/scale", (f"{name}.block.2.weight", "f->f")
    yield f"{path}/norm/bias", (f"{name}.block.2.bias", "f->f")


def _block(path: str, name: str) -> Rows:
    yield from _conv_block(f"{path}/first", f"{name}.blocks.0")
    yield from _conv_block(f"{path}/second", f"{name}.blocks.1")
    yield from _linear(f"{path}/time", f"{name}.time_mlp.1")
    yield from _conv(f"{path}/shortcut", f"{name}.residual_conv")


def _attention(path: str, name: str) -> Rows:
    yield f"{path}/norm/scale", (f"{name}.fn.norm.g", "1f1->f")
    yield f"{path}/norm/bias", (f"{name}.fn.norm.b", "1f1->f")
    yield from _weights(f"{path}/qkv", f"{name}.fn.fn.to_qkv", "fc1->cf")
    yield from _weights(f"{path}/out", f"{name}.fn.fn.to_out", "fc1->cf")


def unet(levels: int, entries: int) -> Rows:
    """Of a `TemporalUnet`; entries: of a level, 4 or 3."""
    resample = entries - 1
    yield from _time()
    for level in range(levels):
        for path, name in ((f"down_{level}", f"downs.{level}"), (f"up_{level}", f"ups.{level}")):
            yield from _block(f"{path}_0", f"{name}.0")
            yield from _block(f"{path}_1", f"{name}.1")
            yield from _attention(f"{path}_attention", f"{name}.2")
        yield from _conv(f"down_{level}_sample/conv", f"downs.{level}.{resample}.conv")
        yield from _weights(f"up_{level}_sample", f"ups.{level}.{resample}.conv", "cfk->kcf")
    yield from _block("middle_0", "mid_block1")
    yield from _attention("middle_attention", "mid_attn")
    yield from _block("middle_1", "mid_block2")
    yield from _conv_block("final", "final_conv.0")
    yield from _conv("out", "final_conv.1")


def half_unet(levels: int) -> Rows:
    """Of a `HalfUnet`."""
    yield from _time()
    for level in range(levels):
        yield from _block(f"down_{level}_0", f"blocks.{level}.0")
        yield from _block(f"down_{level}_1", f"blocks.{level}.1")
        yield from _conv(f"down_{level}_sample/conv", f"blocks.{level}.2.conv")
    for level in range(2):
        yield from _block(f"middle_{level}", f"mid_block{level + 1}")
        yield from _conv(f"middle_{level}_sample/conv", f"mid_down{level + 1}.conv")
    yield from _linear("hidden", "final_block.0")
    yield from _linear("head", "final_block.2")


def mlp(count: int) -> Rows:
    """Of a `WindowMLP` of `count` hidden layers, the last of them one number wide."""
    yield from _time()
    for layer in range(count - 1):
        yield from _linear(f"layer_{layer}", f"mlp.{layer}.0")
    yield from _linear("head", f"mlp.{count - 1}.0")
    yield from _linear("scale", f"mlp.{count}")
