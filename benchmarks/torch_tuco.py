"""TuCo in PyTorch with forward hooks, as the paper's code does it: what we are timed against.

The tuned model runs; a hook on each of its layers hands that layer's inputs to the base's layer
and adds up both components of the last token. No unembedding; inference mode; fused attention.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class TorchTuco:
    """Scores of token batches by two Hugging Face Llama models that share their configuration."""

    def __init__(self, base: Any, tuned: Any) -> None:
        self.tuned = tuned.base_model
        self.device = next(tuned.parameters()).device
        for layer, other in zip(tuned.base_model.layers, base.base_model.layers, strict=True):
            layer.register_forward_hook(self._hook(other), with_kwargs=True)

    def _hook(self, other: Any):
        def hook(module, args, kwargs, output):
            x = args[0] if args else kwargs.pop("hidden_states")
            base = other(x, *args[1:], **kwargs)
            rows = torch.arange(len(x), device=x.device)
            start, ft, pt = (h[rows, self.last] for h in (x, output, base))
            self.ptc += pt - start
            self.ftc += ft - pt

        return hook

    @torch.inference_mode()
    def batch(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """TuCo [B] of right-padded tokens [B, T]."""
        self.last = mask.sum(1) - 1
        shape = (len(tokens), self.tuned.config.hidden_size)
        self.ptc, self.ftc = (torch.zeros(shape, device=self.device) for _ in range(2))
        self.tuned(input_ids=tokens, attention_mask=mask, use_cache=False)
        p, f = self.ptc.abs().sum(1), self.ftc.abs().sum(1)
        return f / (p + f)

    def prompts(self, rows: Sequence[np.ndarray], size: int = 8) -> np.ndarray:
        """TuCo [N] of prompts of unequal length, sorted and in batches of `size`."""
        order = np.argsort([len(r) for r in rows], kind="stable")
        scores = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), size):
            picked = order[start : start + size]
            longest = max(len(rows[i]) for i in picked)
            tokens = torch.zeros(len(picked), longest, dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for row, i in enumerate(picked):
                tokens[row, : len(rows[i])] = torch.from_numpy(rows[i].astype(np.int64))
                mask[row, : len(rows[i])] = 1
            tokens, mask = tokens.to(self.device), mask.to(self.device)
            scores[picked] = self.batch(tokens, mask).cpu().numpy()
        return scores
