"""Groups of the demo hold the same requests, bare and in templates."""

import pytest

from common_jax.errors import InputError
from tuco_jax.datasets import prompt_sources
from tuco_jax.datasets.prompt_groups import prompt_groups


def test_groups_hold_the_same_requests_bare_and_in_templates(monkeypatch):
    harmful = [
        f"{deed} the {thing}"
        for deed in ("Rob", "Flood", "Sell", "Haunt")
        for thing in ("bank", "museum", "harbour", "hotel", "library", "theatre")
    ]
    monkeypatch.setattr(prompt_sources, "advbench", lambda: harmful)
    monkeypatch.setattr(
        prompt_sources,
        "jailbreak_templates",
        lambda: {"a": "{x} {{ prompt }}.", "b": "{{ prompt }}!"},
    )
    monkeypatch.setattr(prompt_sources, "passages", lambda: [f"Text {i}." for i in range(9)])
    groups = {g.name: g for g in prompt_groups(4)}
    assert [len(g.texts) for g in groups.values()] == [4, 4, 4, 4, 4]
    assert groups["jailbreak"].clusters == ["a", "b", "a", "b"]
    for bare, inside in (("harmful", "jailbreak"), ("chat", "harmless in template")):
        first, second = groups[bare].texts[:2]
        assert groups[inside].texts[:2] == [f"{{x}} {first}.", f"{second}!"]
    assert groups["plain text"].prompts()[0].messages is None
    for count in (1, 10):
        with pytest.raises(InputError, match=f"prompts is {count}: give 2 or more, 9 at most"):
            prompt_groups(count)
